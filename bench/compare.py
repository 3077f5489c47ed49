"""Compare two commits on one device, row by row of their results files: faster, slower, or no difference.

A machine's pace changes, within a run and between runs. Some rows run none of our code: the reference's steps, and a
kernel's other variants. They took turns with our rows, so they show the machine's pace in each round of turns.

- Only quiet rounds count. A round is quiet if its pace is within QUIET of the best pace of all runs. On a busy machine
  our rows and the references may slow down differently.
- In each round, our time is divided by the references' time. B/A is the ratio of the medians over the rounds.
- The interval has two sources. One is a bootstrap, which draws stretches of neighbouring rounds. The other is APART,
  the standard deviation between two runs of one program.

With 95 % confidence all intervals of a table hold at once (Bonferroni). So equal programs show no differences, even in
a long table.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import asdict

from bench.digest import Run
from bench.results import Shape
from bench.tables import aligned, shown
from train.errors import UserError

LEVEL = 0.95
QUIET = 0.05
APART = 0.008  # measured on two cores of a shared machine; a machine without other users should have less
STRETCHES = 30  # least number of stretches, if there are enough rounds
LEAST = 8  # quiet rounds; with fewer there is no verdict
DRAWS = 400

LEGEND = (
    "ms are medians of all samples. B/A compares our time over the references' in the same round. Only quiet rounds "
    f"count:\nthe references took at most {100 * QUIET:.0f} % more than in the best rounds of any run. "
    "On a busy machine few rounds count. Measure longer, or several times, and name all the files."
)

Names = tuple[str, ...]
Rounds = list[np.ndarray]  # for each run: log(our time / the references' time) of its quiet rounds


@dataclass(frozen=True)
class Row:
    """One row of one run. seconds: logarithms of its samples in seconds, (rounds, samples of a turn)."""

    group: Hashable  # rows of one group took turns
    ours: bool
    seconds: np.ndarray
    first: int = 0  # its first round, counted over its group's rounds

    def beside(self, other: "Row") -> np.ndarray:
        """Its samples of the rounds in which `other` took part too."""
        return self.seconds[other.first - self.first :][: len(other.seconds) * (other.first >= self.first)]


Rows = dict[Names, Row]  # of one run


@dataclass(frozen=True)
class Verdict:
    ratio: float  # B/A, over the references'
    low: float
    high: float

    @property
    def words(self) -> str:
        if self.low <= 1 <= self.high:
            return "no difference"
        least, most = sorted(abs(value - 1) * 100 for value in (self.low, self.high))
        which = "faster" if self.ratio < 1 else "slower"
        return f"{which} by {abs(self.ratio - 1) * 100:.1f} % ({least:.1f}–{most:.1f})"


def verdict(a: Rounds, b: Rounds, rows: int) -> Verdict | None:
    """B/A and its interval. rows: number of intervals that hold at once. None if a run has too few quiet rounds."""
    if min(map(len, (*a, *b))) < LEAST:
        return None
    rng = np.random.default_rng(0)  # a fixed seed: the same verdict every time
    middle, errors, freedom = 0.0, [], []
    for sign, side in ((-1, a), (1, b)):
        for rounds in side:
            length = max(1, len(rounds) // STRETCHES)
            n = len(rounds) // length
            drawn = rounds[: n * length].reshape(n, length)[rng.integers(n, size=(DRAWS, n))].reshape(DRAWS, -1)
            middle += sign * np.median(rounds) / len(side)
            errors.append(np.median(drawn, axis=1).var() * n / (n - 1) / len(side) ** 2)
            freedom.append(n - 1)
    square, apart = sum(errors), APART**2 * (1 / len(a) + 1 / len(b)) / 2
    # Welch's degrees of freedom; the quantile of Student's t from random draws
    degrees = square**2 / sum(e**2 / n for e, n in zip(errors, freedom, strict=True)) if square else min(freedom)
    t = np.quantile(np.abs(rng.standard_t(degrees, 200_000)), 1 - (1 - LEVEL) / rows)
    margin = t * np.sqrt(square + apart)
    return Verdict(*np.exp([middle, middle - margin, middle + margin]).tolist())


def quiet_rounds(ours: Sequence[np.ndarray], controls: Sequence[Sequence[np.ndarray]], within: float) -> Rounds:
    """For each run, log(our time / the controls') of its quiet rounds. within: which quantile of our turn counts."""
    # a run can stop within a round
    cut = [min(map(len, (own, *others))) for own, others in zip(ours, controls, strict=True)]
    paces = [
        np.mean([np.median(other[:n], axis=1) for other in others], axis=0) if others else np.zeros(n)
        for n, others in zip(cut, controls, strict=True)
    ]
    best = min(np.quantile(pace, 0.05) for pace in paces)
    return [
        (np.quantile(own[: len(pace)], within, axis=1) - pace)[pace <= best + QUIET]
        for own, pace in zip(ours, paces, strict=True)
    ]


def report(runs: Sequence[Run]) -> str:
    """The comparison of two files, or of the files of two commits, as text. UserError if they cannot be compared."""
    a, b = sides(runs)
    lines = [f"{name}: {'; '.join(run.source for run in side)}" for name, side in (("A", a), ("B", b))]
    versions = [asdict(run.results.software) for run in runs]
    if differing := ", ".join(name for name in versions[0] if len({version[name] for version in versions}) > 1):
        lines.append(f"They differ in {differing}. So do their references, and these do not show the machine's pace.")
    within = 0.1 if runs[0].results.device.type == "cpu" else 0.5  # other programs on a CPU only add time
    tables = []
    for title, rows_of in (("Steps", _steps), ("Kernels", _kernels)):
        rows_a, rows_b = ([rows_of(run) for run in side] for side in (a, b))
        tables.append(_table(title, rows_a, rows_b, within, paced=not differing))
        lines += tables[-1]
        for name, here, there in (("A", rows_a, rows_b), ("B", rows_b, rows_a)):
            if alone := [" ".join(names) for names in _names(here) if names not in _names(there)]:
                lines += ["", f"{title} only in {name}: {'; '.join(alone)}"]
    if not any(tables):
        raise UserError("compare: got nothing of ours that both have measured, expected a workload or a kernel")
    return "\n".join([*lines, "", LEGEND])


def sides(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Split the runs into A and B. Two files are A and B in this order. More files are split by commit, the first is A.

    UserError unless all runs are of one device, and each workload has one shape.
    """
    devices = list(dict.fromkeys(run.device for run in runs))
    if len(devices) > 1:
        raise UserError(f"compare: got results of {' and '.join(devices)}, expected one device")
    shapes: dict[str, Shape] = {}
    for step in (step for run in runs for step in run.results.steps if step.seconds):
        if shapes.setdefault(step.workload, step.shape) != step.shape:
            raise UserError(f"compare: {step.workload} is of another shape in each, expected one")
    if len(runs) == 2:
        return [runs[0]], [runs[1]]
    commits = list(dict.fromkeys(run.commit for run in runs))
    if len(commits) != 2:
        raise UserError(
            f"compare: got {len(runs)} results file{'s' * (len(runs) != 1)} of {len(commits)} "
            f"commit{'s' * (len(commits) != 1)}, expected two files, or files of two commits"
        )
    return tuple([run for run in runs if run.commit == commit] for commit in commits)


def _steps(run: Run) -> Rows:
    return {
        (step.workload, step.variant, step.dtype): Row(
            step.workload, not step.is_reference, np.log(step.seconds).reshape(-1, step.turn), step.first_round
        )
        for step in run.results.steps
        if step.seconds
    }


def _kernels(run: Run) -> Rows:
    return {
        (k.case, "×".join(map(str, k.shape)), k.dtype, k.direction, k.variant): Row(
            k.group, k.variant == "fused", np.log(k.seconds)[:, None]
        )
        for k in run.results.kernels
        if k.seconds
    }


def _table(title: str, a: Sequence[Rows], b: Sequence[Rows], within: float, *, paced: bool) -> list[str]:
    """A line for each row of ours that both sides have. paced: the references show the pace."""
    found: dict[Names, tuple[list[Rounds], list[Rounds]]] = {}  # by row: (all samples, quiet rounds), each as [A, B]
    for names in (names for names in _names(a) if names in _names(b)):
        runs = [rows for rows in (*a, *b) if names in rows]
        first, count = runs[0][names], sum(names in rows for rows in a)
        if first.ours:
            same = [name for name, row in runs[0].items() if paced and row.group == first.group and not row.ours]
            controls = [
                name for name in same if all(name in rows and len(rows[name].beside(rows[names])) for rows in runs)
            ]
            own = [rows[names].seconds for rows in runs]
            quiet = quiet_rounds(own, [[rows[name].beside(rows[names]) for name in controls] for rows in runs], within)
            found[names] = ([own[:count], own[count:]], [quiet[:count], quiet[count:]])
    many = sum(min(map(len, (*quiet[0], *quiet[1]))) >= LEAST for _, quiet in found.values())
    cells = [[title, "A, ms", "B, ms", "quiet rounds", "B/A", f"{100 * LEVEL:.0f} % interval", "verdict"]]
    for names, (own, quiet) in found.items():
        times = [shown(np.exp(np.median(np.concatenate([x.ravel() for x in side]))), 1e3) for side in own]
        counts = [sum(map(len, side)) for side in (*quiet, *own)]
        judged = verdict(*quiet, many)
        rest = ["–", "–", f"too few quiet rounds, expected {LEAST} in each run"]
        if judged:
            rest = [f"{judged.ratio:.3f}", f"{judged.low:.3f}–{judged.high:.3f}", judged.words]
        cells.append([" ".join(names), *times, "{} and {} of {} and {}".format(*counts), *rest])
    return ["", aligned(cells)] if found else []


def _names(side: Sequence[Rows]) -> dict[Names, None]:
    return dict.fromkeys(names for rows in side for names in rows)
