"""Fixtures of `pytest bench/`: samples are taken by turns, then shown in pytest-benchmark's tables and our own."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from bench.results import WRONG, Kernel, Results, Step, started, with_ceilings
from bench.rules import Clock
from bench.tables import summary
from train.hardware import resolve_device, resolve_dtype, use_device


@dataclass
class Session:
    """The results of this run of pytest."""

    device: torch.device
    dtype: torch.dtype
    results: Results

    def add(self, **found: object) -> None:
        self.results = replace(self.results, **found)


CLOCK, SESSION = pytest.StashKey[Clock](), pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nanogpt_dir", default="", help="folder of a nanoGPT checkout, timed beside our steps")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CLOCK] = Clock()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=item.config.stash[CLOCK]))


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    device = use_device(resolve_device("auto"))
    dtype = resolve_dtype("auto", device)
    results = with_ceilings(started(device, dtype, "pytest bench/"), device, dtype, seconds=3.0)
    request.config.stash[SESSION] = session = Session(device, dtype, results)
    return session


@pytest.fixture
def show(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Gives a row's samples to pytest-benchmark: each of its rounds moves our `Clock` on by one sample.

    A row without samples skips the test. A row whose check failed fails the test.
    """
    clock = request.config.stash[CLOCK]

    def show(row: Kernel | Step, group: str, facts: dict[str, Any]) -> None:
        if row.skipped:
            if row.skipped.startswith(WRONG):
                pytest.fail(row.skipped, pytrace=False)
            pytest.skip(row.skipped)
        turns, benchmark.group = cycle(row.seconds), group
        benchmark.extra_info |= facts
        benchmark.pedantic(
            lambda: clock.let_pass(next(turns)), setup=clock.restart, rounds=len(row.seconds), iterations=1
        )

    return show


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if session := config.stash.get(SESSION, None):
        terminalreporter.section("measured by turns")
        terminalreporter.line(summary(session.results))
