"""Shared by the kernels' tests. Fixtures import what needs Triton: where it is missing, tests are skipped."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.kernels.watcher import Memory


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU, or this CPU in Triton's interpreter."""
    from kernels.launch import INTERPRETED

    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers every time: a bound that one in a million draws misses must not fail somebody's commit."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> "Memory | None":
    """Every access of every kernel is checked against the bounds of its tensors; None on a GPU."""
    pytest.importorskip("triton")
    from kernels.launch import INTERPRETED
    from tests.kernels.rounding import round_to_nearest
    from tests.kernels.watcher import watch

    if not INTERPRETED:
        return None
    round_to_nearest(monkeypatch)
    return watch(monkeypatch)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest): a store that was missed shows."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # as use_deterministic_algorithms, which imports Inductor: seconds
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_deterministic_debug_mode(before)
