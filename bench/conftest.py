"""What `pytest bench/` shows of samples that were taken by turns: pytest-benchmark's tables, and one of our own."""

from collections import Counter
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest

from bench.session import CLOCK, SESSION, Session
from bench.tables import kernels_table, key, steps_table
from train.hardware import device_name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nanogpt_dir", default="", help="folder of a nanoGPT checkout, timed beside our steps")


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    return Session.of(request.config)


@pytest.fixture
def seconds(request: pytest.FixtureRequest, benchmark: Any) -> float:
    """How long the samples of one group may take, all its variants together: `--benchmark-max-time`."""
    return 0.0 if benchmark.disabled else float(request.config.getoption("benchmark_max_time"))


@pytest.fixture
def show(benchmark: Any) -> Callable[[list[float]], None]:
    """Gives pytest-benchmark samples that were taken before: its rounds take exactly as long, by `CLOCK`."""

    def show(samples: list[float]) -> None:
        turns = cycle(samples)
        benchmark.pedantic(lambda: CLOCK.let_pass(next(turns)), setup=CLOCK.restart, rounds=len(samples), iterations=1)

    return show


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is not None and session.kernels:
        _show_kernels(terminalreporter, session)
    if session is not None and session.steps:
        _show_steps(terminalreporter, session)


def _show_steps(terminalreporter: Any, session: Session) -> None:
    terminalreporter.section("training steps")
    terminalreporter.line(
        f"{device_name(session.device)}; peak {session.peak.flops / 1e12:.4g} TFLOP/s: {session.peak.source}"
    )
    for workload in dict.fromkeys(row.workload for row in session.steps):
        terminalreporter.line("")
        terminalreporter.line(workload)
        rows = [row for row in session.steps if row.workload == workload]
        terminalreporter.line(steps_table(rows, session.peak.flops))
        for row in rows:
            if row.skipped:
                terminalreporter.line(f"not timed: {row.variant}: {row.skipped}")


def _show_kernels(terminalreporter: Any, session: Session) -> None:
    flops, bandwidth = session.ceilings.flops, session.ceilings.bandwidth
    terminalreporter.section("kernels")
    measured = f"a matmul {flops / 1e12:.4g} TFLOP/s, a copy {bandwidth / 1e9:.4g} GB/s"
    terminalreporter.line(f"{device_name(session.device)}; its ceilings, measured: {measured}")
    terminalreporter.line(kernels_table(session.kernels, flops, bandwidth))
    for (variant, reason), count in Counter((r.variant, r.skipped) for r in session.kernels if r.skipped).items():
        terminalreporter.line(f"not timed: {variant} ({count} rows): {reason}")
    groups = len({key(row) for row in session.kernels})
    terminalreporter.line(f"{len(session.kernels)} rows in {groups} groups")
