"""torch.compile under measurement: what is called compiled is compiled, for its own shapes, before the clock runs.

torch counts compilations by code object, not by model, and all variants of a step share one. After eight it compiles
no more, warns once, and runs Python. And what it meets in a second shape it compiles for all shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Function = Callable[..., Any]

LIMIT = 10_000  # compilations of one code object; a variant makes two: without dropout, and as it is timed


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


def only_compiled(function: Function, compile: Callable[[Function], Function] | None = None) -> Function:
    """`function`, or a model, compiled; a call that would run it as Python after all raises a RuntimeError.

    compile: what calls torch.compile; None for itself.
    """

    def compiled(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # compiled code has nothing of this
            raise RuntimeError("torch.compile left it as Python")
        return function(*args, **kwargs)

    return (compile or torch.compile)(compiled)
