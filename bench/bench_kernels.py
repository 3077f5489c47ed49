"""pytest bench/ --benchmark-only: every case and direction, ours beside plain torch, torch.compile and other people's.

One test a variant, one group of pytest-benchmark's a case, shape and direction. A group's samples are taken once, by
turns, when the first of its tests wants them; pytest-benchmark is shown them afterwards. `--benchmark-max-time` (1 s)
is the time of a group, `--benchmark-min-rounds` (5) the least number of its rounds.
"""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="the cases are of Triton's kernels, and Triton is not installed")

from bench.entrants import TIMED, entrants
from bench.kernels import Contest, directions, shapes
from bench.schema import WRONG, Kernel
from bench.session import CLOCK, Session, facts
from kernels.cases import Case, Shape


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = Session.of(metafunc.config).device
    metafunc.parametrize(
        ("case", "shape", "direction", "variant"),
        [
            pytest.param(case, shape, direction, entrant.name, id=named(case, shape, direction, entrant.name))
            for case in TIMED
            for shape in shapes(case, device)
            for direction in directions(case)
            for entrant in entrants(case, device)
        ],
    )


def named(case: Case, shape: Shape, *rest: str) -> str:
    """A test's name, without what `-k` cannot take."""
    return "-".join([case.name.replace(", ", "-").replace(" ", "_"), "x".join(map(str, shape)), *rest])


class Groups:
    """The rows of each group, measured once; only the last case's tensors are kept."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.contest: Contest | None = None
        self.rows: dict[tuple[str, Shape, str], list[Kernel]] = {}

    def measure(self, case: Case, shape: Shape, direction: str, seconds: float, least: int) -> list[Kernel]:
        group = case.name, shape, direction
        if group not in self.rows:
            if self.contest is None or (self.contest.case, self.contest.shape) != (case, shape):
                self.contest = None  # its memory, before the next one's
                self.contest = Contest(case, shape, self.session.dtype, self.session.device)
            self.rows[group] = self.contest.measure(direction, seconds, least)
            self.session.kernels += self.rows[group]
        return self.rows[group]


@pytest.fixture(scope="session")
def groups(session: Session) -> Groups:
    assert session.ceilings  # before anything else fills the device
    return Groups(session)


@pytest.mark.benchmark(timer=CLOCK)
def test_kernel(
    case: Case,
    shape: Shape,
    direction: str,
    variant: str,
    groups: Groups,
    seconds: float,
    benchmark: Any,
    show: Callable[[list[float]], None],
    request: pytest.FixtureRequest,
) -> None:
    least = int(request.config.getoption("benchmark_min_rounds"))
    rows = groups.measure(case, shape, direction, seconds, least)
    row = next(row for row in rows if row.variant == variant)
    if row.skipped.startswith(WRONG):
        pytest.fail(row.skipped, pytrace=False)
    if row.skipped:
        pytest.skip(row.skipped)
    benchmark.group = " ".join([case.name, "x".join(map(str, shape)), row.dtype, direction])
    benchmark.extra_info |= facts(row, rows, groups.session.ceilings)
    show(row.seconds)
