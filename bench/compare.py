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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import asdict

from bench.digest import Run
from bench.results import Shape, Step
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
    """A row of ours of one run: logarithms of seconds, (rounds, samples of a turn)."""

    own: np.ndarray
    references: dict[Names, np.ndarray]  # in the same rounds


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
    found = 0
    for title, rows_of in (("Steps", _steps), ("Kernels", _kernels)):
        rows_a, rows_b = ([rows_of(run) for run in side] for side in (a, b))
        count, table = _table(title, rows_a, rows_b, within, paced=not differing)
        found, lines = found + count, lines + table
    if not found:
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
    def rounds(row: Step, seconds: list[float]) -> np.ndarray:
        return np.log(seconds).reshape(-1, row.turn)

    measured = [step for step in run.results.steps if step.seconds]
    return {
        (row.workload, row.variant, row.dtype): Row(
            rounds(row, row.seconds),
            {
                (other.variant, other.dtype): rounds(other, seconds)
                for other in measured
                if other.workload == row.workload and not other.ours and (seconds := other.beside(row))
            },
        )
        for row in measured
        if row.ours
    }


def _kernels(run: Run) -> Rows:
    measured = [kernel for kernel in run.results.kernels if kernel.seconds]
    rounds = {(*row.group, row.variant): np.log(row.seconds)[:, None] for row in measured}
    return {
        (row.case, "×".join(map(str, row.shape)), row.dtype, row.direction, row.variant): Row(
            rounds[(*row.group, "fused")],
            {(other,): own for (*group, other), own in rounds.items() if (*group,) == row.group and other != "fused"},
        )
        for row in measured
        if row.variant == "fused"
    }


def _table(title: str, a: Sequence[Rows], b: Sequence[Rows], within: float, *, paced: bool) -> tuple[int, list[str]]:
    """(how many rows both sides have, a table of them and the names of the others). paced: references show the pace."""
    names_a, names_b = (dict.fromkeys(names for rows in side for names in rows) for side in (a, b))
    found: dict[Names, list[tuple[list[np.ndarray], Rounds]]] = {}  # for A and B: all samples, and quiet rounds
    for names in (names for names in names_a if names in names_b):
        count, runs = sum(names in rows for rows in a), [rows[names] for rows in (*a, *b) if names in rows]
        common = set.intersection(*(set(row.references) for row in runs)) if paced else set()
        references = [[each for name, each in row.references.items() if name in common] for row in runs]
        own = [row.own for row in runs]
        quiet = quiet_rounds(own, references, within)
        found[names] = [(own[:count], quiet[:count]), (own[count:], quiet[count:])]
    many = sum(min(len(rounds) for _, quiet in both for rounds in quiet) >= LEAST for both in found.values())
    cells = [[title, "A, ms", "B, ms", "quiet rounds", "B/A", f"{100 * LEVEL:.0f} % interval", "verdict"]]
    for names, ((own_a, quiet_a), (own_b, quiet_b)) in found.items():
        times = [shown(np.exp(np.median(np.concatenate([x.ravel() for x in own]))), 1e3) for own in (own_a, own_b)]
        counts = [sum(map(len, side)) for side in (quiet_a, quiet_b, own_a, own_b)]
        rest = ["–", "–", f"too few quiet rounds, expected {LEAST} in each run"]
        if judged := verdict(quiet_a, quiet_b, many):
            rest = [f"{judged.ratio:.3f}", f"{judged.low:.3f}–{judged.high:.3f}", judged.words]
        cells.append([" ".join(names), *times, "{} and {} of {} and {}".format(*counts), *rest])
    lines = ["", aligned(cells)] if found else []
    for side, here, there in (("A", names_a, names_b), ("B", names_b, names_a)):
        if alone := [" ".join(names) for names in here if names not in there]:
            lines += ["", f"{title} only in {side}: {'; '.join(alone)}"]
    return len(found), lines
