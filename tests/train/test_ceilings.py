"""The measured ceilings of whatever this machine is."""

import pytest
import torch

from train.ceilings import measure_bandwidth, measure_ceilings

CPU = torch.device("cpu")


def test_they_are_what_computers_have() -> None:
    before = torch.random.get_rng_state()
    ceilings = measure_ceilings(CPU, torch.float32)
    assert 1e8 < ceilings.flops < 1e15
    assert 1e8 < ceilings.bandwidth < 1e13
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_read_counts_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a copy takes two seconds by: twice the size in that time."""
    seconds = iter(range(0, 10**6, 2))
    monkeypatch.setattr("train.ceilings.time.perf_counter", lambda: next(seconds))
    assert measure_bandwidth(CPU, budget=20, size=4096) == 2 * 4096 / 2
