"""pytest bench/ --benchmark-only: kernels and whole training steps, every variant a test, in pytest-benchmark's tables.

A group of pytest-benchmark is a case, shape and direction of a kernel, or a workload of a step. All samples of a group
are taken before its first test, by turns. For a kernel's group `--benchmark-max-time` (1 s) is the time, and
`--benchmark-min-rounds` (5) the least number of rounds.
"""

from itertools import cycle
from typing import Any

import pytest

from bench import steps
from bench.conftest import SESSION
from bench.results import WRONG, Kernel, Session, Step
from bench.variants import DEFAULTS, WORKLOADS, variants
from train.hardware import resolve_device, resolve_dtype, use_device

try:
    from bench.kernels import CASES, VARIANTS, Contest, directions, shapes
except ImportError:  # Triton is not installed
    CASES = ()

SECONDS = {"cuda": 40.0, "cpu": 30.0}  # of samples, for a workload
PASSED: list[float] = []  # the sample that the timer shows next


def timer() -> float:
    """pytest-benchmark's. It shows 0, and after a sample that sample: the difference rounds nothing."""
    return PASSED.pop() if PASSED else 0.0


pytestmark = pytest.mark.benchmark(timer=timer)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, tests = resolve_device("auto"), []
    if metafunc.function is test_step:
        for workload in DEFAULTS.get(device.type, "cpu").split(","):
            names = [variant.name for variant in variants(device, resolve_dtype("auto", device))]
            tests += [pytest.param(workload, name, id=f"{workload}-{name.replace(' ', '_')}") for name in names]
        metafunc.parametrize(("workload", "variant"), tests, indirect=["workload"], scope="module")
        return
    for case in CASES:
        for shape in shapes(case, device):
            contest = case, shape  # one object for all its tests: pytest makes one fixture of it
            for direction in directions(case):
                for variant in VARIANTS:
                    name = case.name.replace(", ", "-").replace(" ", "_")  # `-k` does not accept these characters
                    id = "-".join([name, "x".join(map(str, shape)), direction, variant])
                    tests.append(pytest.param(contest, direction, variant, id=id))
    metafunc.parametrize(("contest", "direction", "variant"), tests, indirect=["contest"], scope="module")


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    device = use_device(resolve_device("auto"))
    session = request.config.stash[SESSION] = Session(device, resolve_dtype("auto", device), "pytest bench/")
    session.ceilings(seconds=3.0)
    return session


@pytest.fixture(scope="module")
def contest(session: Session, request: pytest.FixtureRequest) -> dict[tuple[str, str], Kernel]:
    """The rows of one case at one shape, by direction and variant."""
    (case, shape), option = request.param, request.config.getoption
    contest = Contest(case, shape, session.dtype, session.device)
    seconds = 0.0 if option("benchmark_disable") else float(option("benchmark_max_time"))
    every = [contest.measure(each, seconds, int(option("benchmark_min_rounds"))) for each in directions(case)]
    session.results.kernels.extend(row for rows in every for row in rows)
    return {(row.direction, row.variant): row for rows in every for row in rows}


@pytest.fixture(scope="module")
def workload(session: Session, request: pytest.FixtureRequest) -> dict[str, Step]:
    """The rows of one workload, by variant."""
    seconds = 0.0 if request.config.getoption("benchmark_disable") else SECONDS.get(session.device.type, SECONDS["cpu"])
    every = variants(session.device, session.dtype)
    rows = steps.measure(WORKLOADS[request.param], every, session.device, session.dtype, seconds=seconds)
    session.results.steps.extend(rows)
    return {row.variant: row for row in rows}


def show(benchmark: Any, row: Kernel | Step, group: str, **facts: object) -> None:
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


def test_kernel(contest: dict[tuple[str, str], Kernel], direction: str, variant: str, benchmark: Any) -> None:
    row = contest[direction, variant]
    show(benchmark, row, row.group.replace("×", "x"), bytes=row.bytes, flops=row.flops)


def test_step(workload: dict[str, Step], variant: str, benchmark: Any) -> None:
    row = workload[variant]
    show(benchmark, row, f"{row.workload} step", tokens=row.tokens, flops=row.flops, peak_memory=row.peak_memory)
