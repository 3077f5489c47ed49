"""What makes a measurement honest: time that is kept, and torch.compile that compiles what is called compiled.

Samples themselves are taken by `kernels/timing.py` (kernels) and `bench/steps.py` (training steps).

torch counts compilations by code object, not by model, and all variants of a step share one. After eight it compiles
no more, warns once, and runs Python. And what it meets in a second shape it compiles for all shapes.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

NO_TIME = "no time was left"  # why a row has no samples
RECOMPILED = "it was compiled again while it was timed"
LIMIT = 10_000  # compilations of one code object; a variant makes two: without dropout, and as it is timed


class Budget:
    """Seconds for a row of tasks: what would not end within them is not begun.

    A task is expected to take as long as the slowest of its kind so far; the first of its kind, as long as the slowest
    of any.
    """

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

    def fits(self, *kinds: str, more: float = 0.0) -> bool:
        """Whether a task of each of these kinds, and `more` seconds after them, end within the time that is left."""
        unknown = max(self._slowest.values(), default=0.0)
        return self.left > 0 and self.left >= more + sum(self._slowest.get(kind, unknown) for kind in kinds)

    @contextmanager
    def task(self, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._slowest[kind] = max(self._slowest.get(kind, 0.0), time.perf_counter() - begin)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, torch.compile's limits are out of reach, and to reach one is an error. Every shape is compiled alone."""
    import torch._dynamo.config  # only here: it takes a second

    with torch._dynamo.config.patch(
        recompile_limit=LIMIT,
        accumulated_recompile_limit=LIMIT,
        fail_on_recompile_limit_hit=True,
        suppress_errors=False,
        automatic_dynamic_shapes=False,
    ):
        yield


def compilations() -> int:
    """Graphs that torch.compile has made in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def only_compiled(function: Callable[..., Any], compile: Callable[[Callable], Callable] | None = None) -> Callable:
    """`function`, or a model, compiled; a call that would run it as Python after all raises a RuntimeError.

    compile: what calls torch.compile; None for itself.
    """

    def compiled(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # compiled code has nothing of this
            raise RuntimeError("torch.compile left it as Python")
        return function(*args, **kwargs)

    return (compile or torch.compile)(compiled)


class Clock:
    """A clock that shows what it is told. pytest-benchmark times samples by it that were taken by turns before."""

    __name__ = "Clock"  # what pytest-benchmark calls it in its files

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def restart(self) -> None:
        """Back to 0, from where no sum is rounded."""
        self._now = 0.0

    def let_pass(self, seconds: float) -> None:
        self._now += seconds
