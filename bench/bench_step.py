"""pytest bench/ --benchmark-only: whole training steps, the reference implementation's and ours, in every mode.

Each variant is a test. Each workload is a group of pytest-benchmark. All variants of a workload are measured before its
first test, by turns. `--nanogpt_dir=DIR` adds a nanoGPT checkout.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from msgspec.structs import replace

from bench import steps
from bench.digest import Run, Steps
from bench.variants import DEFAULTS, WORKLOADS, Variant, variants
from train.hardware import resolve_device, resolve_dtype

SECONDS = {"cuda": 40.0, "cpu": 30.0}  # of samples, for a workload


def every(config: pytest.Config) -> list[Variant]:
    device = resolve_device("auto")
    return variants(device, resolve_dtype("auto", device), config.getoption("nanogpt_dir"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tests = [
        pytest.param(workload, variant.name, id=f"{workload}-{variant.name.replace(' ', '_')}")
        for workload in DEFAULTS.get(resolve_device("auto").type, ("cpu",))
        for variant in every(metafunc.config)
    ]
    metafunc.parametrize(("measured", "variant"), tests, indirect=["measured"], scope="module")


@pytest.fixture(scope="module")
def measured(session: Any, request: pytest.FixtureRequest) -> Steps:
    """The steps of one workload."""
    disabled = request.config.getoption("benchmark_disable")
    seconds = 0.0 if disabled else SECONDS.get(session.device.type, SECONDS["cpu"])
    variants = every(request.config)
    rows = steps.measure(WORKLOADS[request.param], variants, session.device, session.dtype, seconds=seconds)
    session.add(steps=[*session.results.steps, *rows])
    (found,) = Run(Path(), replace(session.results, steps=rows)).steps
    return found


def test_step(measured: Steps, variant: str, show: Callable[..., None]) -> None:
    row = next(row for row in measured.rows if row.variant == variant)
    facts = {
        "dtype": row.dtype,
        "tokens_per_second": row.median and row.tokens / row.median,
        **{f"mfu_{formula}": measured.mfu(row, formula) for formula in row.flops},
        "peak_memory": row.peak_memory,
        "host_seconds": median(row.host_seconds) if row.host_seconds else None,
    }
    show(row, f"{row.workload} step", facts)
