"""The bundle of operations that a model is built with: chosen once, passed in, never swapped.

A model's parameters and state_dict are the same whichever bundle it holds, so a checkpoint made with one runs with
another, and a parity test is two constructors. `REFERENCE` is here, `FUSED` in `kernels/fused`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True)
class Ops:
    """Functions with the signatures and meanings of `kernels/reference.py`."""

    name: str
    embedding: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    linear: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor | None]]
    adamw: Callable[..., tuple[Tensor, Tensor]]
    # (n, device) -> seeds for n calls of operations with dropout, from one draw
    seeds: Callable[[int, torch.device], Sequence[Tensor | None]]
    # How the gradients of LayerNorms' weights, whose partial sums operations put in place, are finished; see
    # `kernels/fused/layer_norm.py`. None: the operations put no gradients in place, they are all autograd's.
    partial_rows: Callable[[int, torch.device], int] | None = None
    sum_partials: Callable[..., None] | None = None


# each operation, and the file in kernels/fused/ that it is in
FILES = {
    "embedding": "embedding",
    "add_layer_norm": "layer_norm",
    "linear": "linear",
    "mlp": "mlp",
    "linear_cross_entropy": "linear_cross_entropy",
    "adamw": "adamw",
}
REFERENCE = Ops(
    "reference",
    **{operation: getattr(reference, operation) for operation in FILES},
    seeds=reference.seeds,
)
