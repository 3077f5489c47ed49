"""pytest bench/ --benchmark-only: kernels and whole training steps, every variant a test, in pytest-benchmark's tables.

A group of pytest-benchmark is a case, shape and direction of a kernel, or a workload of a step. All samples of a group
are taken before its first test, by turns. For a kernel's group `--benchmark-max-time` (1 s) is the time, and
`--benchmark-min-rounds` (5) the least number of rounds. `--nanogpt_dir=DIR` adds a nanoGPT checkout to the steps.
"""

from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from msgspec.structs import replace

from bench import steps
from bench.conftest import SESSION
from bench.digest import Run, Steps
from bench.results import WRONG, Kernel, Session, Step
from bench.variants import DEFAULTS, WORKLOADS, Variant, variants
from train.hardware import resolve_device, resolve_dtype, use_device

try:
    from bench.kernels import TIMED, Contest, directions, shapes
    from bench.kernels import variants as kernel_variants
except ImportError:  # Triton is not installed
    TIMED = ()

SECONDS = {"cuda": 40.0, "cpu": 30.0}  # of samples, for a workload
PASSED: list[float] = []  # the sample that the timer shows next


def timer() -> float:
    """pytest-benchmark's. It shows 0, and after a sample that sample: the difference rounds nothing."""
    return PASSED.pop() if PASSED else 0.0


pytestmark = pytest.mark.benchmark(timer=timer)


def step_variants(config: pytest.Config) -> list[Variant]:
    device = resolve_device("auto")
    return variants(device, resolve_dtype("auto", device), config.getoption("nanogpt_dir"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, tests = resolve_device("auto"), []
    if metafunc.function is test_step:
        for workload in DEFAULTS.get(device.type, "cpu").split(","):
            names = [variant.name for variant in step_variants(metafunc.config)]
            tests += [pytest.param(workload, name, id=f"{workload}-{name.replace(' ', '_')}") for name in names]
        metafunc.parametrize(("workload", "variant"), tests, indirect=["workload"], scope="module")
        return
    for case in TIMED:
        for shape in shapes(case, device):
            contest = case, shape  # one object for all its tests: pytest makes one fixture of it
            for direction in directions(case):
                for variant in kernel_variants(case, device):
                    name = case.name.replace(", ", "-").replace(" ", "_")  # `-k` does not accept these characters
                    id = "-".join([name, "x".join(map(str, shape)), direction, variant])
                    tests.append(pytest.param(contest, direction, variant, id=id))
    metafunc.parametrize(("contest", "kernel", "variant"), tests, indirect=["contest", "kernel"], scope="module")


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    device = use_device(resolve_device("auto"))
    session = request.config.stash[SESSION] = Session(device, resolve_dtype("auto", device), "pytest bench/")
    session.ceilings(seconds=3.0)
    return session


@pytest.fixture(scope="module")
def contest(session: Session, request: pytest.FixtureRequest) -> "Contest":
    """The tensors of one case at one shape."""
    return Contest(*request.param, session.dtype, session.device)


@pytest.fixture(scope="module")
def kernel(session: Session, contest: "Contest", request: pytest.FixtureRequest) -> Run:
    """The rows of one direction."""
    option = request.config.getoption
    seconds = 0.0 if option("benchmark_disable") else float(option("benchmark_max_time"))
    rows = contest.measure(request.param, seconds, int(option("benchmark_min_rounds")))
    session.results.kernels.extend(rows)
    return Run(Path(), replace(session.results, kernels=rows))


@pytest.fixture(scope="module")
def workload(session: Session, request: pytest.FixtureRequest) -> Steps:
    """The steps of one workload."""
    disabled = request.config.getoption("benchmark_disable")
    seconds = 0.0 if disabled else SECONDS.get(session.device.type, SECONDS["cpu"])
    every = step_variants(request.config)
    rows = steps.measure(WORKLOADS[request.param], every, session.device, session.dtype, seconds=seconds)
    session.results.steps.extend(rows)
    (found,) = Run(Path(), replace(session.results, steps=rows)).steps
    return found


def show(benchmark: Any, row: Kernel | Step, group: str, facts: dict[str, Any]) -> None:
    """Give a row's samples to pytest-benchmark: each of its rounds takes one of them as its time.

    A row without samples skips the test. A row whose check failed fails the test.
    """
    if row.skipped.startswith(WRONG):
        pytest.fail(row.skipped, pytrace=False)
    if row.skipped:
        pytest.skip(row.skipped)
    samples, benchmark.group = cycle(row.seconds), group  # one call more is not timed
    benchmark.extra_info |= facts
    benchmark.pedantic(lambda: PASSED.append(next(samples)), setup=PASSED.clear, rounds=len(row.seconds))


def test_kernel(kernel: Run, variant: str, benchmark: Any) -> None:
    row = next(row for row in kernel.results.kernels if row.variant == variant)
    facts = {"shape": row.shape, "dtype": row.dtype, "bytes": row.bytes, "flops": row.flops}
    for found in kernel.kernels:
        if found.kernel == row:
            rates = {f"{what}_per_second": facts[what] and facts[what] / row.median for what in ("bytes", "flops")}
            facts |= {**rates, "share_of_ceiling": found.share, "times_faster_than_compiled": found.speedup}
    show(benchmark, row, row.group.replace("×", "x"), facts)


def test_step(workload: Steps, variant: str, benchmark: Any) -> None:
    row = next(row for row in workload.rows if row.variant == variant)
    facts = {
        "dtype": row.dtype,
        "tokens_per_second": row.median and row.tokens / row.median,
        **{f"mfu_{formula}": workload.mfu(row, formula) for formula in row.flops},
        "peak_memory": row.peak_memory,
        "host_seconds": median(row.host_seconds) if row.host_seconds else None,
    }
    show(benchmark, row, f"{row.workload} step", facts)
