"""Samples: by turns, and of nothing but the work; on a GPU of nothing but the device's."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from kernels.timing import CudaMeter, Staged, by_turns, milliseconds
from tests.clock import Clock

CPU = torch.device("cpu")


def test_samples_are_taken_by_turns_and_of_the_work_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.timing.cache_bytes", lambda device: 1)
    order = []

    def work(name: str, seconds: float) -> Callable[..., str]:
        def run(given: object = None) -> str:
            order.append(name)
            clock.let_pass(seconds)
            return name

        return run

    works = {"a": work("a", 0.25), "b": Staged(work("prepared", 0.25), work("b", 0.5))}
    samples = by_turns(works, CPU, seconds=1.5, least=1)
    assert samples == {"a": [0.25] * 2, "b": [0.5] * 2}  # 1 s a round, until 1.5 s have passed
    assert order == ["a", "prepared", "b"] * 3  # the first is not counted
    assert milliseconds(works["a"], CPU, seconds=0.0) == 250.0


class Simulated(CudaMeter):
    """A GPU: the host asks, the device does what it was asked for, one after the other. Times in seconds since the
    beginning, the device's at the end of all that it was asked for."""

    def __init__(self, *, captures: bool) -> None:
        self.captures, self.replaying = captures, False
        self.host = self.device = 0.0
        self.flushes = 0

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
def test_neither_what_the_host_needs_to_ask_nor_a_preparation_is_counted(
    captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Simulated(captures=captures)
    monkeypatch.setattr("kernels.timing.CudaMeter", lambda device: gpu)

    def launches(count: int) -> Callable[..., None]:
        """40 us of the host's and 2 us of the device's each, as a small operation under autograd."""

        def run(*given: object) -> None:
            for _ in range(count):
                gpu.ask(host=40e-6, device=2e-6)

        return run

    def waiting() -> None:
        launches(5)()
        gpu.host = gpu.device
        launches(5)()

    works = {"small": launches(10), "large": launches(60), "backward": Staged(launches(50), launches(10))}
    expected = {"small": 20e-6, "large": 120e-6, "backward": 20e-6}
    if not captures:  # a wait of the work's own counts
        works["waiting"], expected["waiting"] = waiting, 212e-6
    samples = by_turns(works, torch.device("cuda"), seconds=0, least=3)
    assert samples == {name: pytest.approx([seconds] * 3) for name, seconds in expected.items()}
    if captures:
        assert gpu.flushes == 9  # the caches, before each sample
