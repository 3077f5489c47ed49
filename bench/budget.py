"""A time that is kept: what would not end within it is not begun."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

NO_TIME = "no time was left"  # why a row has no samples


class Budget:
    """Seconds for a row of tasks. A task is expected to take as long as the slowest of its kind so far; the first of
    its kind, as long as the slowest of any."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._deadline = time.perf_counter() + seconds
        self._slowest: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._deadline - time.perf_counter())

    def part(self, seconds: float) -> Self:
        """So many of the seconds that are left, with what is known of the tasks."""
        part = type(self)(min(seconds, self.left))
        part._slowest = self._slowest
        return part

    def expected(self, kind: str) -> float:
        """Seconds that a task of this kind takes."""
        return self._slowest.get(kind, max(self._slowest.values(), default=0.0))

    def fits(self, seconds: float) -> bool:
        return self.left > 0 and self.left >= seconds

    @contextmanager
    def task(self, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._slowest[kind] = max(self._slowest.get(kind, 0.0), time.perf_counter() - begin)
