"""Files that appear whole or not at all. Files of others, read with care. Folders that belong to one process."""

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO

from train.errors import UserError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. OSError for anything else: a pipe may never answer, a device may have no end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. OSError for anything else, and if there are more than `most` bytes."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return data


def unused(folder: Path, stem: str, suffix: str = "") -> Path:
    """The path of `stem` and `suffix` in `folder`, with a number between them if something has that name."""
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(path for name in names if not os.path.lexists(path := folder / f"{name}{suffix}"))


def holds(path: Path, mark: str) -> bool:
    """Whether `path` is a regular file, not a huge one, with the text `mark` somewhere in it."""
    try:
        return mark.encode() in read_regular(path, 1 << 28)
    except OSError:
        return False


def check_output(path: Path) -> None:
    """OSError unless `path` may be written: it is a regular file or nothing, in a folder that can be written."""
    mode = os.lstat(path).st_mode if os.path.lexists(path) else stat.S_IFREG
    if not stat.S_ISREG(mode):
        what = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}.get(stat.S_IFMT(mode), "a device or a pipe")
        raise OSError(errno.EINVAL, f"it is {what}, expected a regular file or nothing", str(path))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        found = errno.EACCES if path.parent.is_dir() else errno.ENOENT
        raise OSError(found, os.strerror(found), str(path.parent))


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents. At the end, delete those of them that were made here and are empty."""
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
    """As `_made`. An OSError, also one inside, becomes a UserError: `folder` cannot be written."""
    try:
        with _made(folder):
            yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make `folder`, the out_dir of a run, and lock it. At the end, delete it if it was made here and is empty.

    The system drops the lock when the process ends, however it ends. UserError if another process holds the lock, or if
    the folder cannot be made. Windows and some file systems have no locks: there nothing is locked.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_made(folder))
            stack.enter_context(_locked(folder))
        except BlockingIOError:
            raise UserError(f"out_dir: {folder} belongs to a run that has not ended; name another folder") from None
        except OSError as error:
            raise UserError(f"out_dir: cannot write {folder}: {error.strerror}") from None
        yield


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`. It is deleted at the end, and so are those that killed processes left.

    A folder in use is locked. The system drops the lock when its process ends. Where nothing can be locked, only those
    are deleted that nobody has touched for a day: a run may use the others, which saves while its curve is drawn.
    """
    for path in folder.glob(".staging-*"):
        with suppress(OSError), _locked(path) as locked:
            touched = max(os.stat(inside).st_mtime for inside in (path, *path.iterdir()))
            if locked or time.time() - touched > 24 * 60 * 60:
                shutil.rmtree(path)
    with ExitStack() as held:
        yield _staged(folder, held)


def _staged(folder: Path, held: ExitStack) -> Path:
    """A new temporary folder, locked, both until `held` ends. If another process, before the lock, takes it for one
    that was left, there is another one."""
    while True:
        path = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=".staging-", dir=folder)))
        with suppress(BlockingIOError, FileNotFoundError):
            held.enter_context(_locked(path))
            if path.exists():
                return path


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock. BlockingIOError if another process holds it. False where there are no locks."""
    if fcntl is None:
        yield False
        return
    with _opened(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:  # a file system may have no locks, some network ones for example
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF):
                raise
            locked = False
        yield locked


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write. At the end it is synced to disk and becomes `path`. If the body fails, `path` stays as it was.

    OSError if `path` is there and no regular file, or cannot be written."""
    with staging_folder(path.parent) as staging:
        with open(staging / path.name, "wb") as file:
            yield file
        replace_together(staging, path.parent, (path.name,))


def replace_together(staging: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Move the files `names` from `staging` into `folder`. Files that staging lacks are deleted from `folder`.

    All are synced first. Of several, names[0] is deleted first and moved last: if it is there, all files are the old
    ones, or all are the new ones. OSError, before anything is moved, if one of the names is no regular file.
    """
    for name in names:
        check_output(folder / name)
    for path in staging.iterdir():
        with open(path, "rb") as file:
            sync(file)
    if len(names) > 1:
        (folder / names[0]).unlink(missing_ok=True)
    for name in (*names[1:], names[0]):
        if (staging / name).exists():
            os.replace(staging / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)


def sync(file: BinaryIO) -> None:
    """Wait until everything written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, so that renames survive a power cut. What the files hold is
    there already. Windows cannot do this, nor can its drives under WSL and some network ones, each with another error.
    """
    with suppress(OSError), _opened(folder) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
