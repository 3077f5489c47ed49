"""How long work takes, with cold caches: on a CUDA device by its own events, elsewhere by the host's clock.

Works that are compared are measured in one process, by turns: one sample of each, then the next of each. If the device
slows down, all of them are slower. Every sample is kept.

On a GPU the host may need 0.1 to 0.6 ms to launch an operation with autograd, longer than the device needs to run it.
Training replays graphs instead. So the work is captured in a CUDA graph and replayed. If that is not possible, the
device is kept busy until the host has launched all of the work.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.capture import capture_graphs, side_stream

MOST = 200  # rounds of samples
FLUSHES = 64  # of the caches before a sample, at most: about 13 ms of an H100


@dataclass(frozen=True)
class Staged:
    """Work whose input is made for each sample before the clock starts. A forward pass prepares a backward pass."""

    prepare: Callable[[], Any]
    work: Callable[[Any], object]

    def __call__(self) -> None:
        self.work(self.prepare())


Timeable = Callable[[], object] | Staged


def by_turns(
    works: Mapping[str, Timeable], device: torch.device, *, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of each sample of each work, with cold caches. The first calls are not counted.

    A round is one sample of each work. There are rounds for about `seconds`, at least `least` and at most MOST.
    """
    meter = CudaMeter(device) if device.type == "cuda" else Meter(device)
    ready = {name: meter.ready(work if isinstance(work, Staged) else _unprepared(work)) for name, work in works.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    deadline = time.perf_counter() + seconds
    for done in range(MOST):
        if done >= least and time.perf_counter() > deadline:
            break
        for name, work in ready.items():
            samples[name].append(meter.sample(work))
    return samples


def milliseconds(work: Timeable, device: torch.device, seconds: float = 0.1) -> float:
    """The median of the samples of one work."""
    return 1e3 * statistics.median(by_turns({"": work}, device, seconds=seconds)[""])


def _unprepared(work: Callable[[], object]) -> Staged:
    return Staged(lambda: None, lambda nothing: work())


class Meter:
    """Takes samples by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # emptying the caches is writing a larger buffer; a GPU takes about 0.2 ms for it
        size = max(2 * cache_bytes(device), 2**29 if device.type == "cuda" else 0)
        self.flush: Callable[[], object] = torch.empty(size, dtype=torch.uint8, device=device).zero_

    def ready(self, work: Staged) -> Staged:
        """The work in the form that is timed, after calls that are not counted."""
        work()
        return work

    def sample(self, work: Staged) -> float:
        """Seconds of one call, without its preparation."""
        given = work.prepare()
        self.flush()
        self._wait()
        begin = time.perf_counter()
        work.work(given)
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "mps":
            torch.mps.synchronize()


class CudaMeter(Meter):
    """By events of the device around a replay of the captured work. The host stays ahead of the device.

    Emptying the caches before each sample takes time. In this time the host launches the work. If the device reaches
    the first event before the host is done, the caches are emptied twice as often, and the sample is taken again.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._side, self._pool = side_stream(device), torch.cuda.graph_pool_handle()

    def ready(self, work: Staged) -> Staged:
        try:
            captured = self.capture(work)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of any type: from CUDA, from Triton, from a library
            captured = work
        captured()
        return captured

    def sample(self, work: Staged) -> float:
        flushes = 1
        while True:
            given = work.prepare()
            for _ in range(flushes):
                self.flush()
            begin = self.event()
            work.work(given)
            late = begin.query()  # the device has reached the event: it may have waited for the host
            end = self.event()
            end.synchronize()
            if not late or flushes >= FLUSHES:  # a work that still is late waits for the device itself
                return begin.elapsed_time(end) / 1e3
            flushes *= 2

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def capture(self, work: Staged) -> Staged:
        """`work` as replays of two graphs, its preparation and itself. Raises the error if it cannot be captured.

        The second graph reads the results of the first in the memory where the first one puts them. The graphs of one
        meter share one pool of memory. So a preparation and its work must be replayed together, before another work is.
        """
        gc.collect()  # a dropped cycle may hold a node of autograd that remembers its stream and breaks the capture
        given: list[Any] = []
        runs = [lambda: given.append(work.prepare()), lambda: work.work(given.pop())]
        with torch.cuda.device(self.device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # of a preparation that launches nothing
            try:
                prepare, replay = capture_graphs([work], runs, self._side, self._pool)
            except Exception:
                self._pool = torch.cuda.graph_pool_handle()  # the old one cannot be captured with again
                raise
        return Staged(prepare, lambda nothing: replay())


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: the L2 of a GPU, the L3 of a CPU (32 MiB if the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=2**25)
