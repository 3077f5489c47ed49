"""How far a long measurement is: one line that moves on a terminal, plain lines elsewhere."""

import shutil
import time
from typing import TextIO


class Progress:
    """seconds: what all of it may take."""

    def __init__(self, seconds: float, stream: TextIO) -> None:
        self._seconds, self._stream, self._begin = seconds, stream, time.monotonic()
        self._live = stream.isatty()
        self._part = ""

    def part(self, name: str, left: float) -> None:
        """A new part begins."""
        self._part = name
        self.tell(f"{name} ({left / 60:.1f} minutes left)")

    def at(self, what: str) -> None:
        """Where the part is; a plain stream is told of parts only."""
        if self._live:
            passed = time.monotonic() - self._begin
            filled = min(20, int(20 * passed / self._seconds))
            line = f"[{'#' * filled}{'.' * (20 - filled)}] {passed / 60:4.1f} min  {self._part}: {what}"
            self._stream.write("\r\033[K" + line[: shutil.get_terminal_size().columns - 1])
            self._stream.flush()

    def tell(self, text: str) -> None:
        """A line that stays."""
        self.end()
        self._stream.write(text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Nothing moves any more."""
        if self._live:
            self._stream.write("\r\033[K")
            self._stream.flush()
