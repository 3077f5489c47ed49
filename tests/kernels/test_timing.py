"""Samples: by turns, and of nothing but the work; on a GPU of nothing but the device's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from bench.rules import Clock
from kernels.capture import WARM_UP
from kernels.timing import CudaMeter, Staged, by_turns, milliseconds

CPU = torch.device("cpu")


def test_samples_are_taken_by_turns(clock: Clock) -> None:
    order = []

    def work(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock.let_pass(seconds)

        return run

    works = {"a": work("a", 0.25), "b": work("b", 0.5)}
    samples = by_turns(works, CPU, seconds=2.0, least=2)
    assert samples == {"a": [0.25] * 3, "b": [0.5] * 3}  # 0.75 s a round, until 2 s have passed
    assert order == ["a", "b"] * 4  # the first is not counted
    assert milliseconds(works["a"], CPU, seconds=0.0) == 250.0


def test_what_is_made_for_a_sample_is_made_outside_the_clock(clock: Clock) -> None:
    made: Iterator[int] = iter(range(100))
    used = []

    def prepare() -> int:
        clock.let_pass(10.0)
        return next(made)

    def work(given: int) -> None:
        used.append(given)
        clock.let_pass(0.5)

    samples = by_turns({"staged": Staged(prepare, work)}, CPU, seconds=0, least=4)
    assert samples == {"staged": [0.5] * 4}
    assert used == [0, 1, 2, 3, 4]  # a new one each time


# A GPU, simulated: the host asks, the device does what it was asked for, one after the other


@dataclass
class Simulated:
    """In place of `Gpu`. Times in seconds since the beginning, the device's at the end of all that it was asked for."""

    captures: bool = True
    host: float = 0.0
    device: float = 0.0
    flushes: int = 0
    calls: list[str] = field(default_factory=list)
    graph: list[float] | None = None  # device seconds of what is being captured

    def ask(self, host: float, device: float) -> None:
        self.host += host
        if self.graph is None:
            self.device = max(self.device, self.host) + device
        else:
            self.graph.append(device)

    def flush(self) -> None:
        self.flushes += 1
        self.ask(host=5e-6, device=2e-4)

    def event(self) -> "Event":
        return Event(self, max(self.host, self.device))

    def wait(self, until: float) -> None:
        self.host = max(self.host, until)

    def capture(self, work: Staged) -> Staged:
        for _ in range(WARM_UP):
            work()
        given: list = []
        prepare, run = (
            self.recorded(lambda: given.append(work.prepare())),
            self.recorded(lambda: work.work(given.pop())),
        )
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Staged(prepare, lambda nothing: run())

    def recorded(self, run: Callable[[], object]) -> Callable[[], None]:
        self.graph = []
        run()
        total, self.graph = sum(self.graph), None
        return lambda: self.ask(host=1e-5, device=total)


@dataclass
class Event:
    gpu: Simulated
    at: float

    def query(self) -> bool:
        return self.gpu.host >= self.at

    def synchronize(self) -> None:
        self.gpu.wait(self.at)

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


def operation(gpu: Simulated, name: str, launches: int = 10) -> Callable[..., None]:
    """40 us of the host's and 2 us of the device's a launch, as a small operation under autograd."""

    def run(*given: object) -> None:
        gpu.calls.append(name)
        for _ in range(launches):
            gpu.ask(host=40e-6, device=2e-6)

    return run


@pytest.mark.parametrize("captures", [True, False])
def test_what_the_host_needs_to_ask_is_not_counted(captures: bool) -> None:
    gpu = Simulated(captures)
    works = {"small": operation(gpu, "small"), "large": operation(gpu, "large", 60)}  # 2.4 ms of the host's
    samples = by_turns(works, CPU, seconds=0, least=3, meter=CudaMeter(gpu))
    assert samples == {"small": pytest.approx([20e-6] * 3), "large": pytest.approx([120e-6] * 3)}


@pytest.mark.parametrize("captures", [True, False])
def test_a_backward_pass_is_timed_without_the_forward_pass_that_it_needs(captures: bool) -> None:
    gpu = Simulated(captures)
    staged = Staged(operation(gpu, "forward", 50), operation(gpu, "backward"))
    samples = by_turns({"": staged}, CPU, seconds=0, least=3, meter=CudaMeter(gpu))
    assert samples[""] == pytest.approx([20e-6] * 3)


def test_what_was_captured_is_replayed_and_caches_are_emptied_before_each() -> None:
    gpu = Simulated()
    staged = Staged(operation(gpu, "forward"), operation(gpu, "backward"))
    by_turns({"": staged}, CPU, seconds=0, least=7, meter=CudaMeter(gpu))
    assert gpu.calls == ["forward", "backward"] * (WARM_UP + 1)
    assert gpu.flushes == 7


def test_work_that_waits_for_the_device_is_timed_with_its_wait() -> None:
    gpu = Simulated(captures=False)

    def waiting() -> None:
        gpu.ask(host=1e-5, device=1e-5)
        gpu.wait(gpu.device)
        gpu.ask(host=1e-5, device=1e-5)

    (sample,) = by_turns({"": waiting}, CPU, seconds=0, least=1, meter=CudaMeter(gpu))[""]
    assert sample == pytest.approx(3e-5)
