"""pytest bench/ --benchmark-only: whole training steps, the reference implementation's and ours, mode by mode.

One test a variant, one group of pytest-benchmark's a workload. A workload's variants are measured together, by turns,
when the first of its tests wants them. `--nanogpt_dir=DIR` puts a nanoGPT checkout beside them.
"""

from collections.abc import Callable
from typing import Any

import pytest

from bench import schema, steps
from bench.session import CLOCK, Session
from bench.tables import step_facts
from bench.variants import variants
from bench.workloads import DEFAULTS, WORKLOADS

SECONDS = {"cuda": 40.0, "cpu": 30.0}  # of samples, a workload's


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = Session.of(metafunc.config)
    every = variants(session.device, session.dtype, metafunc.config.getoption("nanogpt_dir"))
    metafunc.parametrize(
        ("workload", "variant"),
        [
            pytest.param(workload, variant.name, id=f"{workload}-{variant.name.replace(' ', '_')}")
            for workload in DEFAULTS.get(session.device.type, ("cpu",))
            for variant in every
        ],
    )


@pytest.fixture(scope="session")
def rows(session: Session, request: pytest.FixtureRequest) -> Callable[[str, bool], list[schema.Step]]:
    """A workload's rows, measured once."""

    def rows(workload: str, timed: bool) -> list[schema.Step]:
        found = [row for row in session.steps if row.workload == workload]
        if not found:
            every = variants(session.device, session.dtype, request.config.getoption("nanogpt_dir"))
            seconds = SECONDS.get(session.device.type, SECONDS["cpu"]) if timed else 0.0
            found = steps.measure(WORKLOADS[workload], every, session.device, session.dtype, seconds=seconds)
            session.steps += found
        return found

    return rows


@pytest.mark.benchmark(timer=CLOCK)
def test_step(
    workload: str,
    variant: str,
    rows: Callable[[str, bool], list[schema.Step]],
    session: Session,
    benchmark: Any,
    show: Callable[[list[float]], None],
) -> None:
    row = next(row for row in rows(workload, not benchmark.disabled) if row.variant == variant)
    if row.skipped.startswith(schema.WRONG):
        pytest.fail(row.skipped, pytrace=False)
    if row.skipped:
        pytest.skip(row.skipped)
    benchmark.group = f"{workload} step"
    benchmark.extra_info |= step_facts(row, session.peak)
    show(row.seconds)
