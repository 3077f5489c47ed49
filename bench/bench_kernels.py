"""pytest bench/ --benchmark-only: kernels, ours beside plain torch, torch.compile and other people's.

Each variant is a test. Each case, shape and direction is a group of pytest-benchmark. All samples of a group are taken
before its first test, by turns. `--benchmark-max-time` (1 s) is the time for a group, `--benchmark-min-rounds` (5) its
least number of rounds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

pytest.importorskip("triton", reason="the cases are of Triton's kernels, and Triton is not installed")

from bench.digest import Run
from bench.kernels import TIMED, Contest, directions, entrants, shapes
from bench.results import Kernel
from train.hardware import resolve_device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, tests = resolve_device("auto"), []
    for case in TIMED:
        for shape in shapes(case, device):
            contest = case, shape  # one object for all its tests: pytest makes one fixture of it
            for direction in directions(case):
                for entrant in entrants(case, device):
                    name = case.name.replace(", ", "-").replace(" ", "_")  # `-k` does not accept these characters
                    id = "-".join([name, "x".join(map(str, shape)), direction, entrant.name])
                    tests.append(pytest.param(contest, direction, entrant.name, id=id))
    metafunc.parametrize(("contest", "rows", "variant"), tests, indirect=["contest", "rows"], scope="module")


@pytest.fixture(scope="module")
def contest(session: Any, request: pytest.FixtureRequest) -> Contest:
    """The tensors of one case at one shape."""
    return Contest(*request.param, session.dtype, session.device)


@pytest.fixture(scope="module")
def rows(session: Any, contest: Contest, request: pytest.FixtureRequest) -> list[Kernel]:
    """The rows of one direction."""
    option = request.config.getoption
    seconds = 0.0 if option("benchmark_disable") else float(option("benchmark_max_time"))
    found = contest.measure(request.param, seconds, int(option("benchmark_min_rounds")))
    session.add(kernels=[*session.results.kernels, *found])
    return found


def test_kernel(rows: list[Kernel], variant: str, session: Any, show: Callable[..., None]) -> None:
    row = next(row for row in rows if row.variant == variant)
    facts = {"shape": row.shape, "dtype": row.dtype, "bytes": row.bytes, "flops": row.flops}
    for found in Run(Path(), replace(session.results, kernels=rows)).kernels:
        if found.kernel == row:
            rates = {f"{what}_per_second": facts[what] and facts[what] / row.median for what in ("bytes", "flops")}
            facts |= {**rates, "share_of_ceiling": found.share, "times_faster_than_compiled": found.speedup}
    show(row, " ".join([row.case, "x".join(map(str, row.shape)), row.dtype, row.direction]), facts)
