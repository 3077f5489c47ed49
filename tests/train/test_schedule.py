"""The schedule, compared with that of nanoGPT's train.py, and at its corners."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import TrainConfig
from train.schedule import learning_rate


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


def test_the_corners_themselves():
    settings = config(10, 110)
    assert learning_rate(0, settings) == pytest.approx(1e-3 / 11)  # never 0
    assert learning_rate(9, settings) == pytest.approx(1e-3 * 10 / 11)
    assert learning_rate(10, settings) == 1e-3
    assert learning_rate(60, settings) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(110, settings) == pytest.approx(1e-4)
    assert learning_rate(111, settings) == learning_rate(10**9, settings) == 1e-4


def test_warmup_that_leaves_no_room_for_a_decay():
    settings = config(50, 50)
    assert learning_rate(49, settings) == pytest.approx(1e-3 * 50 / 51)
    assert learning_rate(50, settings) == learning_rate(51, settings) == 1e-4
    assert learning_rate(0, config(0, 0)) == 1e-4
    settings = config(50, 20)  # nanoGPT's recipe for a CPU: it asks for the warmup first
    assert learning_rate(20, settings) == learning_rate(20, config(50, 500))
    assert learning_rate(50, settings) == 1e-4


def test_decay_lr_off_is_constant():
    settings = config(10, 100, decay_lr=False)
    assert {learning_rate(n, settings) for n in (0, 1, 10, 50, 100, 1000)} == {1e-3}
