"""Shared by the kernels' tests."""

from collections.abc import Iterator

import pytest
import torch

from kernels.launch import INTERPRETED
from tests.kernels.rounding import round_to_nearest
from tests.kernels.watcher import Memory, watch


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU, or this CPU in Triton's interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory | None:
    """Every access of every kernel is checked against the bounds of its tensors; None on a GPU."""
    if not INTERPRETED:
        return None
    round_to_nearest(monkeypatch)
    return watch(monkeypatch)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest): a store that was missed shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
