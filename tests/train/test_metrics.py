"""The step timer, with a clock that moves only by command."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.metrics import StepTimer, mfu, tokens_per_second


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0  # a clock may start anywhere

    def __call__(self) -> float:
        return self.now


def test_reference_log_line():
    assert mfu(1.16e12, 33.22e-3, 312e12) == pytest.approx(0.112, abs=1e-3)
    assert mfu(1.16e12 * 8, 33.22e-3, 312e12 * 8) == mfu(1.16e12, 33.22e-3, 312e12)
    assert tokens_per_second(16_384, 0.5) == 32_768


@given(
    durations=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    log_interval=st.integers(1, 12),
    eval_interval=st.integers(1, 12),
    eval_ticks=st.integers(0, 1000),
)
def test_laps_are_the_means_of_their_own_iterations(durations, log_interval, eval_interval, eval_ticks):
    """As in the loop: pauses appear in no log line, and no iteration is lost or counted twice."""
    clock = Clock()
    timer = StepTimer(clock)
    timer.start()
    since, logged = [], 0
    for i, ticks in enumerate(durations):
        if i % eval_interval == 0:
            timer.pause()
            clock.now += eval_ticks
            timer.start()
        clock.now += ticks
        timer.step()
        since.append(ticks)
        if i % log_interval == 0:
            assert timer.lap() == (sum(since) / len(since), len(since))
            logged += len(since)
            since = []
    assert logged + len(since) == len(durations)


@given(st.lists(st.tuples(st.sampled_from(["start", "pause", "step", "lap"]), st.integers(0, 100)), max_size=80))
def test_laps_add_up_to_the_running_time(events):
    clock = Clock()
    timer = StepTimer(clock)
    running, expected, total, steps = False, 0, 0.0, 0
    for name, ticks in [*events, ("step", 0), ("lap", 0)]:
        result = getattr(timer, name)()
        if name == "lap":
            total += result[0] * result[1]
            steps -= result[1]
        steps += name == "step"
        running = name == "start" or (running and name != "pause")
        clock.now += ticks
        expected += ticks * running
    assert steps == 0
    assert total == pytest.approx(expected, abs=1e-6)
