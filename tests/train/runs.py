"""Small runs of the train command, in this process, and what they leave behind."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import train.__main__ as command
from tests.train.test_kills import JOB, make_data, records
from train import checkpoint
from train.data import Batch
from train.errors import UserError
from train.log import read_metrics
from train.step import StepResult, TrainStep


class Stop(Exception):
    """Ends a run as a crash would."""


def run(out_dir: Path, at: dict[int, Callable[[], None]] | None = None, **settings) -> int:
    """`python -m train` on a small job; its exit status. A setting None is not named.

    at: step -> what happens in the middle of it. Steps are counted from the start of this process.
    """
    data = out_dir.parent / "data"
    if not data.exists():
        make_data(data)
    steps = iter(range(10**9))

    class Step(TrainStep):
        def __call__(self, batch: Batch, lr: float) -> StepResult:
            (at or {}).get(next(steps), lambda: None)()
            return super().__call__(batch, lr)

    named = JOB | {"out_dir": out_dir, "dataset": data, "max_iters": 6} | settings
    argv = ["train", *(f"--{key}={value}" for key, value in named.items() if value is not None)]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(command, "TrainStep", Step):
        return command.main()


def resume(out_dir: Path, at: dict[int, Callable[[], None]] | None = None, **settings) -> int:
    """Go on with the run in out_dir, naming nothing but `settings`."""
    return run(out_dir, at, **(dict.fromkeys([*JOB, "dataset", "max_iters"]) | {"init_from": "resume"} | settings))


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def crash() -> None:
    raise Stop


def refusal(go: Callable[..., int], *args, status: int = 2, **settings) -> str:
    """The one line of a run that must fail."""
    try:
        ended = go(*args, **settings)
    except UserError as error:
        assert error.status == status
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError(f"not refused, but ended with {ended}")


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
