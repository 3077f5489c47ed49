"""Does on a CPU what a CUDA graph does to a step: records its tensor operations once and replays them without the host.

The operations are recorded at dispatch level, with the same tensors and numbers that they were called with. In a replay
each writes its results to the same place. So everything that comes from the host is frozen, as in a graph: a Python
number, a tensor made outside, a branch. Random operations use the generator again, as in a graph.

Graphs share their memory: one overwrites the results of another. So after each replay a tape overwrites all tensors
that it made itself with NaN.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.graph import Task, Work


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict[str, Any], list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        inputs = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        # views and results written in place need no copying back
        fresh = [
            (i, x)
            for i, x in enumerate(tree_leaves(results))
            if isinstance(x, Tensor) and (storage(x) not in inputs or x.numel() == 0)
        ]
        self.calls.append((func, args, kwargs, fresh))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, fresh in self.calls:
            results = tree_leaves(func(*args, **kwargs))
            for i, there in fresh:
                there.copy_(results[i])
        self.spoil()

    @torch.no_grad()
    def spoil(self) -> None:
        """Overwrite the tape's own tensors with NaN: another graph would use their memory."""
        for there in (x for *_, fresh in self.calls for _, x in fresh if x.is_floating_point()):
            there.fill_(float("nan"))


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def tape(tasks: list[Task]) -> list[Work]:
    """A `Capture`. Runs each task once as a warm-up and once to record it."""
    for task in tasks:
        task.warm_up()
    recorders = [Tape() for _ in tasks]
    for task, recorder in zip(tasks, recorders, strict=True):
        task.prepare()
        with recorder:
            task.run()
        recorder.spoil()
    return [recorder.replay for recorder in recorders]
