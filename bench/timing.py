"""How long things take: on a CUDA device by its own events, elsewhere by the host's clock; caches cold, all by turns.

Whatever is compared is measured in one process and in turn, one sample of each, then the next of each: a device that
slows down slows all of them. Every sample is kept.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.hardware import synchronize


@dataclass(frozen=True)
class Staged:
    """Work on something that is made anew for each sample, outside the clock, and given up after it: a graph of a
    forward pass, to go backward through."""

    prepare: Callable[[], Any]
    work: Callable[[Any], object]

    def __call__(self) -> None:
        self.work(self.prepare())


Work = Callable[[], object] | Staged


class Cold:
    """Empties a device's caches, by writing a buffer larger than they are.

    On a GPU it also takes long enough, a few hundred microseconds, for the host to queue what is timed after it.
    """

    def __init__(self, device: torch.device) -> None:
        size = max(2 * cache_bytes(device), 2**29 if device.type == "cuda" else 0)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: the L2 of a GPU, the L3 of a CPU (32 MiB where it does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=2**25)


def by_turns(
    works: Mapping[str, Work], device: torch.device, *, seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[float]]:
    """Seconds of each sample of each work, their caches cold, after one call that is not counted.

    Rounds of one sample each are made for about `seconds` in all, at least `least` and at most `most` of them.
    """
    cold = Cold(device)
    for work in works.values():
        work()
    synchronize(device)
    take = _device_sample if device.type == "cuda" else _host_sample
    samples: dict[str, list[float]] = {name: [] for name in works}
    deadline = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > deadline:
            break
        for name, work in works.items():
            samples[name].append(take(work, cold, device))
    return samples


def _ready(work: Work) -> Callable[[], object]:
    """What is to be timed, made ready."""
    return partial(work.work, work.prepare()) if isinstance(work, Staged) else work


def _device_sample(work: Work, cold: Cold, device: torch.device) -> float:
    """Between two events on the device; the flush before hides the launches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    timed = _ready(work)
    cold()
    begin.record()
    timed()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _host_sample(work: Work, cold: Cold, device: torch.device) -> float:
    timed = _ready(work)
    cold()
    synchronize(device)
    begin = time.perf_counter()
    timed()
    synchronize(device)
    return time.perf_counter() - begin


class Clock:
    """A clock that shows what it is told: by it pytest-benchmark times samples that were taken by turns before."""

    __name__ = "Clock"  # what pytest-benchmark calls it in its files

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def restart(self) -> None:
        """Back to nought, from where no sum is rounded."""
        self._now = 0.0

    def let_pass(self, seconds: float) -> None:
        self._now += seconds
