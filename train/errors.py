"""Errors that end a command with one line: the setting, what came, what was expected. Text made safe to print."""

import errno
import io
import os
import shlex
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # errors of an open stream, not of a file's name


class UserError(Exception):
    """Bad input. `str(error)` is the message: one line that names the setting, what came and what was expected."""

    status = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


class RunError(UserError):
    """A run that cannot go on, though its input was good: a loss that is not finite."""

    status = 1


MAX_SHOWN = 80  # characters of one value in a message
MAX_LINE = 1000  # characters of a whole message


def shown(value: object) -> str:
    """repr(value), for a message. It is never long, and never raises; repr of a huge integer does."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of an integer of thousands of digits, of lists in lists in lists
        text = f"a {type(value).__name__}, too large to be shown"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def quoted(word: object) -> str:
    """`word`, quoted for a shell, and printable. A word that needs escapes is written as $'...'."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + _printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def command(module: str) -> str:
    """How to start a program of ours: by `nanofuse` where `python -m` would run another train.py, nanoGPT's for one."""
    return f"nanofuse {module.rpartition('.')[2]}" if os.path.lexists("train.py") else f"python -m {module}"


def safe(text: str) -> str:
    """`text` of several lines, safe for a terminal: control characters are escaped, except line ends and tabs."""
    return "".join(_printable(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def one_line(message: object) -> str:
    """The message as one line, escaped, because it may quote a file. The middle of a long one is left out."""
    text = _printable(str(message).strip())
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"


def first_line(error: object) -> str:
    """The first line of the error's message, escaped. The name of its type if the message is empty."""
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def _printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey: control characters, line ends, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def ending() -> Iterator[None]:
    """Inside, an error of the user or the system ends the program with one line and an exit status. Ctrl-C and a closed
    pipe end it without the line."""
    try:
        try:
            os.getcwd()
        except FileNotFoundError:  # even torch cannot be imported there
            raise UserError("the current folder was deleted; cd to one that exists") from None
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head` has read enough; what is still buffered has nowhere to go
        drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        complain(f"error: {error}")
        sys.exit(error.status)
    except OSError as error:
        if error.filename is None and error.errno in WRITING:
            drop_output()
            complain(f"error: the output cannot be written: {error.strerror}")
            sys.exit(1)
        # of a file: a name too long, a folder that may not be searched
        complain(f"error: {one_line(f'{error.filename}: {error.strerror}' if error.filename else error)}")
        sys.exit(UserError.status)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with what `main` returns (None: 0), or as `ending` says."""
    any_characters()
    with ending():
        status = main() or 0
        sys.stdout.flush()  # here, where a failure still has a message
        sys.exit(status)


def any_characters() -> None:
    r"""Let stdout and stderr take any text: characters that their encoding lacks become \xe4, \u20ac or \udcff."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the program started; the next file opened would get its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            stream.reconfigure(errors="backslashreplace")


def complain(line: str) -> None:
    """Print a line on stderr. If that fails, nothing happens. In a signal's handler it may fail with RuntimeError.

    It is one write. print makes two, text and newline, which mix if several ranks fail at once.
    """
    with suppress(OSError, ValueError, RuntimeError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def drop_output() -> None:
    """Throw away all further output, and what stdout still holds. Python would fail on it when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
