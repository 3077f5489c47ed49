"""Small runs of the train command, in this process, and the files that they leave."""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch

import train.__main__ as command
from tests.train.jobs import JOB, make_data
from train import checkpoint, memory
from train.data import Batch
from train.dryrun import dry_run
from train.errors import UserError
from train.log import read_metrics
from train.sample import sample_text
from train.step import StepResult, TrainStep

# With dropout and accumulation, so that random state must survive too. A save every other iteration.
KILLED_JOB = JOB | dict(
    dropout=0.1,
    gradient_accumulation_steps=2,
    lr_decay_iters=1000,
    eval_interval=2,
    eval_iters=2,
    log_interval=1,
)
CONSTANT = dict(learning_rate=0.0, decay_lr=False)  # no evaluation after the first is better

Happenings = dict[int, Callable[[TrainStep], None]]
KNOWN = functools.cache(dry_run)  # it takes half of a small run's time, and depends on the job alone


def short_sample(model: object, tokenizer: object, config: object, generator: object) -> Iterator[str]:
    return sample_text(model, tokenizer, dataclasses.replace(config, max_new_tokens=3), generator)


class Stop(Exception):
    """Ends a run like a crash."""


def run(out_dir: Path, at: Happenings | None = None, **settings) -> int:
    """`python -m train` on a small job; returns the exit status. A setting that is None is left out.

    at: step -> a function that is called when it begins. Steps are counted from the start of this run.
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
    torch.seed()  # a new process would not have the last run's generator state
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(command, "TrainStep", Step),
        mock.patch.object(command, "plot_run", return_value=None),  # it takes longer than all the rest
        mock.patch.object(command, "sample_text", short_sample),
        mock.patch.object(memory, "dry_run", KNOWN if memory.dry_run is dry_run else memory.dry_run),
    ):
        return command.main()


def resume(out_dir: Path, at: Happenings | None = None, **settings) -> int:
    """Resume the run in out_dir, with only `settings` on the command line."""
    return run(
        out_dir, at, **(dict.fromkeys([*KILLED_JOB, "dataset", "max_iters"]) | {"init_from": "resume"} | settings)
    )


def send(*numbers: int) -> Callable[[TrainStep], None]:
    """Send these signals to this process."""

    def happens(step: TrainStep) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return happens


def poison(step: TrainStep) -> None:
    """Make the weights that the model reads NaN, so that the loss of this step is not finite."""
    flat = step.optimizer.flat
    (flat.param if flat.compute is None else flat.compute).fill_(float("nan"))


def crash(step: TrainStep) -> None:
    raise Stop


def refusal(go: Callable[..., int], *args, status: int = 2, **settings) -> str:
    """The error line of a run that must fail."""
    with pytest.raises(UserError) as caught:
        go(*args, **settings)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logged(out_dir: Path, kind: str = "iter") -> dict[int, dict]:
    """iteration -> its record, without times."""
    clocks = ("seconds", "mfu", "tokens_per_second")
    return {
        record["iter"]: {key: value for key, value in record.items() if key not in clocks}
        for record in read_metrics(out_dir / "metrics.jsonl")
        if record["kind"] == kind
    }


def records(out_dir: Path) -> list[dict]:
    """Every whole line of metrics.jsonl. A kill may cut the last line of a run."""
    found, content = [], b""
    with suppress(FileNotFoundError):  # none yet, or just moved aside
        content = (out_dir / "metrics.jsonl").read_bytes()
    for line in content.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def iterations(out_dir: Path, kind: str) -> list[int]:
    """The iterations of all records of this kind, in order, of all runs."""
    return [record["iter"] for record in records(out_dir) if record["kind"] == kind]


def last(out_dir: Path) -> dict:
    return checkpoint.load(out_dir / "ckpt.pt")
