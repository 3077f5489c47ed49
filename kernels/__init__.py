"""The operations a GPT is made of: what each means in plain torch, and their fused Triton kernels.

The floors above use `Ops`, the bundle a model is built with; `REFERENCE`, the plain-torch bundle; `select`, which gives
the bundle for a device by name; and `missing`, which says why the fused ones cannot run there.
"""

from kernels.ops import REFERENCE, Ops, missing, select

__all__ = ["REFERENCE", "Ops", "missing", "select"]
