"""pytest bench/ --benchmark-only: kernels, ours beside plain torch, torch.compile and other people's.

Each variant is a test. Each case, shape and direction is a group of pytest-benchmark. The first test of a group takes
all samples of the group, by turns. Then each test shows its own to pytest-benchmark. `--benchmark-max-time` (1 s) is
the time for a group, `--benchmark-min-rounds` (5) its least number of rounds.
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
from kernels.cases import Case, Shape
from train.hardware import resolve_device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = resolve_device("auto")
    groups = [
        (case, shape, direction)
        for case in TIMED
        for shape in shapes(case, device)
        for direction in directions(case)
    ]  # fmt: skip
    metafunc.parametrize(
        ("case", "shape", "direction", "variant"),
        [
            pytest.param(*group, entrant.name, id=named(*group, entrant.name))
            for group in groups
            for entrant in entrants(group[0], device)
        ],
    )


def named(case: Case, shape: Shape, *rest: str) -> str:
    """A test's name, without characters that `-k` does not accept."""
    return "-".join([case.name.replace(", ", "-").replace(" ", "_"), "x".join(map(str, shape)), *rest])


@pytest.fixture(scope="session")
def measured(session: Any, request: pytest.FixtureRequest) -> Callable[..., list[Kernel]]:
    """Gives the rows of a group. It measures each group once, and keeps only the last case's tensors."""
    last: list[Contest] = []
    least = int(request.config.getoption("benchmark_min_rounds"))

    def measured(case: Case, shape: Shape, direction: str, seconds: float) -> list[Kernel]:
        if not last or (last[0].case, last[0].shape) != (case, shape):
            last.clear()  # free its memory before the next case takes some
            last.append(Contest(case, shape, session.dtype, session.device))
        group = (case.name, shape, str(session.dtype).removeprefix("torch."), direction)
        if not any(row.group == group for row in session.results.kernels):
            session.add(kernels=[*session.results.kernels, *last[0].measure(direction, seconds, least)])
        return [row for row in session.results.kernels if row.group == group]

    return measured


def test_kernel(
    case: Case,
    shape: Shape,
    direction: str,
    variant: str,
    measured: Callable[..., list[Kernel]],
    session: Any,
    benchmark: Any,
    show: Callable[..., None],
    request: pytest.FixtureRequest,
) -> None:
    seconds = 0.0 if benchmark.disabled else float(request.config.getoption("benchmark_max_time"))
    rows = measured(case, shape, direction, seconds)
    row = next(row for row in rows if row.variant == variant)
    facts = {"shape": row.shape, "dtype": row.dtype, "bytes": row.bytes, "flops": row.flops}
    for found in Run(Path(), replace(session.results, kernels=rows)).kernels:
        if found.kernel == row:
            rates = {f"{what}_per_second": facts[what] and facts[what] / found.seconds for what in ("bytes", "flops")}
            facts |= {**rates, "share_of_ceiling": found.share, "times_faster_than_compiled": found.speedup}
    show(row, " ".join([case.name, "x".join(map(str, shape)), row.dtype, direction]), facts)
