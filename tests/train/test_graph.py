"""GraphedStep, with a tape as its capture: the losses and weights are the eager step's, to the bit."""

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.launch import INTERPRETED
from tests.train.steps import B, T, assert_same, batch, evaluated, everything, make, train
from tests.train.tape import tape
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
    """And a replayed evaluation the eager one, which changes nothing. What is computed again finds the masks of this
    replay. The capture, in the middle of a run, changes nothing either."""
    settings = dict(dropout=0.2, dtype=dtype, accumulation=accumulation)
    eager, captured = make(ops, **settings), make(ops, **settings, recompute=recompute)
    for step in (eager, captured):  # so that moments and step count are not 0
        train(step, accumulation, 2)
    before = everything(captured)
    graphed = GraphedStep(captured, (B, T), evaluates=True, capture=tape)
    assert_same(everything(captured), before)
    for i in range(3 if ops is FUSED else 5):
        assert graphed(batch(i, accumulation), 1e-2) == eager(batch(i, accumulation), 1e-2)
        batches = [batch(100 + 10 * i + k) for k in range(2)]
        losses = evaluated(graphed, batches)
        assert losses == evaluated(captured, batches)
        assert losses[0] != losses[1]
    assert_same(everything(captured), everything(eager))


def test_a_failed_capture_is_one_line_and_leaves_no_trace() -> None:
    """It fails after the warm-ups, as a real capture could."""
    step = make(dropout=0.2, dtype=torch.float16, accumulation=2)
    train(step, 2, 2)
    before = everything(step)

    def capture(tasks: list[Task]) -> list[Work]:
        tape(tasks)
        tasks[0].run()
        raise RuntimeError("\noperation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    with pytest.raises(UserError) as caught:
        GraphedStep(step, (B, T), capture=capture)
    assert str(caught.value) == (
        "cuda_graphs: got True, but the step could not be captured: operation not permitted when stream is capturing; "
        "--no-cuda_graphs goes on without"
    )
    assert_same(everything(step), before)


def test_another_shape_or_dtype_is_refused() -> None:
    graphed, good = GraphedStep(make(accumulation=2), (B, T), capture=tape), batch(0, 2)
    for given, message in (
        (batch(0, 2, size=1), r"x: got torch.int64 \(1, 8\), expected torch.int64 \(2, 8\), as captured"),
        (good._replace(y=good.y.int()), r"y: got torch.int32 \(2, 8\), expected torch.int64 \(2, 8\), as captured"),
    ):
        with pytest.raises(ValueError, match=message):
            graphed(given, 1e-3)
