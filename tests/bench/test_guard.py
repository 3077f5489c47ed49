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

B, T, V, C = 2, 16, 53, 64

# Operations that make or change a tensor, forward and backward: (a layer, a micro-step besides, an update). A view is
# none.
OPERATIONS = {
    (torch.float32, 0.0): (29, 17, 24),
    (torch.float32, 0.2): (45, 22, 24),  # attention, forward and backward, and each mask are one (`kernels/cpu.py`)
    (torch.bfloat16, 0.0): (48, 29, 26),  # its LayerNorm and its loss widen; attention as above
    (torch.bfloat16, 0.2): (61, 34, 26),
}


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


@pytest.mark.parametrize(("n_layer", "accumulation"), [(1, 2), (2, 1)])
@pytest.mark.parametrize(("dtype", "dropout"), OPERATIONS)
def test_operations_of_a_step(dtype: torch.dtype, dropout: float, n_layer: int, accumulation: int) -> None:
    """A copy, a cast, a gradient cleared twice: one operation more."""
    layer, micro_step, update = OPERATIONS[dtype, dropout]
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=n_layer, n_head=2, n_embd=C, dropout=dropout, bias=True)
    model = GPT(config, REFERENCE, precision=Precision(dtype))
    adamw = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "several": accumulation > 1}
    step = TrainStep(model, FlatAdamW(model, REFERENCE, **adamw), grad_clip=1.0)
    tokens = torch.randint(V, (2, accumulation, B, T))
    batch = Batch(*tokens, tuple(range(accumulation)))
    step(batch, 1e-3)  # makes what later ones use again
    with Operations() as seen:
        step(batch, 1e-3)
    several = accumulation > 1  # then each loss is divided, and the sum is cleared, which needs no widening
    micro_steps = accumulation * (n_layer * layer + micro_step + several)
    assert len(seen.made) == micro_steps + update + (several and dtype == torch.float32), Counter(seen.made)
