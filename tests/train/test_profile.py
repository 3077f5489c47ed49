"""--profile: a run that shows where its time goes, with the same results as without."""

import json
import re
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

import train.__main__ as command
from model.pretrained import from_checkpoint
from model.work import duration, step_work
from tests.train.runs import last, logged, poison, refusal, resume, run, send
from train.config import TrainConfig
from train.plan import choose_graphs
from train.profile import WINDOW, profiled_iterations

RATES = (1e9, 1e8)  # FLOP/s, bytes/s
PROFILED = dict(profile=True, eval_interval=50, max_iters=12)


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed ones, because measuring takes a second."""
    monkeypatch.setattr("train.profile.measure_flops", lambda device, dtype: RATES[0])
    monkeypatch.setattr("train.profile.measure_bandwidth", lambda device: RATES[1])


def named(out_dir: Path, category: str) -> list[str]:
    """The names of a trace's events of one category, in order."""
    events = json.loads((out_dir / "trace.json").read_text())["traceEvents"]
    return [e["name"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e.get("cat") == category]


def test_which_iterations() -> None:
    for arguments, expected in (
        ((37, 100, 2000, 1), range(42, 47)),  # after a warm-up
        ((0, 100, 7, 1), range(8, 13)),  # no evaluation among them
        ((0, 100, 5, 1), range(6, 10)),
        ((0, 100, 10, 1), range(5, 10)),
        ((0, 7, 2000, 1), range(5, 7)),  # fewer in a short run
        ((0, 100, 2000, 20), range(5, 7)),  # fewer if steps are long
        ((0, 100, 2000, 41), range(5, 6)),
        ((0, 100, 1, 1), range(0)),  # none where every iteration is evaluated
    ):
        assert profiled_iterations(*arguments) == expected, arguments


def test_a_run_shows_where_its_time_goes_and_is_the_same_to_the_bit(tmp_path: Path, capsys) -> None:
    """With an evaluation every four iterations."""
    out_dir, plain = tmp_path / "out", tmp_path / "plain"
    for folder, profiled in ((plain, False), (out_dir, True)):
        run(folder, **PROFILED | {"profile": profiled, "eval_interval": 4}, dtype="bfloat16")
    assert not (plain / "trace.json").exists()
    for kind in ("iter", "eval"):
        assert logged(out_dir, kind) == logged(plain, kind)
    assert all(torch.equal(last(out_dir)["model"][name], tensor) for name, tensor in last(plain)["model"].items())

    output = capsys.readouterr().out
    assert "profile: iterations 5 to 7 run under the profiler" in output
    assert "floors are for 0.001 TFLOP/s in a matmul, 0.1 GB/s in a copy, as measured" in output
    assert f"trace: {out_dir / 'trace.json'}" in output
    found = re.findall(r"^(\S.{23})((?: +[\d.]+%?)+)$", output, re.MULTILINE)
    rows = {name.strip(): [float(number.rstrip("%")) for number in numbers.split()] for name, numbers in found}
    total = rows.pop("total")
    for row in ("matmuls", "LayerNorm forward", "LayerNorm backward", "GELU backward", "optimizer", "idle"):
        assert rows[row][0] > 0, row
    assert sum(row[0] for row in rows.values()) == pytest.approx(total[0], abs=0.001 * len(rows))
    config, shape = last(out_dir)["config"], from_checkpoint(last(out_dir)).config
    micro_steps = config["gradient_accumulation_steps"]
    work = step_work(shape, config["batch_size"], accumulation=micro_steps, compute=2, stream=4, gradients=4)
    assert total[2] == pytest.approx(1e3 * duration(work.items(), *RATES), abs=0.001 * len(rows))
    assert named(out_dir, "user_annotation") == [WINDOW, "iteration 5", "iteration 6", "iteration 7"]
    assert named(out_dir, "cpu_op").count("aten::nll_loss_forward") == 3 * 2  # micro-steps


def test_a_run_that_is_stopped_or_fails_amidst_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A process that exits while the profiler runs ends with a segmentation fault."""
    none = "profile: none; the run ended before iterations 5 to 9 were done"
    assert "loss: got nan" in refusal(run, tmp_path / "bad", {7: poison}, status=1, **PROFILED)
    assert none in capsys.readouterr().out
    assert not torch.autograd.profiler._is_profiler_enabled
    assert run(tmp_path / "out", at={7: send(signal.SIGTERM)}, **PROFILED) == 128 + signal.SIGTERM
    assert none in capsys.readouterr().out
    assert not (tmp_path / "out" / "trace.json").exists()
    # Resumed with the same setting: after its own warm-up, as many as the run still has.
    resume(tmp_path / "out", max_iters=15)
    output = capsys.readouterr().out
    assert "profile: iterations 13 to 14 run" in output
    assert "profile: 2 steps of" in output
    assert named(tmp_path / "out", "user_annotation")[1:] == ["iteration 13", "iteration 14"]


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path: Path, capsys, monkeypatch) -> None:
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("train.profile.replace_together", full)
    assert run(tmp_path / "out", **PROFILED) == 0
    assert "trace.json could not be written: [Errno 28] No space left on device" in capsys.readouterr().out
    assert last(tmp_path / "out")["iter_num"] == 12
    assert not list(tmp_path.glob("out/.staging-*"))


def test_no_graphs_where_cuda_would_misread_them(monkeypatch) -> None:
    def graphs(where: str = "cuda", sharded: bool = False, cuda: str = "13.0", **settings: bool) -> tuple[bool, str]:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        made, said = choose_graphs(TrainConfig(**settings), torch.device(where), sharded=sharded)
        return made, said.split(",")[0]

    assert graphs(profile=True) == (False, "profile: this run makes no CUDA graphs")
    assert graphs(profile=True, cuda="12.8") == graphs() == (True, "")
    for without in (graphs("cpu"), graphs(sharded=True), graphs(cuda_graphs=False), graphs(eval_only=True)):
        assert without == (False, "")


def test_mps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "local_device", lambda device, world: torch.device("mps"))
    assert refusal(run, tmp_path / "out", **PROFILED) == (
        "profile: got True, expected False on mps, whose kernels torch's profiler does not see"
    )
