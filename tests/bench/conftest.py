"""Shared by the tests of the benchmarks."""

import functools

import pytest
import torch

from bench import kernels


@pytest.fixture
def everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused functions count as runnable: the toys are plain torch. What is compiled is compiled without Inductor."""
    monkeypatch.setattr(kernels, "why_not_fused", lambda device: "")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
