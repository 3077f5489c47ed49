"""Checkpoints on disk: one file, `out_dir/ckpt.pt`, that a kill at any instant leaves whole.

A save in five moves. Whichever a kill interrupts, ckpt.pt is the old file or the new one, whole:

    1. write the new file in a folder .staging-<random>, fsync it
    2. shift ckpt-previous-1.pt to ckpt-previous-2.pt, and so on, as far as `keep` allows
    3. give ckpt.pt the second name ckpt-previous-1.pt (a hard link: ckpt.pt itself never vanishes)
    4. rename the new file to ckpt.pt, which replaces the old one in one step
    5. fsync the folder, so that the names survive a power cut too

A load checks every CRC first. torch's reader does not: it hands out flipped bits as weights.
What is inside the file: `checkpoint_layout.py`.
"""

import errno
import os
import re
import shlex
import shutil
import zipfile
from datetime import datetime
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch

from train.checkpoint_layout import leaves, load_optimizer, pack, unpack
from train.errors import UserError, first_line
from train.files import staging_folder, sync, sync_folder

__all__ = ["load", "load_optimizer", "pack", "save", "set_aside"]

_NAME = "ckpt.pt"
_PREVIOUS = "ckpt-previous-{}.pt"
_OF_A_RUN = ("ckpt*.pt", "metrics.jsonl", "loss.png", "loss.svg", "tensorboard", "trace.json")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def save(out_dir: Path, checkpoint: dict, keep: int) -> None:
    """Write `out_dir/ckpt.pt` and, of those before it, keep `keep` - 1: ckpt-previous-1.pt is the newest.

    Raises UserError where the disk is full or out_dir cannot be written; the old one is then untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, not {keep}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with staging_folder(out_dir) as staging:
            with open(staging / _NAME, "wb") as file:
                torch.save(checkpoint, file)
                sync(file)
            _keep_previous(out_dir, staging, keep)
            os.replace(staging / _NAME, out_dir / _NAME)
            sync_folder(out_dir)
        for index, path in _previous(out_dir):
            if index >= keep:
                path.unlink()
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise  # not the disk's doing
        raise UserError(_why_not_saved(out_dir, checkpoint, cause)) from error


def load(path: Path) -> dict:
    """The checkpoint at `path`, ours or nanoGPT's, as `unpack` lays it out, its tensors on the CPU.

    Raises UserError where there is none, or none that is whole, and offers the newest previous one that is.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        problem = f"init_from=resume: there is no {path}; out_dir={path.parent} should be an earlier run's"
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror})"
    except ValueError as error:
        problem = f"{path} {error}"
    raise UserError(problem + _offer(path))


def set_aside(out_dir: Path) -> Path | None:
    """Move an earlier run's checkpoints, metrics and curve into a new folder `out_dir/earlier-<date>-<time>`.

    Returns that folder, or None where there was nothing to move.
    """
    files = [path for pattern in _OF_A_RUN for path in sorted(out_dir.glob(pattern)) if not path.is_dir()]
    if not files:
        return None
    stem = f"earlier-{datetime.now():%Y%m%d-%H%M%S}"
    folder, count = out_dir / stem, 1
    try:
        while folder.exists():
            count += 1
            folder = out_dir / f"{stem}-{count}"
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)
    except OSError as error:
        raise UserError(f"out_dir={out_dir}: the earlier run in it could not be set aside ({error})") from error
    return folder


# Reading


def _read(path: Path) -> dict:
    """The checkpoint at `path`. OSError where it cannot be opened, ValueError where it is not a whole one."""
    if path.is_dir():
        raise ValueError("is a folder, not a checkpoint")
    with path.open("rb") as file:  # once: a save may replace the name between the check and the load
        _verify(file)
        file.seek(0)
        try:
            raw = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except UnpicklingError as error:
            what = re.search(r"GLOBAL (\S+)", str(error))  # the one useful word of a page of advice
            more = "it holds more than tensors and plain values" + (f" ({what[1]})" if what else "")
            raise ValueError(f"is not loaded: {more}") from error
        except Exception as error:  # whatever a foreign zip archive makes torch raise
            raise ValueError(f"is not a checkpoint that torch can read ({first_line(error)})") from error
    try:
        return unpack(raw)
    except ValueError as error:
        raise ValueError(f"is not a GPT's checkpoint: {error}") from error


def _verify(file: BinaryIO) -> None:
    """ValueError unless `file` is a zip archive, as torch.save writes, whose members all have their CRC."""
    start = file.read(4)
    if not zipfile.is_zipfile(file):  # looks for the directory at the end
        length = file.seek(0, os.SEEK_END)
        if start == b"PK\x03\x04":
            raise ValueError(f"is cut short: the directory at the end of its zip archive is missing ({length} bytes)")
        raise ValueError(f"is not a checkpoint: {length} bytes, but not the zip archive that torch.save writes")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises half a dozen kinds, depending on the field that is hit
        raise ValueError(f"is damaged ({first_line(error)})") from error
    if damaged is not None:
        raise ValueError(f"is damaged: its member {damaged} does not have its CRC")


def _offer(path: Path) -> str:
    for _, previous in _previous(path.parent):
        if previous.name == path.name:
            continue
        try:
            iteration = _read(previous)["iter_num"]
        except (OSError, ValueError):
            continue
        move = shlex.join(["mv", str(previous), str(path)])
        return f"; the one before it, of iteration {iteration}, is whole: `{move}`, then resume again"
    return ""


# Writing


def _keep_previous(out_dir: Path, staging: Path, keep: int) -> None:
    """Moves 2 and 3."""
    names = [out_dir / _NAME, *(out_dir / _PREVIOUS.format(i) for i in range(1, keep))]
    if keep == 1 or not names[0].exists():
        return
    if names[1].exists() and names[1].samefile(names[0]):
        return  # a save killed between moves 3 and 4 did this already
    # Only up to the first gap, which a save killed within move 2 leaves: none is to be pushed out early.
    vacant = next((i for i in range(1, keep) if not names[i].exists()), keep - 1)
    for i in range(vacant, 1, -1):
        os.replace(names[i - 1], names[i])
    second = staging / "second"
    try:
        os.link(names[0], second)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with names[0].open("rb") as source, second.open("wb") as copy:  # a file system without hard links
            shutil.copyfileobj(source, copy)
            sync(copy)
    os.replace(second, names[1])


def _previous(out_dir: Path) -> list[tuple[int, Path]]:
    """(index, path) of every ckpt-previous-<index>.pt, the newest first."""
    found = ((re.fullmatch(r"ckpt-previous-(\d+)\.pt", path.name), path) for path in out_dir.glob("ckpt-previous-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


# What went wrong


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`: torch's writer raises a RuntimeError of its own over the file's."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _why_not_saved(out_dir: Path, checkpoint: dict, error: OSError) -> str:
    path = out_dir / _NAME
    left = f"{path} is still whole" if path.is_file() else f"there is no {path}"
    if error.errno not in _NO_ROOM:
        return f"out_dir={out_dir}: the checkpoint could not be written ({error}); {left}"
    storages = (value.untyped_storage() for _, value in leaves(checkpoint) if isinstance(value, torch.Tensor))
    needed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # tied weights count once
    free = shutil.disk_usage(out_dir).free
    return (
        f"out_dir={out_dir}: no room for the checkpoint: it needs {needed / 1e6:.2f} MB, "
        f"{free / 1e6:.2f} MB are free ({error.strerror}); {left}"
    )
