"""Where a run's numbers go: the console, out_dir/metrics.jsonl, and on request wandb and TensorBoard.

metrics.jsonl holds one JSON object a line, written as it happens:

    {"kind": "run",  "iter", "resumed", "time", "settings", "device", "parameters", "torch", "triton"}
    {"kind": "iter", "iter", "loss", "seconds", "mfu", "lr", "grad_norm", "tokens_per_second"}
    {"kind": "eval", "iter", "train_loss", "val_loss", "lr", "seconds"}
    {"kind": "save", "iter", "seconds"}

A "run" is written at every start. The seconds of an "iter" are the mean of one iteration since the last such
line; the others' are what evaluating or saving took. A number that is not finite is null. The file is only
ever appended to, and a killed run leaves at most one partial last line: `read_metrics` sorts both out.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from train.checkpoint import set_aside
from train.errors import UserError

METRICS = "metrics.jsonl"

Record = dict[str, Any]


def say(line: str) -> None:
    """Print one line, seen at once through a pipe too."""
    print(line, flush=True)


class RunLog:
    """The log of a run, kept by one rank.

    settings: stored with the run. parameters: how many the model has. resume_iter: the iteration that a
    resumed run goes on from, None for a new run. console: prints one line. Raises UserError where out_dir
    cannot be written (at once, or on a later line), and before anything is written where wandb or TensorBoard
    is asked for and cannot be had.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike,
        settings: Mapping[str, Any],
        *,
        device: str,
        parameters: int,
        resume_iter: int | None = None,
        wandb_log: bool = False,
        wandb_project: str = "owt",
        wandb_run_name: str = "gpt2",
        tensorboard_log: bool = False,
        console: Callable[[str], None] = say,
    ) -> None:
        self._console = console
        self._path = Path(out_dir) / METRICS
        self._wandb = self._tensorboard = None
        self._mfu: float | None = None  # the last one logged; nanoGPT sends it to wandb with an evaluation
        wandb = _import_wandb() if wandb_log else None
        writer = _import_summary_writer() if tensorboard_log else None
        if wandb:
            try:
                wandb.init(project=wandb_project, name=wandb_run_name, config=dict(settings))
            except Exception as error:  # no login, no network: theirs to say, in one line
                raise UserError(f"wandb_log: wandb.init failed: {' '.join(str(error).split())}") from error
            self._wandb = wandb
        if resume_iter is None and (aside := set_aside(self._path.parent)):
            console(f"the earlier run in {out_dir} was moved to {aside}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _end_partial_line(self._path)
            self._file = self._path.open("ab", buffering=0)  # so that a line is one write, at once
            if writer:  # purge_step hides what an earlier run logged from there on
                self._tensorboard = writer(str(self._path.parent / "tensorboard"), purge_step=resume_iter or 0)
        except OSError as error:
            raise UserError(f"out_dir: cannot write {self._path}: {error.strerror}") from error
        self._append(
            "run",
            resume_iter or 0,
            resumed=resume_iter is not None,
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            settings=dict(settings),
            device=device,
            parameters=parameters,
            torch=_version("torch"),
            triton=_version("triton"),
        )

    def message(self, text: str) -> None:
        """A line for the console only."""
        self._console(text)

    def iteration(
        self,
        iter_num: int,
        loss: float,
        seconds: float,
        mfu: float,
        lr: float,
        grad_norm: float,
        tokens_per_second: float,
    ) -> None:
        """The log line of an iteration. seconds: the mean of one since the last line; mfu: from 0 to 1."""
        self._console(f"iter {iter_num}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu * 100:.2f}%")
        values = {
            "loss": loss,
            "seconds": seconds,
            "mfu": mfu,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
        }
        self._append("iter", iter_num, **values)
        self._mfu = mfu
        self._chart(iter_num, {**values, "mfu": mfu * 100})

    def evaluation(self, iter_num: int, train_loss: float, val_loss: float, lr: float, seconds: float) -> None:
        """The line of an evaluation: the mean loss of each split. seconds: what evaluating took."""
        self._console(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self._append("eval", iter_num, train_loss=train_loss, val_loss=val_loss, lr=lr, seconds=seconds)
        values = {"train/loss": train_loss, "val/loss": val_loss, "lr": lr}
        if self._mfu is not None:
            values["mfu"] = self._mfu * 100
        self._chart(iter_num, values)

    def saved(self, iter_num: int, seconds: float) -> None:
        """A checkpoint was written, in so many seconds: recorded, not printed."""
        self._append("save", iter_num, seconds=seconds)

    def close(self) -> None:
        """The run is over."""
        self._file.close()
        if self._wandb:
            self._wandb.finish()
        if self._tensorboard:
            self._tensorboard.close()

    def _append(self, kind: str, iter_num: int, **values: Any) -> None:
        record = {
            "kind": kind,
            "iter": iter_num,
            **{name: _jsonable(value) for name, value in values.items()},
        }
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(0, "the disk is full")  # a short write is all a full disk says at first
        except OSError as error:
            raise UserError(f"out_dir: cannot write {self._path}: {error.strerror}") from error

    def _chart(self, iter_num: int, values: Mapping[str, float]) -> None:
        if self._wandb:
            self._wandb.log({"iter": iter_num, **values})
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iter_num)


def check_sinks(out_dir: str | os.PathLike, *, wandb_log: bool, tensorboard_log: bool) -> None:
    """UserError where a RunLog would fail for want of a package or of a folder to write to. Writes nothing."""
    if wandb_log:
        _import_wandb()
    if tensorboard_log:
        _import_summary_writer()
    folder = next(path for path in (Path(out_dir), *Path(out_dir).absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "cannot be written" if folder.is_dir() else "is no folder"
        raise UserError(f"out_dir: got {os.fspath(out_dir)!r}, expected a folder that can be written; {folder} {what}")


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """The records of the last run in a metrics.jsonl, in order, as if nothing had interrupted it.

    Lines that a kill cut short are skipped. Where a run was resumed, what it had done past its checkpoint is
    forgotten, and what it did twice counts the last time. Raises OSError when the file cannot be read.
    """
    records: dict[tuple[str, int], Record] = {}
    for line in Path(path).read_bytes().splitlines():
        try:
            record = json.loads(line)
            key = str(record["kind"]), int(record["iter"])
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
        if record["kind"] == "run":
            last = key[1] if record.get("resumed") else -1
            records = {old: kept for old, kept in records.items() if old[1] <= last}
        records.pop(key, None)  # so that the order is that of the last times
        records[key] = record
    return list(records.values())


def _end_partial_line(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _jsonable(value: Any) -> Any:
    """`value`, with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _jsonable(item) for name, item in value.items()}
    return value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb_log: got True, but wandb is not installed; pip install 'nanofuse[wandb]'") from error
    return wandb


def _import_summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard_log: got True, but tensorboard is not installed; pip install 'nanofuse[tensorboard]'"
        ) from error
    return SummaryWriter
