"""The regression guard: operations that a step of the reference, which a CPU runs, dispatches.

tests/rehearsal/test_step.py counts those of the fused step, and its bytes. A number that changes here was changed: if
it was meant, the new one is written down with its reason.
"""

import pytest
import torch

from kernels import REFERENCE
from model import GPTConfig
from train.data import Batch
from train.dryrun import Job, Recorder, build


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
    sums = {"accumulation": accumulation, "several": accumulation > 1}
    step = build(Job(config, 2, REFERENCE, **sums, dtype=dtype, on="cpu"))
    batch = Batch(*torch.randint(53, (2, accumulation, 2, 16)), tuple(range(accumulation)))
    step(batch, 1e-3)  # makes what later ones use again
    with Recorder(None, "cpu") as seen:
        step(batch, 1e-3)
    assert len(seen.calls) == operations, [call.name for call in seen.calls]
