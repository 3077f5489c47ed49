"""GraphedStep, with a tape as its capture: the losses and weights are the eager step's, to the bit."""

from collections.abc import Callable, Iterable
from functools import partial
from unittest import mock

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.capture import WARM_UP
from kernels.launch import INTERPRETED
from model import GPT, GPTConfig, Precision
from tests.train.tape import Tape, tape
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


def everything(step: TrainStep) -> list[torch.Tensor]:
    """All tensors that a capture must leave unchanged."""
    scaler = step.scaler
    tensors = [*step.optimizer.state_tensors(), scaler.scale, scaler.growth_tracker, step.loss, step.grad_norm]
    return [x.clone() for x in (*tensors, *step.model.parameters(), torch.get_rng_state())]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("ops", "dtype", "accumulation", "recompute"),
    [
        (REFERENCE, torch.float32, 3, "none"),
        (REFERENCE, torch.bfloat16, 1, "none"),
        (REFERENCE, torch.float16, 1, "mlp"),
        (REFERENCE, torch.bfloat16, 2, "block"),
        pytest.param(FUSED, torch.float32, 1, "mlp", marks=pytest.mark.slow),
        pytest.param(FUSED, torch.bfloat16, 2, "block", marks=pytest.mark.slow),
    ],
)
def test_a_replayed_step_is_the_eager_step(ops: Ops, dtype: torch.dtype, accumulation: int, recompute: str) -> None:
    """What is computed again finds the masks of this replay. The capture, in the middle of a run, changes nothing."""
    settings = dict(dropout=0.2, dtype=dtype, accumulation=accumulation)
    eager, captured = make(ops, **settings), make(ops, **settings, recompute=recompute)
    for step in (eager, captured):  # so that moments and step count are not 0
        train(step, accumulation, 2)
    before = everything(captured)
    graphed = GraphedStep(captured, (accumulation, B, T), Evaluation(captured.model), capture=tape)
    assert_same(everything(captured), before)
    steps = 3 if ops is FUSED else 20
    assert train(graphed, accumulation, steps) == train(eager, accumulation, steps)
    assert_same(everything(captured), everything(eager))


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
        assert torch.equal(torch.stack(graphed(batch(i, 1), 1e-2)), torch.stack(twin(batch(i, 1), 1e-2)))


def test_a_failed_capture_is_one_line_and_leaves_no_trace() -> None:
    """It fails after the warm-ups, as a real capture could."""
    step, twin = (make(dropout=0.2, dtype=torch.float16) for _ in range(2))
    train(step, 1, 2), train(twin, 1, 2)
    before = everything(step)

    def capture(tasks: list[Task]) -> list[Work]:
        tape(tasks)
        tasks[0].run()
        raise RuntimeError("\noperation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    with pytest.raises(UserError) as caught:
        GraphedStep(step, (1, B, T), capture=capture)
    assert str(caught.value) == (
        "cuda_graphs: got True, but the step could not be captured: operation not permitted when stream is capturing; "
        "--no-cuda_graphs goes on without"
    )
    assert_same(everything(step), before)
    assert train(step, 1, 3) == train(twin, 1, 3)


def test_what_a_capture_keeps_aside_does_not_grow_with_the_model() -> None:
    """Not counting the step's own tensors: the step does not run here."""
    sizes = []
    for width in (16, 64):
        step = make(n_embd=width)
        with Tape() as made:
            GraphedStep(step, (1, B, T), Evaluation(step.model), capture=lambda tasks: [task.run for task in tasks])
        sizes.append(sum(x.nbytes for *_, tensors in made.calls for _, x in tensors))
    assert 0 < sizes[0] == sizes[1]


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
    step = make(accumulation=2)
    graphed = GraphedStep(step, (2, B, T), Evaluation(step.model), capture=tape)
    smaller, fewer = batch(0, 2, size=1), batch(0, 1)
    refused = r"x: got torch.int64 \(1, 8\), expected torch.int64 \(2, 8\), as captured"
    for call in (lambda: graphed(smaller, 1e-3), lambda: graphed.evaluation([smaller])):
        with pytest.raises(ValueError, match=refused):
            call()
    with pytest.raises(ValueError, match=r"batch: got 1 micro-steps, expected 2, as captured"):
        graphed(fewer, 1e-3)


def test_all_is_warmed_up_before_the_first_capture_and_captured_in_one_pool() -> None:
    log, names = [], ("one", "two")
    tasks = [Task(partial(log.append, name), prepare=partial(log.append, f"before {name}")) for name in names]
    used = ("Stream", "current_stream", "graph_pool_handle", "CUDAGraph", "stream", "graph")
    with mock.patch.multiple(torch.cuda, **dict.fromkeys(used, mock.DEFAULT)) as cuda:
        cuda["graph"].side_effect = lambda *args, **how: log.append("capture") or mock.DEFAULT
        replays = cuda_graphs(tasks)
    warmed = [entry for name in names for entry in [f"before {name}", name] * WARM_UP]
    assert log == [*warmed, "capture", "one", "capture", "two"]
    side, pool, graph = (cuda[name].return_value for name in ("Stream", "graph_pool_handle", "CUDAGraph"))
    assert cuda["stream"].mock_calls[0] == mock.call(side)  # the warm-ups' too
    captured = mock.call(graph, pool=pool, stream=side, capture_error_mode="thread_local")
    assert cuda["graph"].call_args_list == [captured] * 2
    assert replays == [graph.replay] * 2
