"""Shared by the tests of the benchmarks."""

import functools

import pytest
import torch

from bench import entrants, timing


@pytest.fixture
def everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused functions count as runnable: the toys are plain torch. What is compiled is compiled without Inductor."""
    monkeypatch.setattr(entrants, "why_not_fused", lambda device: "")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> timing.Clock:
    """In place of the host's."""
    clock = timing.Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    return clock
