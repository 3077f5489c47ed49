"""GraphedStep, with a tape as its capture: the losses and weights are the eager step's, to the bit."""

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.launch import INTERPRETED
from tests.train.steps import B, T, assert_same, batch, everything, make, train
from tests.train.tape import Tape, tape
from train.errors import UserError
from train.graph import GraphedStep, Task, Work

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU real graphs are captured: test_gpu.py")


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
    graphed = GraphedStep(captured, (accumulation, B, T), evaluates=True, capture=tape)
    assert_same(everything(captured), before)
    steps = 3 if ops is FUSED else 20
    assert train(graphed, accumulation, steps) == train(eager, accumulation, steps)
    assert_same(everything(captured), everything(eager))


def test_a_replayed_evaluation_is_the_eager_evaluation() -> None:
    """At several points of training. Training is not changed by it."""
    step, twin = (make(dropout=0.2, dtype=torch.bfloat16) for _ in range(2))
    graphed = GraphedStep(step, (1, B, T), evaluates=True, capture=tape)
    for i in range(4):
        batches = [batch(100 + 10 * i + k) for k in range(3)]
        losses = graphed.evaluation(batches)
        assert losses.dtype == torch.float32
        assert torch.equal(losses, step.evaluation(batches))
        assert len(set(losses.tolist())) == 3
        assert step.model.training
        assert torch.equal(torch.stack(graphed(batch(i), 1e-2)), torch.stack(twin(batch(i), 1e-2)))


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
            GraphedStep(step, (1, B, T), evaluates=True, capture=lambda tasks: [task.run for task in tasks])
        sizes.append(sum(x.nbytes for *_, tensors in made.calls for _, x in tensors))
    assert 0 < sizes[0] == sizes[1]


def test_another_shape_is_refused() -> None:
    step = make(accumulation=2)
    graphed = GraphedStep(step, (2, B, T), evaluates=True, capture=tape)
    smaller, fewer = batch(0, 2, size=1), batch(0, 1)
    refused = r"x: got torch.int64 \(1, 8\), expected torch.int64 \(2, 8\), as captured"
    for call in (lambda: graphed(smaller, 1e-3), lambda: graphed.evaluation([smaller])):
        with pytest.raises(ValueError, match=refused):
            call()
    with pytest.raises(ValueError, match=r"batch: got 1 micro-steps, expected 2, as captured"):
        graphed(fewer, 1e-3)
