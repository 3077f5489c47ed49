"""GraphedStep, its capture played by a tape: the same losses and weights as the eager step, to the bit."""

from collections.abc import Callable

import pytest
import torch

from kernels import REFERENCE, Ops
from kernels.fused import FUSED
from kernels.launch import INTERPRETED
from model import GPT, GPTConfig
from tests.train.tape import tape
from train.data import Batch
from train.graph import GraphedStep
from train.optim import FlatAdamW, LossScale
from train.step import TrainStep

B, T, V = 2, 8, 13
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU real graphs are captured: test_gpu.py")


def make(
    ops: Ops = REFERENCE,
    *,
    accumulation: int = 1,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    recompute: str = "none",
) -> TrainStep:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=16, dropout=dropout, bias=True), ops)
    model.to(device).compute_dtype = dtype
    model.recompute = recompute
    optimizer = FlatAdamW(
        model, ops, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.1, in_float32=accumulation > 1
    )
    scaler = LossScale(device, enabled=dtype == torch.float16)
    return TrainStep(model, optimizer, grad_clip=0.5, scaler=scaler)


def batch(step: int, accumulation: int, device: torch.device = CPU, size: int = B) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(V, (accumulation, size, T + 1), generator=generator).to(device)
    seeds = tuple(100 * step + micro for micro in range(accumulation))
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), seeds)


def train(
    step: Callable, accumulation: int, steps: int, device: torch.device = CPU, size: int = B
) -> list[tuple[float, float]]:
    results = [step(batch(i, accumulation, device, size), 1e-2 / (1 + i)) for i in range(steps)]
    return [(r.loss.item(), r.grad_norm.item()) for r in results]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replayed_step_is_the_eager_step(accumulation: int, dropout: float, dtype: torch.dtype) -> None:
    settings = dict(accumulation=accumulation, dropout=dropout, dtype=dtype)
    eager, captured = make(**settings), make(**settings)
    graphed = GraphedStep(captured, (accumulation, B, T), capture=tape)
    assert train(graphed, accumulation, 20) == train(eager, accumulation, 20)
    for one, other in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_again_finds_the_masks_of_this_replay(dtype: torch.dtype, recompute: str) -> None:
    settings = dict(accumulation=2, dropout=0.2, dtype=dtype)
    eager, captured = make(**settings), make(**settings, recompute=recompute)
    graphed = GraphedStep(captured, (2, B, T), capture=tape)
    assert train(graphed, 2, 10) == train(eager, 2, 10)


def test_a_batch_of_one() -> None:
    eager, captured = make(dropout=0.2), make(dropout=0.2)
    graphed = GraphedStep(captured, (1, 1, T), capture=tape)
    assert train(graphed, 1, 5, size=1) == train(eager, 1, 5, size=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "recompute", "steps"), [(1, "none", 4), (2, "none", 20), (1, "mlp", 4), (2, "block", 4)]
)
def test_with_fused_kernels(accumulation: int, recompute: str, steps: int) -> None:
    eager = make(FUSED, accumulation=accumulation, dropout=0.2)
    captured = make(FUSED, accumulation=accumulation, dropout=0.2, recompute=recompute)
    graphed = GraphedStep(captured, (accumulation, B, T), capture=tape)
    assert train(graphed, accumulation, steps) == train(eager, accumulation, steps)
    for one, other in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled(recompute: str, compiler: None) -> None:
    """By the compiler's front half: what its back half makes is no dispatched operation, and no tape records it."""
    torch.compiler.reset()
    eager, captured = make(dropout=0.2), make(dropout=0.2, recompute=recompute)
    captured.model = torch.compile(captured.model, backend="aot_eager")
    graphed = GraphedStep(captured, (1, B, T), capture=tape)
    for one, other in zip(train(graphed, 1, 10), train(eager, 1, 10), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_rate_that_is_a_python_number_is_frozen_and_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: an optimizer that takes its rate from the host trains on with the first one."""

    eager, captured = make(), make()
    update = captured.optimizer._adamw
    captured.optimizer._adamw = lambda param, grad, m, v, lr, *args, **kwargs: update(
        param, grad, m, v, torch.tensor(captured.optimizer.param_groups[0]["lr"]), *args, **kwargs
    )
    captured.optimizer.set_lr(5e-3)
    graphed = GraphedStep(captured, (1, B, T), capture=tape)
    losses, expected = train(graphed, 1, 20), train(eager, 1, 20)
    assert max(abs(a[0] - b[0]) for a, b in zip(losses, expected, strict=True)) > 1e-3


def test_capturing_leaves_everything_as_it_was() -> None:
    step = make(dropout=0.2, dtype=torch.float16)
    train(step, 1, 2)
    flat, optimizer = step.optimizer.flat, step.optimizer
    tensors = [flat.param, flat.compute, flat.exp_avg, flat.exp_avg_sq, flat.grad, optimizer.steps, step.scaler.scale]
    before, state = [x.clone() for x in tensors], torch.get_rng_state()
    GraphedStep(step, (1, B, T), capture=tape)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_shape_is_refused() -> None:
    graphed = GraphedStep(make(), (1, B, T), capture=tape)
    other = batch(0, 1)
    with pytest.raises(ValueError, match=r"x: got torch.int64 \(1, 8\), expected torch.int64 \(2, 8\), as captured"):
        graphed(Batch(other.x[:, :1], other.y[:, :1], other.seeds), 1e-3)
