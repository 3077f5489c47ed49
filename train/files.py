"""Files that appear whole or not at all; files of others, read with care; folders that belong to one process."""

import errno
import functools
import os
import shutil
import stat
import tempfile
import zlib
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


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. OSError for anything else: a pipe would wait for ever, a device has no end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. OSError for anything else, and for more than `most` bytes."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return data


def check_output(path: Path) -> None:
    """OSError unless `path` is a regular file or nothing, in a folder that can be written: it may be replaced."""
    folder = path.parent
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        what = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}.get(stat.S_IFMT(mode), "a device or a pipe")
        raise OSError(errno.EINVAL, f"it is {what}, expected a regular file or nothing", str(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        found = errno.EACCES if os.path.isdir(folder) else errno.ENOENT
        raise OSError(found, os.strerror(found), str(folder))


def checksums(file: BinaryIO, size: int) -> list[int]:
    """CRC-32 of every `size` bytes of an open file, from where it stands."""
    return [zlib.crc32(data) for data in iter(functools.partial(file.read, size), b"")]


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents; at the end those that were made and are empty go again."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in made:
            with suppress(OSError):  # never made, or not empty
                path.rmdir()


@contextmanager
def making_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents; at the end those that were made and are empty go again.

    An OSError, of making it or of the body, becomes a UserError: `folder` cannot be written.
    """
    try:
        with _made(folder):
            yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make `folder`, the out_dir of a run, and hold it; at the end it goes again if it is empty.

    The system drops the lock with the process, however that ends. UserError where another process holds the folder, or
    where it cannot be made. File systems without locks, and Windows, hold nothing.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_made(folder))
            stack.enter_context(_locked(folder))
        except BlockingIOError:
            raise UserError(
                f"out_dir: {folder} belongs to a run that has not ended; wait for its end, or name another folder with "
                "--out_dir=FOLDER"
            ) from None
        except OSError as error:
            raise UserError(f"out_dir: cannot write {folder}: {error.strerror}") from None
        yield


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
    """A file to write; synced to disk, it becomes `path` when the body ends, nothing where the body fails.

    OSError where `path` is no regular file, or where it cannot be written."""
    check_output(path)
    with staging_folder(path.parent) as staging:
        with open(staging / path.name, "wb") as file:
            yield file
            sync(file)
        os.replace(staging / path.name, path)
        sync_folder(path.parent)


def replace_together(staging: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Move the files `names` from `staging` into `folder`; of those that staging lacks, folder's are deleted.

    They are synced first. names[0] is gone first and there last: whoever looks for it finds the old files, none, or
    the new ones. OSError before anything is moved where one of them is no regular file.
    """
    for name in names:
        check_output(folder / name)
    for path in staging.iterdir():
        with open(path, "rb") as file:
            sync(file)
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
