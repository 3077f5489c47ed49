"""The learning rate, compared with nanoGPT's formula."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import TrainConfig
from train.loop import learning_rate


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
    """Also where the warmup is longer than the decay, as in nanoGPT's recipe for a CPU. It comes first."""
    decay = max(warmup + length, 0)
    config = TrainConfig(warmup_iters=warmup, lr_decay_iters=decay, learning_rate=high, min_lr=low)
    constant = dataclasses.replace(config, decay_lr=False)
    corners = {0, 1, warmup // 2, warmup, (warmup + decay) // 2, decay, 2 * decay, warmup + int(part * length)}
    for n in sorted({max(c + d, 0) for c in corners for d in (-1, 0, 1)}):
        rate = learning_rate(n, config)
        assert rate == pytest.approx(expected(n, warmup, decay, high, low), rel=1e-9, abs=1e-12)
        assert 0 <= rate <= max(high, low) * (1 + 1e-12)
        assert learning_rate(n, constant) == high
