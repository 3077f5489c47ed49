"""Shared by all tests."""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports kernels: Triton decides when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")  # tests/rehearsal says 0

if importlib.util.find_spec("hypothesis"):  # `-m gpu` does without
    from hypothesis import HealthCheck, settings

    # The same examples every time: an error bound that one in a million draws misses must not fail somebody's commit.
    # `pytest --hypothesis-profile=default` draws others. No clock decides: a machine may be busy.
    unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("repeatable", derandomize=True, **unhurried)
    settings.load_profile("repeatable")

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: one thread each, in the commands that tests start too
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def compiler() -> None:
    """For tests that compile: skips them where torch.compile has no C++ compiler or no Python headers to work with."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except Exception as error:
        pytest.skip(f"torch.compile does not work on this machine: {str(error).strip().splitlines()[0]}")


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Each test compiles anew: after eight variants of a function in one process Dynamo leaves it eager, with a warning
    only, and a later test would compare eager code with eager code."""
    if "torch._dynamo" in sys.modules:  # importing it takes a second
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def whole_float32() -> None:
    """A run on a GPU lets float32 matmuls take TF32, for the whole process. Each test begins without."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """In place of the host's: it shows what it is told."""
    from tests.clock import Clock

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Where Triton is not installed, on a Mac for one, the files that import it are skipped."""
    report = yield
    if report.failed and "No module named 'triton'" in str(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(collector.path), None, "Skipped: Triton is not installed")
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """`-n auto` on a machine with a GPU: no workers, since some tests need most of the GPU's memory."""
    return 0 if torch.cuda.is_available() else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu`, and `-m "gpu and smoke"`, open no file without GPU tests: torch, triton, numpy, tiktoken, msgspec and
    pytest are all that these need."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    wanted = config.option.markexpr in ("gpu", "gpu and smoke")
    if wanted and is_test and "pytest.mark.gpu" not in collection_path.read_text():
        return True
    return None
