"""The regression guard: what a step dispatches, counted on any machine. No time is held to a number here.

tests/rehearsal/test_step.py counts launches and bytes. A number that changes here was changed: if it was meant, the new
one is written down with its reason.
"""

from collections import Counter

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.cases import CASES
from kernels.launch import INTERPRETED
from model import GPT, GPTConfig, Precision
from tests.train.tape import Tape, storage
from train.data import Batch
from train.optim import FlatAdamW
from train.step import TrainStep

CPU = torch.device("cpu")
B, T, V, C = 2, 16, 53, 64  # 32 rows: one piece of the embedding's backward pass; no tensor is padded
M = B * T
CASE = {case.name: case for case in CASES}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels are counted in Triton's interpreter")


def make(ops: Ops, n_layer: int, *, accumulation: int = 1, dropout: float = 0.0, dtype=torch.float32) -> TrainStep:
    torch.manual_seed(0)
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=n_layer, n_head=2, n_embd=C, dropout=dropout, bias=True)
    model = GPT(config, ops, precision=Precision(dtype))
    adamw = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    return TrainStep(model, FlatAdamW(model, ops, **adamw, in_float32=accumulation > 1), grad_clip=1.0)


def batch(accumulation: int = 1) -> Batch:
    """As the cases have it: tokens that repeat as a text's do, every fourth target ignored."""
    x = CASE["embedding"].make_inputs((B, T, C, V), torch.float32, CPU)["idx"]
    y = CASE["linear_cross_entropy"].make_inputs((M, C, V), torch.float32, CPU)["targets"].view(B, T)
    repeated = (tokens.expand(accumulation, B, T).contiguous() for tokens in (x, y))
    return Batch(*repeated, tuple(range(accumulation)))


def recorded(step: TrainStep, accumulation: int = 1) -> list[tuple]:
    """The calls of a step: (operation, arguments, keywords, what it made)."""
    data = batch(accumulation)
    with Tape() as tape:
        step(data, 1e-3)
    return tape.calls


# Operations that make or change a tensor, forward and backward: (a layer, a micro-step besides, an update). A view is
# none; a fused operation is one, whatever it does inside.
OPERATIONS = {
    ("reference", torch.float32, 0.0): (41, 23, 30),
    ("reference", torch.float32, 0.2): (67, 25, 30),  # attention spelt out, as on a CPU where it drops weights
    ("reference", torch.bfloat16, 0.0): (73, 38, 32),  # its LayerNorm and its loss widen; attention spelt out, on a CPU
    ("fused", torch.float32, 0.2): (57, 19, 7),
    ("fused", torch.bfloat16, 0.0): (49, 22, 3),
    ("fused", torch.bfloat16, 0.2): (57, 23, 3),
}


@interpreted
@pytest.mark.parametrize(("name", "dtype", "dropout"), OPERATIONS)
def test_operations_of_a_step(name: str, dtype: torch.dtype, dropout: float) -> None:
    """A copy, a cast, a gradient cleared twice: one operation more."""
    layer, micro_step, update = OPERATIONS[name, dtype, dropout]
    ops = {"reference": REFERENCE, "fused": FUSED}[name]
    for n_layer, accumulation in ((1, 2), (2, 1)) if ops is REFERENCE else ((2, 2),):  # the interpreter is slow
        step = make(ops, n_layer, accumulation=accumulation, dropout=dropout, dtype=dtype)
        made = [str(func) for func, _, _, fresh in recorded(step, accumulation) if fresh or func._schema.is_mutable]
        expected = accumulation * (n_layer * layer + micro_step) + update
        assert len(made) == expected, Counter(made)


@interpreted
@pytest.mark.parametrize(("ops", "casts"), [(FUSED, 0), (REFERENCE, 11)], ids=["fused", "reference"])
def test_no_parameter_is_cast_in_the_forward_pass(ops: Ops, casts: int) -> None:
    """In bfloat16 the float32 ones are not even read. The reference widens the vectors of its 5 LayerNorms, and the
    position embeddings."""
    step = make(ops, 2, dtype=torch.bfloat16)
    flat, data = step.optimizer.flat, batch()
    with Tape() as tape:
        step.model(data.x[0], data.y[0])
    reads = [(func, storage(x)) for func, args, _, _ in tape.calls for x in args if isinstance(x, torch.Tensor)]
    assert storage(flat.param) not in {x for _, x in reads}
    cast = [func for func, x in reads if x == storage(flat.compute) and func is torch.ops.aten._to_copy.default]
    assert len(cast) == casts
    assert any(x == storage(flat.compute) for _, x in reads)
