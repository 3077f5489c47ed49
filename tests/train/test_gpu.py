"""On a CUDA device: the run that the CPU tests prove, once more where it matters. `pytest -m gpu`"""

from pathlib import Path

import pytest
import torch

from tests.train.runs import last, logged, resume, run
from tests.train.test_golden import TRACES, golden_batch, golden_model, our_adamw, recorded, relative
from train.data import Batch
from train.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", TRACES)
def test_the_recorded_losses(name: str, compile: bool) -> None:
    case = TRACES[name]
    model = golden_model(case).cuda()
    step = TrainStep(torch.compile(model) if compile else model, our_adamw(model, case), grad_clip=case["grad_clip"])
    losses = []
    for i in range(len(case["loss"])):
        batch = golden_batch(case, i)
        losses.append(step(Batch(batch.x.cuda(), batch.y.cuda(), batch.seeds), case["learning_rate"]).loss.item())
    assert relative(torch.tensor(losses, dtype=torch.float64), recorded(case).loss) < 1e-4  # other orders of summation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_run_learns_what_the_cpu_learns(tmp_path: Path, dtype: str, compile: bool) -> None:
    settings = dict(dropout=0.0, max_iters=12)
    run(tmp_path / "cpu", **settings)
    run(tmp_path / "gpu", **settings, device="cuda", dtype=dtype, compile=compile)
    expected, got = logged(tmp_path / "cpu", "eval"), logged(tmp_path / "gpu", "eval")
    tolerance = 1e-3 if dtype == "float32" else 2e-2  # TF32, and two orders of magnitude more in half precision
    for iteration, record in expected.items():
        assert got[iteration]["val_loss"] == pytest.approx(record["val_loss"], rel=tolerance)


@pytest.mark.parametrize("compile", [False, True])
def test_resume_goes_on_where_the_run_was(tmp_path: Path, compile: bool) -> None:
    settings = dict(device="cuda", dtype="bfloat16", compile=compile)
    run(tmp_path / "whole", max_iters=12, **settings)
    run(tmp_path / "halves", max_iters=6, **settings)
    resume(tmp_path / "halves", max_iters=12)
    assert last(tmp_path / "halves")["iter_num"] == 12
    expected, got = logged(tmp_path / "whole"), logged(tmp_path / "halves")
    for iteration, record in expected.items():  # the embedding's gradient is summed in no fixed order
        assert got[iteration]["loss"] == pytest.approx(record["loss"], rel=2e-3)
