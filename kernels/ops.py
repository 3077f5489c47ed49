"""The bundle of operations that a model is built with: chosen once, passed in, never swapped.

A model's parameters and state_dict are the same whichever bundle it holds, so a checkpoint made with one runs with
another, and a parity test is two constructors. `REFERENCE` is here, `FUSED` in `kernels/fused`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels import reference


@dataclass(frozen=True)
class Ops:
    """Functions with the signatures and meanings of `kernels/reference.py`."""

    name: str
    embedding: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    mlp: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor | None]]
    adamw: Callable[..., tuple[Tensor, Tensor]]


# each operation, and the file in kernels/fused/ that holds its Triton kernels
FILES = {
    "embedding": "embedding",
    "layer_norm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "mlp": "mlp",
    "linear_cross_entropy": "cross_entropy",
    "adamw": "adamw",
}
REFERENCE = Ops("reference", **{operation: getattr(reference, operation) for operation in FILES})
