"""What ends a command early, said in one line: the setting, what came, what was expected."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a stream that was opened well


class UserError(Exception):
    """Bad input. `str(error)` is the message: one line that names the setting, what came and what was expected."""

    status = 2


class RunError(UserError):
    """A run that cannot go on, though its input was good: a loss that is not finite."""

    status = 1


def first_line(error: object) -> str:
    """The first line that `error` says, or the name of its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def ending() -> Iterator[None]:
    """What ends the body early, a UserError, Ctrl-C or a closed pipe, ends the program: one line, an exit status."""
    try:
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
        if error.filename is not None or error.errno not in WRITING:
            raise
        drop_output()
        complain(f"error: the output cannot be written: {error.strerror}")
        sys.exit(1)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with what `main` returns (None: 0), or as `ending` says."""
    any_characters()
    with ending():
        status = main() or 0
        sys.stdout.flush()  # here, where a failure still has a message
        sys.exit(status)


def any_characters() -> None:
    r"""Let stdout and stderr take any text: what their encoding lacks is printed as \xe4, \u20ac or \udcff."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the program: the next file opened would get its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def complain(line: str) -> None:
    """Print a line on stderr; nothing happens where that fails.

    In one write: print's two, text and newline, mix when several ranks fail at once and stderr is unbuffered.
    """
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def drop_output() -> None:
    """From here on nothing reaches stdout, nor what it still holds. Else the interpreter's end would fail on it."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
