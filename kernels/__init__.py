"""The operations a GPT is made of: what each means in plain torch, and (as they land) their fused Triton kernels.

The floor above uses `Ops`, the bundle a model is built with, and `REFERENCE`, the plain-torch bundle.
"""

from kernels.ops import REFERENCE, Ops

__all__ = ["REFERENCE", "Ops"]
