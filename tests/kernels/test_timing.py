"""Samples: by turns, and of nothing but the work. What captures need: tests/rehearsal/test_timing.py."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from kernels.timing import FLUSHES, CudaMeter, Staged, by_turns, milliseconds
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
    """A GPU, one time for the host and one for the device, which does what it is asked for in order. An event is the
    device's time when it is reached."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.flushes = 0

    def ask(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def flush(self) -> None:
        self.flushes += 1
        self.ask(host=5e-6, device=2e-4)

    def event(self) -> SimpleNamespace:
        at = max(self.host, self.device)

        def synchronize() -> None:
            self.host = max(self.host, at)

        return SimpleNamespace(
            at=at,
            query=lambda: self.host >= at,
            synchronize=synchronize,
            elapsed_time=lambda end: 1e3 * (end.at - at),
        )


@pytest.mark.parametrize(
    ("launches", "waits", "seconds", "flushes"),
    [
        (4, False, 4 * 2e-6, 1),
        (60, False, 60 * 2e-6, 1 + 2 + 4 + 8 + 16),
        (1, True, 42e-6, 2 * FLUSHES - 1),  # a wait of the work's own counts
    ],
)
def test_what_the_host_needs_to_launch_is_not_counted(launches: int, waits: bool, seconds: float, flushes: int) -> None:
    """40 us of the host's and 2 us of the device's for each launch."""
    gpu = Simulated()

    def run(given: None) -> None:
        if waits:
            gpu.host = gpu.device
        for _ in range(launches):
            gpu.ask(host=40e-6, device=2e-6)

    assert gpu.sample(Staged(lambda: None, run)) == pytest.approx(seconds)
    assert gpu.flushes == flushes
