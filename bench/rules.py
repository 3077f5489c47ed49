"""What every measurement keeps to: it ends in time, and what is called compiled is compiled.

torch counts compilations by code object, not by model, and all variants of a step share one. After eight compilations
it only warns once, and runs Python. At a second shape it compiles code for all shapes.

`kernels/timing.py` takes the samples of kernels, `bench/steps.py` those of training steps.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

NO_TIME = "no time was left"  # why a row has no samples
RECOMPILED = "it was compiled again while it was timed"
LIMIT = 10_000  # compilations of one code object; a variant needs two: without dropout, and as it is timed


class TimeBudget:
    """Seconds for several tasks. A task that would not end in time is not started.

    A task is expected to take as long as the slowest one of its kind so far. The first of its kind is expected to take
    as long as the slowest of all kinds.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._deadline = time.perf_counter() + seconds
        self._slowest: dict[str, float] = {}

    @property
    def left(self) -> float:
        return max(0.0, self._deadline - time.perf_counter())

    def part(self, seconds: float) -> Self:
        """A budget of at most `seconds` of the time left. It shares the tasks' times."""
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
    """Inside, torch.compile's limits are very high, and reaching one is an error. Every shape is compiled alone."""
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
    """Compile `function`, or a model. A call that would still run it as Python raises RuntimeError.

    compile: a function that calls torch.compile; None: torch.compile itself.
    """

    def compiled(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # compiled code does not contain this
            raise RuntimeError("torch.compile left it as Python")
        return function(*args, **kwargs)

    return (compile or torch.compile)(compiled)
