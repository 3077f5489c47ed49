"""Runs of several processes, by torchrun on the CPU, to compare with the same run of one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.jobs import ROOT, arguments
from train.__main__ import main
from train.log import read_metrics

RUN = dict(
    gradient_accumulation_steps=4,
    max_iters=6,
    eval_interval=3,
    eval_iters=5,  # not divisible by any number of processes here
    log_interval=1,
)


def start(processes: int, *command: str) -> subprocess.Popen:
    """Start torchrun in the current folder, in its own session, so that the test can end all its processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(torchrun: subprocess.Popen, timeout: float = 300) -> tuple[str, str]:
    """Wait for torchrun. Returns (stdout, stderr). If it hangs, it is killed and the test fails."""
    try:
        return torchrun.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(torchrun.pid, signal.SIGKILL)
        out, err = torchrun.communicate()
        pytest.fail(f"torchrun hangs\n{out}\n{err}")


def train_alone(monkeypatch, **changes) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments(**RUN | changes)])
    assert main() == 0


def train_together(processes: int, **changes) -> str:
    torchrun = start(processes, "-m", "train", *arguments(**RUN | changes))
    out, err = finish(torchrun)
    assert torchrun.returncode == 0, out + err
    return out


def records(out_dir: str | Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(Path(out_dir) / "metrics.jsonl") if record["kind"] == kind]


def assert_same_losses(a: str, b: str) -> None:
    for kind, keys in (("iter", ("loss", "grad_norm")), ("eval", ("train_loss", "val_loss"))):
        ours, theirs = records(a, kind), records(b, kind)
        assert [r["iter"] for r in ours] == [r["iter"] for r in theirs]
        assert len(ours) > 1
        for x, y in zip(ours, theirs, strict=True):
            for key in keys:
                assert x[key] == pytest.approx(y[key], rel=1e-5), (kind, x["iter"], key)
