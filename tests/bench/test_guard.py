"""The regression guard: operations that a step of the reference, which a CPU runs, dispatches.

tests/rehearsal/test_step.py counts those of the fused step, and its bytes. A number that changes here was changed: if
it was meant, the new one is written down with its reason.
"""

from collections import Counter

import pytest
import torch

from kernels import REFERENCE
from model import GPT, GPTConfig, Precision
from tests.train.tape import Tape
from train.data import Batch
from train.optim import FlatAdamW
from train.step import TrainStep

B, T, V, C = 2, 16, 53, 64

# Operations that make or change a tensor, forward and backward: (a layer, a micro-step besides, an update). A view is
# none.
OPERATIONS = {
    (torch.float32, 0.0): (41, 20, 30),
    (torch.float32, 0.2): (52, 25, 30),  # attention, forward and backward, and each mask are one (`kernels/cpu.py`)
    (torch.bfloat16, 0.0): (57, 35, 29),  # its LayerNorm and its loss widen; attention as above
    (torch.bfloat16, 0.2): (68, 40, 29),
}


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
    with Tape() as tape:
        step(Batch(*tokens, tuple(range(accumulation))), 1e-3)
    made = [str(func) for func, _, _, fresh in tape.calls if fresh or func._schema.is_mutable]
    share = accumulation > 1  # the loss's share of the mean
    assert len(made) == accumulation * (n_layer * layer + micro_step + share) + update, Counter(made)
