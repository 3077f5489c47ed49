"""The regression guard: operations that a step of the reference, which a CPU runs, dispatches.

tests/rehearsal/test_step.py counts those of the fused step, and its bytes. A number that changes here was changed: if
it was meant, the new one is written down with its reason.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import REFERENCE
from model import GPT, GPTConfig, Precision
from train.data import Batch
from train.optim import FlatAdamW
from train.step import TrainStep


class Operations(TorchDispatchMode):
    """Names the operations that make or change a tensor. It holds no tensor: autograd copies a gradient that others
    hold."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = func(*args, **(kwargs or {}))
        made = {x.untyped_storage()._cdata for x in tree_leaves(results) if isinstance(x, Tensor)}
        self.made += [str(func)] * bool(made - given or func._schema.is_mutable)
        return results


@pytest.mark.parametrize(
    ("dtype", "dropout", "accumulation", "operations"),
    [
        (torch.float32, 0.0, 1, 29 + 17 + 24),  # a layer, forward and backward; the rest of a micro-step; the update
        (torch.float32, 0.2, 2, 2 * (45 + 23) + 25),  # of a sum: each loss is divided, the sum is cleared
        (torch.bfloat16, 0.0, 2, 2 * (48 + 30) + 26),  # its LayerNorm and its loss widen, and what is summed
        (torch.bfloat16, 0.2, 1, 61 + 34 + 26),  # attention, and each mask, are one operation (`kernels/cpu.py`)
    ],
)
def test_operations_of_a_step(dtype: torch.dtype, dropout: float, accumulation: int, operations: int) -> None:
    """Those that make or change a tensor; a view is none. A copy, a cast, a gradient cleared twice: one more."""
    config = GPTConfig(block_size=16, vocab_size=53, n_layer=1, n_head=2, n_embd=64, dropout=dropout, bias=True)
    model = GPT(config, REFERENCE, precision=Precision(dtype))
    adamw = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "several": accumulation > 1}
    step = TrainStep(model, FlatAdamW(model, REFERENCE, **adamw), grad_clip=1.0)
    batch = Batch(*torch.randint(53, (2, accumulation, 2, 16)), tuple(range(accumulation)))
    step(batch, 1e-3)  # makes what later ones use again
    with Operations() as seen:
        step(batch, 1e-3)
    assert len(seen.made) == operations, Counter(seen.made)
