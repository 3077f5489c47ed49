"""Small runs of the train command, in this process, and what they leave behind."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

import train.__main__ as command
from tests.train.jobs import make_data
from tests.train.test_kills import KILLED_JOB, records
from train import checkpoint
from train.data import Batch
from train.errors import UserError
from train.log import read_metrics
from train.step import StepResult, TrainStep

CONSTANT = dict(learning_rate=0.0, decay_lr=False)  # so no evaluation after the first is better

Happenings = dict[int, Callable[[TrainStep], None]]


class Stop(Exception):
    """Ends a run as a crash would."""


def run(out_dir: Path, at: Happenings | None = None, **settings) -> int:
    """`python -m train` on a small job; its exit status. A setting None is not named.

    at: step -> what happens in the middle of it. Steps are counted from the start of this process.
    """
    data = out_dir.parent / "data"
    if not data.exists():
        make_data(data)
    steps = iter(range(10**9))

    class Step(TrainStep):
        def __call__(self, batch: Batch, lr: float) -> StepResult:
            if happens := (at or {}).get(next(steps)):
                happens(self)
            return super().__call__(batch, lr)

    named = KILLED_JOB | {"out_dir": out_dir, "dataset": data, "max_iters": 6} | settings
    argv = ["train", *(f"--{key}={value}" for key, value in named.items() if value is not None)]
    torch.seed()  # a process of its own would not find the generator as the last run left it
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(command, "TrainStep", Step),
        mock.patch.object(command, "plot_run", return_value=None),  # dearer than all the rest
    ):
        return command.main()


def resume(out_dir: Path, at: Happenings | None = None, **settings) -> int:
    """Go on with the run in out_dir, naming nothing but `settings`."""
    return run(
        out_dir, at, **(dict.fromkeys([*KILLED_JOB, "dataset", "max_iters"]) | {"init_from": "resume"} | settings)
    )


def send(*numbers: int) -> Callable[[TrainStep], None]:
    """The process gets these signals."""

    def happens(step: TrainStep) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return happens


def poison(step: TrainStep) -> None:
    """A weight is lost, so the loss of this very step is not finite."""
    step.optimizer.flat.param.fill_(float("nan"))


def crash(step: TrainStep) -> None:
    raise Stop


def refusal(go: Callable[..., int], *args, status: int = 2, **settings) -> str:
    """The one line of a run that must fail."""
    with pytest.raises(UserError) as caught:
        go(*args, **settings)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logged(out_dir: Path, kind: str = "iter") -> dict[int, dict]:
    """iteration -> its record, without what a clock decides."""
    clocks = ("seconds", "mfu", "tokens_per_second")
    return {
        record["iter"]: {key: value for key, value in record.items() if key not in clocks}
        for record in read_metrics(out_dir / "metrics.jsonl")
        if record["kind"] == kind
    }


def iterations(out_dir: Path, kind: str) -> list[int]:
    """Where records of that kind were written, by every run in order."""
    return [record["iter"] for record in records(out_dir) if record["kind"] == kind]


def last(out_dir: Path) -> dict:
    return checkpoint.load(out_dir / "ckpt.pt")
