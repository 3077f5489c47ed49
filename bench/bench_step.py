"""pytest bench/ --benchmark-only: whole training steps, the reference implementation's and ours, in every mode.

Each variant is a test. Each workload is a group of pytest-benchmark. The first test of a workload measures all its
variants, by turns. `--nanogpt_dir=DIR` adds a nanoGPT checkout.
"""

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench import steps
from bench.digest import Run
from bench.variants import DEFAULTS, WORKLOADS, Variant, variants
from train.hardware import resolve_device, resolve_dtype

SECONDS = {"cuda": 40.0, "cpu": 30.0}  # of samples, for a workload


def every(config: pytest.Config) -> list[Variant]:
    device = resolve_device("auto")
    return variants(device, resolve_dtype("auto", device), config.getoption("nanogpt_dir"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(
        ("workload", "variant"),
        [
            pytest.param(workload, variant.name, id=f"{workload}-{variant.name.replace(' ', '_')}")
            for workload in DEFAULTS.get(resolve_device("auto").type, ("cpu",))
            for variant in every(metafunc.config)
        ],
    )


def test_step(workload: str, variant: str, session: Any, benchmark: Any, show: Any, request: Any) -> None:
    found = session.results.steps
    if not any(row.workload == workload for row in found):
        seconds = 0.0 if benchmark.disabled else SECONDS.get(session.device.type, SECONDS["cpu"])
        options = (every(request.config), session.device, session.dtype)
        session.add(steps=[*found, *steps.measure(WORKLOADS[workload], *options, seconds=seconds)])
    steps_of = next(each for each in Run(Path(), session.results).steps if each.name == workload)
    row = next(row for row in steps_of.rows if row.variant == variant)
    facts = {
        "dtype": row.dtype,
        "tokens_per_second": row.median and row.tokens / row.median,
        **{f"mfu_{formula}": steps_of.mfu(row, formula) for formula in row.flops},
        "peak_memory": row.peak_memory,
        "host_seconds": median(row.host_seconds) if row.host_seconds else None,
    }
    show(row, f"{workload} step", facts)
