"""The regression guard: what a step does, counted, on any machine. No time is held to a number here.

Kernels of a fused step and their bytes, counted in Triton's interpreter; operations of a reference step, counted at
dispatch; and one ratio of two times, taken by turns, with room for any noise. A number that changes here was changed:
if it was meant, the new one is written down with its reason.
"""

from collections import Counter

import pytest
import torch
from triton.runtime import interpreter

from bench import schema
from bench.steps import measure
from bench.variants import ours, reference
from bench.workloads import WORKLOADS
from kernels import FUSED, REFERENCE, Ops
from kernels.cases import CASES
from kernels.launch import INTERPRETED
from model import GPT, GPTConfig, Precision
from model.work import step_work
from tests.kernels.memory import watch
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


# Kernels


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Bytes that each kernel loads and stores from here on; `launches`: how often it runs."""
    memory, call = watch(monkeypatch), interpreter.GridExecutor.__call__
    moved = Counter()
    moved.launches = Counter()

    def counted(self, *args, **kwargs):
        before = memory.loaded + memory.stored
        call(self, *args, **kwargs)
        moved[self.fn.__name__] += memory.loaded + memory.stored - before
        moved.launches[self.fn.__name__] += 1

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return moved


@interpreted
@pytest.mark.parametrize(("n_layer", "accumulation", "dropout"), [(1, 1, 0.0), (1, 2, 0.2), (3, 1, 0.2), (3, 2, 0.0)])
def test_kernel_launches_of_a_step(moved: Counter, n_layer: int, accumulation: int, dropout: float) -> None:
    """6 a layer and 9 a micro-step, 2 an update; dropout adds none."""
    step = make(FUSED, n_layer, accumulation=accumulation, dropout=dropout)
    step(batch(accumulation), 1e-3)
    micro_step = {
        "embedding_fwd_kernel": 1,
        "add_layer_norm_fwd_kernel": 2 * n_layer + 1,
        "gelu_fwd_kernel": n_layer,
        "cross_entropy_fwd_kernel": 1,  # the loss and its gradient
        "scale_kernel": 2,  # of the head's two gradients
        "gelu_bwd_kernel": n_layer,
        "add_layer_norm_bwd_kernel": 2 * n_layer + 1,
        "embedding_bwd_pieces_kernel": 1,
        "embedding_bwd_wte_kernel": 1,
        "embedding_bwd_wpe_kernel": 1,
    }
    assert sum(micro_step.values()) == 6 * n_layer + 9
    expected = Counter({name: count * accumulation for name, count in micro_step.items()})
    assert moved.launches == expected + Counter({"adamw_norm_kernel": 1, "adamw_update_kernel": 1})


@interpreted
@pytest.mark.parametrize("n_layer", [1, 2])
def test_bytes_of_a_step(moved: Counter, n_layer: int) -> None:
    """Little more than the least that `model/work.py` states, part by part."""
    step = make(FUSED, n_layer)
    step(batch(), 1e-3)
    work = step_work(step.model.config, B, compute=4, stream=4, gradients=4)
    parts = {
        "embedding_fwd": ("embedding forward", 2.0),
        "embedding_bwd": ("embedding backward", 2.5),
        "add_layer_norm_fwd": ("LayerNorm forward", 1.2),
        "add_layer_norm_bwd": ("LayerNorm backward", 1.4),
        "gelu_fwd": ("GELU forward", 1.0),
        "gelu_bwd": ("GELU backward", 1.2),
        "cross_entropy": ("cross-entropy", 2.2),
        "adamw": ("optimizer", 1.1),
    }
    for kernel, (part, most) in parts.items():
        counted, least = sum(n for name, n in moved.items() if name.startswith(kernel)), work[part].bytes
        if kernel == "add_layer_norm_bwd":
            least -= 4 * M * C  # nobody uses the last block's stream: its gradient is not read
        assert least <= counted <= most * least, (kernel, counted / least)


# Dispatched operations


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
    ("reference", torch.bfloat16, 0.2): (83, 40, 32),
    ("fused", torch.float32, 0.0): (33, 18, 7),
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


# Time


@pytest.mark.slow
def test_ours_is_not_slower_than_the_reference_implementation() -> None:
    """Eager, in float32, by turns in this process. 1.35: twice over what the two differ by, and over any noise that
    medians and the fastest samples share."""
    every = [reference(compile=False, float32=True), ours("ours eager", ops=REFERENCE, float32=True)]
    theirs, mine = measure(WORKLOADS["cpu"], every, CPU, torch.float32, seconds=2)
    assert (theirs.skipped, mine.skipped) == ("", "")
    ratios = [take(mine.seconds) / take(theirs.seconds) for take in (schema.median, min)]
    assert min(ratios) < 1.35, ratios
