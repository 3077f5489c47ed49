"""Where a run's numbers go: the console, out_dir/metrics.jsonl, and on request wandb and TensorBoard.

metrics.jsonl holds one JSON object a line, written as it happens:

    {"kind": "run",  "iter", "resumed", "time", "settings", "device", "parameters", "torch", "triton"}
    {"kind": "iter", "iter", "loss", "seconds", "mfu", "lr", "grad_norm", "tokens_per_second"}
    {"kind": "eval", "iter", "train_loss", "val_loss", "lr", "seconds"}
    {"kind": "save", "iter", "seconds"}

A "run" is written at every start. The seconds of an "iter" are the mean of one iteration since the last such
line; the others' are what evaluating or saving took. A number that is not finite is null. Lines are only appended,
also by a resumed run, and a killed run leaves at most one partial line at the end. `read_metrics` handles both.
"""

import dataclasses
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.errors import UserError, complain, drop_output, first_line, safe, shown
from train.files import open_regular

METRICS = "metrics.jsonl"

Record = dict[str, Any]


def say(line: str) -> None:
    """Print one line at once, also through a pipe. If the console fails, the run goes on; stderr says so, once."""
    try:
        print(safe(line), flush=True)
    except (OSError, ValueError) as error:  # a full disk, a reader or a terminal that has gone, a closed file
        drop_output()
        reason = getattr(error, "strerror", None) or first_line(error)
        complain(f"console: cannot be written ({reason}); the run goes on without it")


class RunLog:
    """The log of a run, kept by one rank.

    resume_iter: the iteration that a resumed run goes on from, None for a new run. UserError if out_dir cannot be
    written, or if wandb or TensorBoard is asked for and does not work. Later an output that fails does not end the run:
    the console says so, once for each. With eval_only nothing is written to out_dir.
    """

    def __init__(self, config: TrainConfig, *, device: str, parameters: int, resume_iter: int | None = None) -> None:
        self._path = Path(config.out_dir) / METRICS
        self._mfu: float | None = None  # the last one logged; nanoGPT sends it to wandb with an evaluation
        self._failed: set[str | Path] = set()  # outputs that the console has named
        self._file = self._tensorboard = None
        self._wandb, tensorboard = _import_sinks(config)
        settings = dataclasses.asdict(config)
        if self._wandb:
            try:
                self._wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=settings)
            except Exception as error:  # no login, no network: theirs to say, in one line
                raise UserError(f"wandb_log: wandb.init failed: {first_line(error)}") from error
        if config.eval_only:  # an earlier run in out_dir, or one that is under way there, keeps its log
            return
        from train.checkpoint import set_aside  # here: torch takes two seconds, and `train.plot` needs only the log

        if resume_iter is None and (aside := set_aside(self._path.parent)):
            say(f"the earlier run in {config.out_dir} was moved to {aside}")
        start, folder = resume_iter or 0, self._path.parent
        facts = {
            "resumed": resume_iter is not None,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": settings,
            "device": device,
            "parameters": parameters,
            "torch": _version("torch"),
            "triton": _version("triton"),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torn = False
            with suppress(FileNotFoundError), open_regular(self._path) as file:
                torn = not file.read().endswith(b"\n")
            self._file = self._path.open("ab")
            self._file.write(b"\n" * torn)  # a kill may have cut the last line
            # purge_step hides what an earlier run logged from there on
            self._tensorboard = tensorboard and tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=start)
            self._write("run", start, facts)
        except OSError as error:
            raise UserError(f"out_dir: cannot write {self._path}: {error.strerror}") from error

    def iteration(self, iter_num: int, loss: float, seconds: float, mfu: float, **others: float) -> None:
        """The log line of an iteration. seconds: the mean of one since the last line; mfu: from 0 to 1."""
        say(f"iter {iter_num}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu * 100:.2f}%")
        values = {"loss": loss, "seconds": seconds, "mfu": mfu, **others}
        self._append("iter", iter_num, **values)
        self._mfu = mfu * 100
        self._chart(iter_num, values | {"mfu": self._mfu})

    def evaluation(self, iter_num: int, train_loss: float, val_loss: float, lr: float, seconds: float) -> None:
        """The line of an evaluation: the mean loss of each split. seconds: what evaluating took."""
        say(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self._append("eval", iter_num, train_loss=train_loss, val_loss=val_loss, lr=lr, seconds=seconds)
        known = {} if self._mfu is None else {"mfu": self._mfu}
        self._chart(iter_num, {"train/loss": train_loss, "val/loss": val_loss, "lr": lr, **known})

    def saved(self, iter_num: int, seconds: float) -> None:
        """A checkpoint was written, in so many seconds: recorded, not printed."""
        self._append("save", iter_num, seconds=seconds)

    def close(self) -> None:
        if self._file:
            self._try(self._path, self._file.close)
        if self._wandb:
            self._try("wandb", self._wandb.finish)
        if self._tensorboard:
            self._try("TensorBoard", self._tensorboard.close)

    def _append(self, kind: str, iter_num: int, **values: Any) -> None:
        if self._file:
            self._try(self._path, self._write, kind, iter_num, values)

    def _write(self, kind: str, iter_num: int, values: Mapping[str, Any]) -> None:
        """Append a record. OSError if the disk is full; what it did not take then comes before the next record."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"kind": kind, "iter": iter_num, **finite}, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def _chart(self, iter_num: int, values: Mapping[str, float]) -> None:
        if self._wandb:
            self._try("wandb", self._wandb.log, {"iter": iter_num, **values})
        if self._tensorboard:
            for name, value in values.items():
                self._try("TensorBoard", self._tensorboard.add_scalar, name, value, iter_num)

    def _try(self, output: str | Path, call: Callable[..., object], *args: Any) -> None:
        """call(*args). Its error does not end the run. Every line is tried again: a full disk may be freed."""
        try:
            call(*args)
        except Exception as error:  # wandb's and TensorBoard's are of many types
            if output not in self._failed:
                self._failed.add(output)
                say(f"{output}: cannot be written ({first_line(error)}); the run goes on")


def check_sinks(config: TrainConfig) -> None:
    """UserError if a RunLog would fail: a package is missing, or out_dir cannot be written. Writes nothing."""
    _import_sinks(config)
    if config.eval_only:  # writes nothing
        return
    out_dir = Path(config.out_dir)
    try:
        folder = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, a parent that may not be searched
        raise UserError(f"out_dir: got {shown(config.out_dir)}: {error.strerror}") from None
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"out_dir: got {shown(config.out_dir)}, but {folder} is no folder that can be written")


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """The records of the last run in a metrics.jsonl, in order, as if nothing had interrupted it.

    Partial lines are skipped. If a run was resumed, the records past its checkpoint are left out, and of records that
    are there twice the last one counts. OSError if the file cannot be read.
    """
    records: dict[tuple[str, int], Record] = {}
    with open_regular(Path(path)) as file:
        lines = file.read().splitlines()
    for line in lines:
        try:
            record = json.loads(line)
            key = str(record["kind"]), int(record["iter"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
        if record["kind"] == "run":
            records = {old: kept for old, kept in records.items() if old[1] <= key[1]}
        records.pop(key, None)  # so that the order is that of the last times
        records[key] = record
    return list(records.values())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_sinks(config: TrainConfig) -> list[Any]:
    """wandb and torch.utils.tensorboard, None for one that is not asked for. UserError if one is not installed."""
    found = []
    for name, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        try:
            found.append(importlib.import_module(module) if getattr(config, f"{name}_log") else None)
        except ImportError:
            said = f"{name}_log: got True, but {name} is not installed; pip install 'nanofuse[{name}]'"
            raise UserError(said) from None
    return found
