"""What ends a command early, said in one line: the setting, what came, what was expected."""

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

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a stream that was opened well


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
    """repr for a one-line message: never long, and never the ValueError that a huge integer's repr raises."""
    try:
        text = value if isinstance(value, str) and len(value) > 4 * MAX_SHOWN else repr(value)
    except ValueError:
        assert isinstance(value, int)
        return f"an integer of {value.bit_length()} bits"
    except RecursionError:
        return f"a {type(value).__name__}, nested too deeply to be shown"
    if text is value:  # a long one is cut before it is escaped
        text = repr(value[: 4 * MAX_SHOWN])
    return printable(text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "...")


def printable(text: str) -> str:
    """`text` with what a terminal would act upon escaped: control characters, line ends, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(word: object) -> str:
    """`word` as a shell reads it, and as a message shows it: one that has to be escaped is written as $'...'."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def safe(text: str) -> str:
    """`text` of several lines as a terminal may show it: only line ends and tabs act, other control characters are
    escaped."""
    return "".join(printable(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def one_line(message: object) -> str:
    """What is said to a user, whoever wrote the words in it: one line, escaped, the middle of a long one left out."""
    text = printable(str(message).strip())
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"


def first_line(error: object) -> str:
    """The first line that `error` says, escaped, or the name of its type where it says nothing."""
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


@contextmanager
def ending() -> Iterator[None]:
    """What ends the body early, an error of the user's or the system's, Ctrl-C or a closed pipe, ends the program: one
    line, an exit status."""
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
