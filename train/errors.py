"""What ends a command early, said in one line: the setting, what came, what was expected."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        # in one write: print's two, text and newline, mix when several ranks fail at once and stderr is unbuffered
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        sys.exit(error.status)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with what `main` returns (None: 0), or as `ending` says."""
    with ending():
        sys.exit(main() or 0)
