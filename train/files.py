"""Files that appear whole or not at all, and folders that belong to one process at a time."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from train.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

# what some network file systems say
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)


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
def owned(folder: Path) -> Iterator[None]:
    """Make `folder`, the out_dir of a run, and hold it; at the end it goes again if it is empty.

    The system drops the lock with the process, however that ends. UserError where another process holds the folder, or
    where it cannot be made. File systems without locks, and Windows, hold nothing.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        for path in reversed(made):
            stack.callback(_remove_empty, path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder))
        except BlockingIOError:
            raise UserError(
                f"out_dir: {folder} belongs to a run that has not ended; wait for its end, or name another folder with "
                "--out_dir=FOLDER"
            ) from None
        except OSError as error:
            raise UserError(f"out_dir: cannot write {folder}: {error.strerror}") from None
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # never made, or not empty
        folder.rmdir()


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, gone at the end; what a killed process left of one goes too.

    A lock, which the system drops with the process, tells a folder in use from one that was left.
    """
    for path in folder.glob(".staging-*"):
        with suppress(OSError), _locked(path):
            shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=folder) as path, _locked(Path(path)):
        yield Path(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, or raise BlockingIOError where another process does."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; synced to disk, it becomes `path` when the body ends, nothing where the body fails."""
    with staging_folder(path.parent) as staging:
        with open(staging / path.name, "wb") as file:
            yield file
            sync(file)
        os.replace(staging / path.name, path)
        sync_folder(path.parent)


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
    sync_folder(folder)


def sync(file: BinaryIO) -> None:
    """Have what was written to `file` on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk: renames survive a power cut too. Windows cannot open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)
