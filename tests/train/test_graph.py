"""GraphedStep, with a tape as its capture: the losses and weights are the eager step's, to the bit."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import FUSED, REFERENCE, Ops
from kernels.capture import WARM_UP
from kernels.launch import INTERPRETED
from model import GPT, GPTConfig, Precision
from tests.train.tape import storage, tape
from train.data import Batch
from train.errors import UserError
from train.graph import GraphedStep, Task, Work, cuda_graphs
from train.optim import FlatAdamW, LossScale
from train.step import Evaluation, TrainStep

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
    n_embd: int = 16,
    attention: str = "auto",
) -> TrainStep:
    torch.manual_seed(0)
    shape = GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=n_embd, dropout=dropout, bias=True)
    model = GPT(shape, ops, precision=Precision(dtype), attention=attention, recompute=recompute).to(device)
    optimizer = FlatAdamW(model, ops, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.1, several=accumulation > 1)
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


@pytest.mark.parametrize(
    ("dtype", "accumulation", "dropout"),
    [(torch.float32, 3, 0.2), (torch.bfloat16, 1, 0.2), (torch.bfloat16, 3, 0.0), (torch.float16, 1, 0.2)],
)
def test_a_replayed_step_is_the_eager_step(accumulation: int, dropout: float, dtype: torch.dtype) -> None:
    settings = dict(accumulation=accumulation, dropout=dropout, dtype=dtype)
    eager, captured = make(**settings), make(**settings)
    graphed = GraphedStep(captured, (accumulation, B, T), capture=tape)
    assert train(graphed, accumulation, 20) == train(eager, accumulation, 20)
    for one, other in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_what_is_computed_again_finds_the_masks_of_this_replay(recompute: str) -> None:
    settings = dict(accumulation=2, dropout=0.2, dtype=torch.bfloat16)
    eager, captured = make(**settings), make(**settings, recompute=recompute)
    graphed = GraphedStep(captured, (2, B, T), capture=tape)
    assert train(graphed, 2, 10) == train(eager, 2, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation", "recompute"), [(1, "mlp"), (2, "none"), (2, "block")])
def test_with_fused_kernels(accumulation: int, recompute: str) -> None:
    eager = make(FUSED, accumulation=accumulation, dropout=0.2)
    captured = make(FUSED, accumulation=accumulation, dropout=0.2, recompute=recompute)
    graphed = GraphedStep(captured, (accumulation, B, T), capture=tape)
    assert train(graphed, accumulation, 4) == train(eager, accumulation, 4)
    for one, other in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_replayed_evaluation_is_the_eager_evaluation() -> None:
    """At several points of training. Training is not changed by it."""
    step, twin = (make(dropout=0.2, dtype=torch.bfloat16) for _ in range(2))
    eager = Evaluation(step.model)
    graphed = GraphedStep(step, (1, B, T), eager, capture=tape)
    for i in range(4):
        batches = [batch(100 + 10 * i + k, 1) for k in range(3)]
        losses = graphed.evaluation(batches)
        assert losses.dtype == torch.float32
        assert torch.equal(losses, eager(batches))
        assert len(set(losses.tolist())) == 3
        assert step.model.training
        one, other = graphed(batch(i, 1), 1e-2), twin(batch(i, 1), 1e-2)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.grad_norm, other.grad_norm)


def test_a_rate_that_is_a_python_number_is_frozen_and_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of these tests: an optimizer that reads its rate on the host keeps the first rate."""

    eager, captured = make(), make()
    update = captured.optimizer._adamw
    captured.optimizer._adamw = lambda param, grad, m, v, lr, *args, **kwargs: update(
        param, grad, m, v, torch.tensor(captured.optimizer.param_groups[0]["lr"]), *args, **kwargs
    )
    captured.optimizer.set_lr(5e-3)
    graphed = GraphedStep(captured, (1, B, T), capture=tape)
    losses, expected = train(graphed, 1, 20), train(eager, 1, 20)
    assert max(abs(a[0] - b[0]) for a, b in zip(losses, expected, strict=True)) > 1e-3


def everything(step: TrainStep) -> list[torch.Tensor]:
    """All tensors that a capture must leave unchanged."""
    tensors = [
        *step.optimizer.state_tensors(),
        step.scaler.scale,
        step.scaler.growth_tracker,
        step.loss,
        step.grad_norm,
    ]
    return [x.clone() for x in (*tensors, *step.model.parameters(), torch.get_rng_state())]


@pytest.mark.parametrize(
    ("dtype", "accumulation", "ops"),
    [
        (torch.float32, 2, REFERENCE),
        (torch.bfloat16, 1, REFERENCE),
        (torch.float16, 1, REFERENCE),
        pytest.param(torch.bfloat16, 1, FUSED, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 2, FUSED, marks=pytest.mark.slow),
    ],
)
def test_capturing_leaves_everything_as_it_was(dtype: torch.dtype, accumulation: int, ops: Ops) -> None:
    step = make(ops, dropout=0.2, dtype=dtype, accumulation=accumulation)
    train(step, accumulation, 2)  # so that moments and step count are not 0
    before = everything(step)
    GraphedStep(step, (accumulation, B, T), Evaluation(step.model), capture=tape)
    assert all(torch.equal(x, y) for x, y in zip(everything(step), before, strict=True))


def test_a_resumed_run_is_captured_as_it_stands() -> None:
    first, resumed = make(dtype=torch.bfloat16), make(dtype=torch.bfloat16)
    train(first, 1, 3)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.flat.sync()
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    graphed = GraphedStep(resumed, (1, B, T), capture=tape)
    assert train(graphed, 1, 5) == train(first, 1, 5)


def test_a_failed_capture_is_one_line_and_leaves_no_trace() -> None:
    """It fails after the warm-ups, as a real capture could."""
    step, twin = (make(dropout=0.2, dtype=torch.float16) for _ in range(2))
    train(step, 1, 2), train(twin, 1, 2)
    before = everything(step)

    def capture(tasks: list[Task]) -> list[Work]:
        for task in tasks:
            task.prepare()
            task.run()
        tasks[0].run()
        raise RuntimeError("\noperation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    with pytest.raises(UserError) as caught:
        GraphedStep(step, (1, B, T), capture=capture)
    assert str(caught.value) == (
        "cuda_graphs: got True, but the step could not be captured: operation not permitted when stream is capturing; "
        "--no-cuda_graphs goes on without"
    )
    assert all(torch.equal(x, y) for x, y in zip(everything(step), before, strict=True))
    assert train(step, 1, 3) == train(twin, 1, 3)


class Allocations(TorchDispatchMode):
    """Counts the bytes of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        inputs = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        new = {storage(x): x for x in tree_leaves(results) if isinstance(x, torch.Tensor)}
        self.bytes += sum(x.untyped_storage().nbytes() for key, x in new.items() if key not in inputs)
        return results


def test_what_a_capture_keeps_aside_does_not_grow_with_the_model() -> None:
    """Not counting the step's own allocations: the step does not run here."""
    counted = []
    for width in (16, 64):
        step = make(n_embd=width)
        with Allocations() as allocations:
            GraphedStep(step, (1, B, T), Evaluation(step.model), capture=lambda tasks: [task.run for task in tasks])
        counted.append(allocations.bytes)
    assert 0 < counted[0] == counted[1]


def marked(leaves: Iterable[torch.Tensor], *, mark: bool = False) -> list[bool]:
    """Whether each leaf's AccumulateGrad node was marked before. Then it was never freed."""
    with torch.enable_grad():  # hooks run without grad mode
        nodes = [leaf.view_as(leaf).grad_fn.next_functions[0][0] for leaf in leaves]
    found = ["mark" in node.metadata for node in nodes]
    for node in nodes if mark else ():
        node.metadata["mark"] = True
    return found


def test_a_capture_meets_no_node_of_autograd_from_before() -> None:
    """Such a node remembers another stream. Here a cycle of unused objects holds the loss that keeps the nodes."""
    step = make()
    leaves = step.optimizer.flat.leaves
    dropped = [step.model(*(part[0] for part in batch(0, 1)[:2]))[1]]
    marked(leaves, mark=True)
    assert all(marked(leaves))
    dropped.append(dropped)
    del dropped
    seen = []

    def capture(tasks: list[Task]) -> list[Work]:
        seen.extend(marked(leaves))
        return tape(tasks)

    GraphedStep(step, (1, B, T), capture=capture)
    assert seen == [False] * len(leaves)


def test_another_shape_is_refused() -> None:
    step = make()
    graphed = GraphedStep(step, (1, B, T), Evaluation(step.model), capture=tape)
    other = batch(0, 1)
    smaller = Batch(other.x[:, :1], other.y[:, :1], other.seeds)
    for call in (lambda: graphed(smaller, 1e-3), lambda: graphed.evaluation([smaller])):
        with pytest.raises(
            ValueError, match=r"x: got torch.int64 \(1, 8\), expected torch.int64 \(2, 8\), as captured"
        ):
            call()


class Cuda:
    """Replaces what `cuda_graphs` uses of torch.cuda, and records the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ends_badly: bool = False) -> None:
        self.log: list[str] = []
        self.stream, self.pools, self.ends_badly = "default", [], ends_badly
        cuda = dict(
            Stream=lambda: mock.Mock(name="side"),
            current_stream=lambda: mock.Mock(name="default"),
            graph_pool_handle=lambda: (0, len(self.pools)),
            CUDAGraph=lambda: mock.Mock(replay=lambda: self.log.append("replay")),
            stream=self.on,
            graph=self.capture,
        )
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def on(self, stream: mock.Mock) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def capture(self, graph: mock.Mock, *, pool: tuple[int, int], stream: mock.Mock, **how: str) -> Iterator[None]:
        """Like torch's: if its end fails, the current stream is not restored."""
        assert how == {"capture_error_mode": "thread_local"}
        assert self.stream is stream  # the stream of the warm-ups
        self.pools.append(pool)
        self.log.append("capture")
        try:
            yield
        finally:
            if self.ends_badly:
                raise RuntimeError("operation failed due to a previous error during capture")


def test_all_is_warmed_up_before_the_first_capture_and_captured_in_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    names = ("one", "two")
    tasks = [
        Task(functools.partial(cuda.log.append, name), functools.partial(cuda.log.append, f"before {name}"))
        for name in names
    ]
    replays = cuda_graphs(tasks)
    warmed = [entry for name in names for entry in [f"before {name}", name] * WARM_UP]
    assert cuda.log == [*warmed, "capture", "one", "capture", "two"]
    assert cuda.pools == [(0, 0), (0, 0)]
    assert cuda.stream == "default"
    for replay in replays:
        replay()
    assert cuda.log[-2:] == ["replay", "replay"]
