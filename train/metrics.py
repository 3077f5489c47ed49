"""The arithmetic behind the log line: how long an iteration took, how well the devices were used. No torch.

The clock sees what the host sees: wait for the device before `lap` and `pause`, or queued work is missed.
"""

import time
from collections.abc import Callable


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation, 0 to 1: `flops` in `seconds` on devices of `peak` FLOP/s together."""
    return flops / (seconds * peak)


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Throughput; `tokens` counts every rank's and every micro-step's."""
    return tokens / seconds


class StepTimer:
    """The mean time of an iteration since the last log line, with pauses for what is not training.

        timer.start()
        while training:
            if time to evaluate:
                synchronize; timer.pause(); evaluate and save; timer.start()
            train one iteration; timer.step()
            if time to log:
                synchronize; seconds, n = timer.lap()

    The laps add up to the whole running time, however often one is taken; what lies between pause() and
    start() never counts.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: float | None = None  # when the running stretch began, None while paused
        self._banked = 0.0  # seconds of this lap's finished stretches
        self._steps = 0

    def start(self) -> None:
        """Run; nothing happens if it runs already."""
        if self._since is None:
            self._since = self._clock()

    def pause(self) -> None:
        """Stand still until start(); nothing happens if it stands already."""
        if self._since is not None:
            self._banked += self._clock() - self._since
            self._since = None

    def step(self) -> None:
        """Count one iteration."""
        self._steps += 1

    def lap(self) -> tuple[float, int]:
        """(mean seconds of an iteration, how many) since the last lap; begins the next one.

        Without an iteration it is (0.0, 0), and the time is carried into the next lap.
        """
        if self._steps == 0:
            return 0.0, 0
        seconds = self._banked
        if self._since is not None:
            now = self._clock()
            seconds += now - self._since
            self._since = now
        steps = self._steps
        self._banked, self._steps = 0.0, 0
        return seconds / steps, steps
