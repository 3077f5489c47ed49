"""Checkpoints: the latest state of a run, `out_dir/ckpt.pt`; its best one, if that is another; what is in them.

A save has six moves. A kill may come at any time: each name is then the whole old file or the whole new one.

    1. write the new file in a folder .staging-<random>, fsync it
    2. shift ckpt-previous-1.pt to ckpt-previous-2.pt, and so on
    3. give ckpt.pt the second name ckpt-previous-1.pt (a hard link: ckpt.pt itself never vanishes)
    4. if ckpt.pt is the best state, as the new file says, give it the name ckpt-best.pt too
    5. rename the new file to ckpt.pt, which replaces the old one in one step; fsync the folder, so that the names
       survive a power cut too
    6. delete the oldest, so that `keep` are left, and ckpt-best.pt if the new ckpt.pt is the best state

`resume` goes on from the latest. Sampling and exporting take the best (`best_of`).

A load verifies what it reads (`archive.py`), then every value that a run takes from it (`Checkpoint`). Everything is a
tensor, a plain value, or a list, tuple or dict of those, so that nanoGPT too reads it with
torch.load(weights_only=True), which runs no code.
"""

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta, Struct

from train.archive import load_archive
from train.errors import UserError, first_line, quoted
from train.files import staging_folder, sync, sync_folder, unused

Size = Annotated[int, Meta(ge=1, lt=2**24)]


# What a checkpoint must hold. msgspec compares what was read with these classes; a bool is no number to it.


class ModelArgs(Struct, forbid_unknown_fields=True, kw_only=True):
    n_layer: Size
    n_head: Size
    n_embd: Size
    block_size: Size
    bias: bool = True  # nanoGPT's oldest files do not say it
    vocab_size: Size
    dropout: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Group(Struct):
    params: list[int]


class Moments(Struct):
    state: dict
    param_groups: list[Group]


class Ours(Struct):
    stale_evals: int = 0
    judged_at: int = 0
    best_iter: int = 0
    gelu: str = ""
    tokenizer: dict = {}
    scaler: dict[str, float] = {}


class Checkpoint(Struct):
    """nanoGPT's six keys, so that either program reads the other's, and one of ours."""

    model: Annotated[dict[str, torch.Tensor], Meta(min_length=1)]  # without the prefixes of torch.compile and DDP
    optimizer: Moments  # AdamW.state_dict(): first the group of tensors with 2 or more dimensions, then the others
    model_args: ModelArgs  # of nanoGPT's GPTConfig
    iter_num: Annotated[int, Meta(ge=0)]  # optimizer steps done
    best_val_loss: float
    config: dict  # {setting: value} of the run
    nanofuse: Ours  # what nanoGPT has no place for


# Only resuming needs more than the weights and their shape: people leave out the moments of a file that they share.
ABSENT = {
    "optimizer": {"state": {}, "param_groups": []},
    "iter_num": 0,
    "best_val_loss": 1e9,
    "config": {},
    "nanofuse": {},
}
MODEL_ARGS = ModelArgs.__struct_fields__
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter, beside its count of steps

_WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module)\.)+")  # torch.compile's and DDP's
_MASK = re.compile(r"\.attn\.bias$")  # the causal mask, a 4-D buffer of nanoGPT's where it has no flash attention

LATEST, BEST = "ckpt.pt", "ckpt-best.pt"
_PREVIOUS = "ckpt-previous-{}.pt"
_EARLIER = "earlier-"  # so begin the names of folders with earlier runs
_OF_A_RUN = ("ckpt*.pt", "metrics.jsonl", "loss.png", "loss.svg", "tensorboard", "trace.json")


class Held(NamedTuple):
    """What a checkpoint file says about itself."""

    iter_num: int
    best_val_loss: float


def save(out_dir: Path, checkpoint: dict, keep: int, *, again: bool = False) -> None:
    """Write `out_dir/ckpt.pt`. Keep `keep` - 1 of those before it: ckpt-previous-1.pt is the newest.

    again: the ckpt.pt that it replaces holds the same weights, so it is not kept beside the new one.

    UserError if the disk is full or out_dir cannot be written. The old files are then untouched. ValueError for what
    `load` would refuse: now, while the run is still alive.
    """
    unpack(checkpoint, complete=True)
    latest, best_iter = out_dir / LATEST, checkpoint["nanofuse"].get("best_iter")
    old, best = held(latest), best_iter == checkpoint["iter_num"]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with staging_folder(out_dir) as staging:
            with _Writer(open(staging / LATEST, "wb", buffering=0)) as file:
                torch.save(checkpoint, file)
                sync(file)
            if keep > 1 and not again:
                _keep_previous(out_dir, staging, keep)
            if old and old.iter_num == best_iter and not best:
                _name_also(latest, staging, out_dir / BEST)
            os.replace(staging / LATEST, latest)
            sync_folder(out_dir)
        for path in _previous(out_dir)[keep - 1 :]:
            path.unlink()
        if best:
            (out_dir / BEST).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = error
        while cause and not isinstance(cause, OSError | KeyboardInterrupt):  # torch's writer wraps it
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if cause is None:
            raise  # not the disk's doing
        left = f"{latest} is still whole" if latest.is_file() else "there is none"
        raise UserError(f"out_dir={out_dir}: the checkpoint could not be written ({cause}); {left}") from error


def load(path: Path, *, complete: bool = False) -> dict:
    """The checkpoint at `path`, ours or nanoGPT's, as `unpack` lays it out, its tensors on the CPU.

    complete: also what only resuming needs must be in it. UserError if there is none, or it is damaged. The message
    offers the newest other one that is whole.
    """
    try:
        return unpack(load_archive(path), complete=complete)
    except FileNotFoundError:
        problem = f"init_from=resume: there is no {path}; out_dir={path.parent} should be an earlier run's"
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror})"
    except ValueError as error:
        problem = f"{path} {error}"
    raise UserError(problem + _offer(path))


def named(init_from: str) -> Path | None:
    """The checkpoint that `init_from` names: a file, or the best one of a folder. None if it names something else."""
    path = Path(init_from)
    if os.path.isfile(path / LATEST) and not os.path.isfile(path / "model.safetensors"):
        return best_of(path)
    return path if path.suffix == ".pt" and os.path.isfile(path) else None


def best_of(out_dir: Path) -> Path:
    """The checkpoint to read weights from: ckpt-best.pt if it is there and not worse, else ckpt.pt."""
    best, latest = held(out_dir / BEST), held(out_dir / LATEST)
    return out_dir / (BEST if best and latest and best.best_val_loss <= latest.best_val_loss else LATEST)


def held(path: Path) -> Held | None:
    """What the checkpoint at `path` says about itself; None if there is none. No weight is read or verified."""
    try:
        found = unpack(load_archive(path, verify=False))
    except (OSError, ValueError):  # no file, a damaged one, a foreign one
        return None
    return Held(found["iter_num"], found["best_val_loss"])


def set_best_aside(out_dir: Path) -> Path:
    """Keep the best checkpoint in a new folder, as `set_aside` does, before others take its place."""
    if best_of(out_dir).name == LATEST:
        with _moving(out_dir), staging_folder(out_dir) as staging:
            _name_also(out_dir / LATEST, staging, out_dir / BEST)
    return set_aside(out_dir, (BEST,))


def set_aside(out_dir: Path, patterns: tuple[str, ...] = _OF_A_RUN) -> Path | None:
    """Move an earlier run's checkpoints, logs and curve into a new folder `out_dir/earlier-<date>-<time>`.

    patterns: of the names to move. Returns that folder, or None if there was nothing to move.
    """
    found = [path for pattern in patterns for path in out_dir.glob(pattern)]
    if not found:
        return None
    folder = unused(out_dir, f"{_EARLIER}{datetime.now():%Y%m%d-%H%M%S}")
    with _moving(out_dir):
        folder.mkdir()
        for path in sorted(found, key=lambda path: path.name == LATEST):  # last: until then the run can be resumed
            path.rename(folder / path.name)
    return folder


@contextmanager
def _moving(out_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"out_dir={out_dir}: the earlier run in it could not be set aside ({error})") from error


def _offer(path: Path) -> str:
    """The newest other checkpoint of the folder that is whole, and the command with which it is read instead. What is
    at `path` is kept: it may be whole, but of another program. If there is none: the newest run that was set aside."""
    for other in (path.with_name(LATEST), *_previous(path.parent), path.with_name(BEST)):
        with suppress(OSError, ValueError):
            if other != path:
                iteration = unpack(load_archive(other))["iter_num"]
                moves = [("mv", path, unused(path.parent, f"{path.name}.damaged"))] * path.exists()
                if path.name != BEST:  # the best one is looked for in ckpt.pt too
                    moves.append(("cp", other, path))
                commands = [" ".join(map(quoted, move)) for move in moves]
                how = f"`{' && '.join(commands)}`, then try again" if commands else "try again"
                return f"; {other.name}, of iteration {iteration}, is whole: {how}"
    for earlier in sorted(path.parent.glob(f"{_EARLIER}*/{LATEST}"), reverse=True):
        if found := held(earlier):
            return f"; an earlier run, of iteration {found.iter_num}, is there: --out_dir={quoted(earlier.parent)}"
    return ""


# Writing


class _Writer(io.BufferedWriter):
    """A file for torch.save. After an interrupt torch still writes the archive's end, when it frees its own writer. The
    file is closed by then. An error there would abort the process, so such a write does nothing."""

    def write(self, data: Any) -> int:
        return len(data) if self.closed else super().write(data)


def _keep_previous(out_dir: Path, staging: Path, keep: int) -> None:
    """Moves 2 and 3. Afterwards there is one file too many, until move 6."""
    latest, first = out_dir / LATEST, out_dir / _PREVIOUS.format(1)
    if not latest.exists():
        return
    if first.exists() and first.samefile(latest):
        return  # a save killed between moves 3 and 5 did this already
    # Only up to the first gap, which a kill within move 2 leaves: no file is pushed out too early.
    vacant = next((i for i in range(1, keep) if not (out_dir / _PREVIOUS.format(i)).exists()), keep)
    for i in range(vacant, 1, -1):
        os.replace(out_dir / _PREVIOUS.format(i - 1), out_dir / _PREVIOUS.format(i))
    _name_also(latest, staging, first)


def _name_also(path: Path, staging: Path, name: Path) -> None:
    """Give the file `path` a second name: by a hard link, or by a copy on a file system without links."""
    second = staging / "second"
    try:
        os.link(path, second)
    except OSError:
        with path.open("rb") as source, second.open("wb") as copy:
            shutil.copyfileobj(source, copy)
            sync(copy)
    os.replace(second, name)


def _previous(out_dir: Path) -> list[Path]:
    """Every ckpt-previous-<number>.pt, the newest first."""
    found = {path.name[len("ckpt-previous-") : -len(".pt")]: path for path in out_dir.glob("ckpt-previous-*.pt")}
    return [found[number] for number in sorted(filter(str.isdecimal, found), key=int)]


# What is in the file


def unpack(raw: Any, *, complete: bool = False) -> dict:
    """What torch.load returned, checked, in the layout above. ValueError if anything is wrong with it, if it has no
    weights or no shape, and, where it must be complete, if any other of nanoGPT's keys is missing."""
    if not isinstance(raw, dict):
        raise ValueError(f"is not a GPT's checkpoint: it holds a {type(raw).__name__}, not a dict")
    raw = ({"nanofuse": {}} if complete else ABSENT) | raw
    best = raw.get("best_val_loss")
    if isinstance(best, torch.Tensor) and best.numel() == 1 and not best.is_meta:
        raw = {**raw, "best_val_loss": best.item()}  # as nanoGPT keeps it
    try:
        checked = msgspec.convert(raw, Checkpoint)
    except Exception as error:  # msgspec's own, and a tensor's, which it takes for a dict
        kind = "checkpoint to resume" if complete else "checkpoint"
        raise ValueError(f"is not a GPT's {kind}: {first_line(error)}") from error
    model = {
        _WRAPPERS.sub("", name): tensor
        for name, tensor in checked.model.items()
        if not (_MASK.search(name) and tensor.ndim == 4)
    }
    found = {key: raw[key] for key in Checkpoint.__struct_fields__}
    return found | {"model": model, "best_val_loss": checked.best_val_loss}
