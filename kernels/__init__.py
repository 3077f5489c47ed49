"""The operations a GPT is made of: what each means in plain torch, and their fused Triton kernels.

The floors above use `Ops`, the bundle a model is built with; `REFERENCE`, the plain-torch bundle; and `select`, which
gives the bundle for a device by name.
"""

from kernels.ops import REFERENCE, Ops, select

__all__ = ["REFERENCE", "Ops", "select"]
