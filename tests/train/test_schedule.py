"""The loop's arithmetic: the learning rate, compared with nanoGPT's, and the mean time of an iteration."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import TrainConfig
from train.loop import StepTimer, learning_rate


def config(warmup: int, decay: int, high: float = 1e-3, low: float = 1e-4, **changes) -> TrainConfig:
    return TrainConfig(warmup_iters=warmup, lr_decay_iters=decay, learning_rate=high, min_lr=low, **changes)


def expected(n: int, warmup: int, decay: int, high: float, low: float) -> float:
    """Up to `high` in warmup + 1 equal steps, then down by the half-angle form of the cosine."""
    if n < warmup:
        return high - high * (warmup - n) / (warmup + 1)
    if n > decay or warmup == decay:
        return low
    return low + (high - low) * math.cos(math.pi / 2 * (n - warmup) / (decay - warmup)) ** 2


rates = st.floats(0, 1)


@given(warmup=st.integers(0, 3000), length=st.integers(-4000, 10**6), high=rates, low=rates, part=st.floats(0, 1))
def test_the_formula_at_every_corner(warmup, length, high, low, part):
    decay = max(warmup + length, 0)
    settings = config(warmup, decay, high, low)
    corners = {0, 1, warmup // 2, warmup, (warmup + decay) // 2, decay, 2 * decay, warmup + int(part * length)}
    for n in sorted({max(c + d, 0) for c in corners for d in (-1, 0, 1)}):
        rate = learning_rate(n, settings)
        assert rate == pytest.approx(expected(n, warmup, decay, high, low), rel=1e-9, abs=1e-12)
        assert 0 <= rate <= max(high, low) * (1 + 1e-12)


def test_a_warmup_longer_than_the_decay():
    """nanoGPT's recipe for a CPU has it. The warmup comes first."""
    settings = config(50, 20)
    assert learning_rate(20, settings) == learning_rate(20, config(50, 500))
    assert learning_rate(50, settings) == 1e-4


def test_decay_lr_off_is_constant():
    settings = config(10, 100, decay_lr=False)
    assert {learning_rate(n, settings) for n in (0, 1, 10, 50, 100, 1000)} == {1e-3}


class Clock:
    """A clock that moves only by command."""

    def __init__(self) -> None:
        self.now = 1000.0  # a clock may start anywhere

    def __call__(self) -> float:
        return self.now


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
    since = []
    for i, ticks in enumerate(durations):
        if i % eval_interval == 0:
            timer.pause()
            clock.now += eval_ticks
            timer.start()
        clock.now += ticks
        timer.step()
        since.append(ticks)
        if i % log_interval == 0:
            assert timer.lap() == pytest.approx(sum(since) / len(since))
            since = []
