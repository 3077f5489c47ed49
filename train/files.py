"""Files that appear whole or not at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from train.errors import UserError


@contextmanager
def making_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents; where the body fails, those that were made and are empty go again.

    An OSError, of making it or of the body, becomes a UserError: `folder` cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for path in made:
            with suppress(OSError):  # never made, or no longer empty
                path.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
        raise


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, gone at the end; what a killed process left of one goes too.

    A lock, which the system drops with the process, tells one that is in use from one that was left.
    """
    for path in folder.glob(".staging-*"):
        with suppress(OSError), _locked(path):
            shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=folder) as path, _locked(Path(path)):
        yield Path(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, or raise BlockingIOError where another does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; synced to disk, it becomes `path` when the body ends, nothing where the body fails."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # mkstemp's files are for the owner alone
            yield file
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def sync(file: BinaryIO) -> None:
    """Have what was written to `file` on the disk."""
    file.flush()
    os.fsync(file.fileno())


def replace_together(staging: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Move the files `names` from `staging` into `folder`; of those that staging lacks, folder's are deleted.

    names[0] is gone first and there last: whoever looks for it finds the old files, none, or the new ones.
    """
    (folder / names[0]).unlink(missing_ok=True)
    for name in (*names[1:], names[0]):
        if (staging / name).exists():
            os.replace(staging / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the renames themselves
    finally:
        os.close(descriptor)
