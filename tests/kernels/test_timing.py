"""Samples: by turns, and of nothing but the work; on a GPU of nothing but the device's."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from kernels.timing import CudaMeter, Staged, by_turns, milliseconds
from tests.clock import Clock

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
    made, used = iter(range(100)), []

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

    captures: bool
    host: float = 0.0
    device: float = 0.0
    flushes: int = 0
    replaying: bool = False

    def ask(self, host: float, device: float) -> None:
        self.host += 0.0 if self.replaying else host
        self.device = max(self.device, self.host) + device

    def flush(self) -> None:
        self.flushes += 1
        self.ask(host=5e-6, device=2e-4)

    def event(self) -> "Event":
        return Event(self, max(self.host, self.device))

    def capture(self, work: Staged) -> Staged:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replayed(run: Callable[..., object]) -> Callable[..., object]:
            def replay(*given: object) -> object:
                self.ask(host=1e-5, device=0.0)
                self.replaying = True
                result = run(*given)
                self.replaying = False
                return result

            return replay

        return Staged(replayed(work.prepare), replayed(work.work))


@dataclass
class Event:
    gpu: Simulated
    at: float

    def query(self) -> bool:
        return self.gpu.host >= self.at

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("captures", [True, False])
def test_neither_what_the_host_needs_to_ask_nor_a_preparation_is_counted(captures: bool) -> None:
    gpu = Simulated(captures)

    def launches(count: int) -> Callable[..., None]:
        """40 us of the host's and 2 us of the device's each, as a small operation under autograd."""

        def run(*given: object) -> None:
            for _ in range(count):
                gpu.ask(host=40e-6, device=2e-6)

        return run

    works = {"small": launches(10), "large": launches(60), "backward": Staged(launches(50), launches(10))}
    samples = by_turns(works, CPU, seconds=0, least=3, meter=CudaMeter(gpu))
    assert samples == {
        "small": pytest.approx([20e-6] * 3),
        "large": pytest.approx([120e-6] * 3),
        "backward": pytest.approx([20e-6] * 3),
    }
    if captures:
        assert gpu.flushes == 9  # the caches, before each sample


def test_work_that_waits_for_the_device_is_timed_with_its_wait() -> None:
    gpu = Simulated(captures=False)

    def waiting() -> None:
        gpu.ask(host=1e-5, device=1e-5)
        gpu.host = gpu.device
        gpu.ask(host=1e-5, device=1e-5)

    (sample,) = by_turns({"": waiting}, CPU, seconds=0, least=1, meter=CudaMeter(gpu))[""]
    assert sample == pytest.approx(3e-5)
