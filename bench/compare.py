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
from statistics import NormalDist

import numpy as np
from msgspec.structs import asdict

from bench.digest import Run
from bench.results import Kernel, Step
from bench.tables import NONE, aligned, counted, digits
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


@dataclass(frozen=True)
class Rounds:
    """A row of ours of one run: logarithms of seconds, (rounds, samples of a turn)."""

    own: np.ndarray
    references: dict[str, np.ndarray]  # in the same rounds


Rows = dict[str, Rounds]  # of one run, by name


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


def verdict(a: Sequence[np.ndarray], b: Sequence[np.ndarray], rows: int) -> Verdict:
    """B/A and its interval, from the quiet rounds of each run. rows: number of intervals that hold at once."""
    rng = np.random.default_rng(0)  # a fixed seed: the same verdict every time
    middle, variance = 0.0, APART**2 * (1 / len(a) + 1 / len(b)) / 2
    for sign, side in ((-1, a), (1, b)):
        for rounds in side:
            length = max(1, len(rounds) // STRETCHES)
            n = len(rounds) // length
            drawn = rounds[: n * length].reshape(n, length)[rng.integers(n, size=(DRAWS, n))].reshape(DRAWS, -1)
            middle += sign * np.median(rounds) / len(side)
            variance += np.median(drawn, axis=1).var() * n / (n - 1) / len(side) ** 2
    margin = NormalDist().inv_cdf(1 - (1 - LEVEL) / rows / 2) * np.sqrt(variance)
    return Verdict(*np.exp([middle, middle - margin, middle + margin]).tolist())


def quiet_rounds(runs: Sequence[Rounds], names: set[str], within: float) -> list[np.ndarray]:
    """For each run, log(our time / the references') of its quiet rounds.

    names: the references that count; without one, every round is quiet. within: which quantile of our turn counts.
    """
    paces = []
    for run in runs:
        references = [run.references[name] for name in sorted(names)]
        rounds = min(map(len, (run.own, *references)))  # a run can stop within a round
        medians = [np.median(reference[:rounds], axis=1) for reference in references] or [np.zeros(rounds)]
        paces.append(np.mean(medians, axis=0))
    best = min(np.quantile(pace, 0.05) for pace in paces)
    return [
        (np.quantile(run.own[: len(pace)], within, axis=1) - pace)[pace <= best + QUIET]
        for run, pace in zip(runs, paces, strict=True)
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
    for title, part in (("Steps", "steps"), ("Kernels", "kernels")):
        rows_a, rows_b = ([_rows(getattr(run.results, part)) for run in side] for side in (a, b))
        count, table = _table(title, rows_a, rows_b, within, paced=not differing)
        found, lines = found + count, lines + table
    if not found:
        raise UserError("compare: got nothing of ours that both have measured, expected a workload or a kernel")
    return "\n".join([*lines, "", LEGEND])


def sides(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Split the runs into A and B. Two files are A and B in this order. More files are split by commit, the first is A.

    UserError unless all runs are of one device, and each workload has one shape.
    """
    devices, commits = (list(dict.fromkeys(each)) for each in ((r.device for r in runs), (r.commit for r in runs)))
    if len(devices) > 1:
        raise UserError(f"compare: got results of {' and '.join(devices)}, expected one device")
    shapes = {}
    for step in (step for run in runs for step in run.results.steps if step.seconds):
        if shapes.setdefault(step.workload, step.shape) != step.shape:
            raise UserError(f"compare: {step.workload} is of another shape in each, expected one")
    if len(runs) == 2:
        return [runs[0]], [runs[1]]
    if len(commits) != 2:
        got = f"{counted(len(runs), 'results file')} of {counted(len(commits), 'commit')}"
        raise UserError(f"compare: got {got}, expected two files, or files of two commits")
    return tuple([run for run in runs if run.commit == commit] for commit in commits)


def _rows(found: Sequence[Kernel | Step]) -> Rows:
    """Our rows, and those of others that took turns with them."""

    def rounds(row: Kernel | Step, seconds: list[float]) -> np.ndarray:
        return np.log(seconds).reshape(-1, row.turn)

    return {
        row.name: Rounds(
            rounds(row, row.seconds),
            {
                other.name: rounds(other, seconds)
                for other in found
                if other.group == row.group and not other.ours and (seconds := other.beside(row))
            },
        )
        for row in found
        if row.ours and row.seconds
    }


def _table(title: str, a: Sequence[Rows], b: Sequence[Rows], within: float, *, paced: bool) -> tuple[int, list[str]]:
    """(how many rows both sides have, a table of them and the names of the others). paced: references show the pace."""
    names_a, names_b = (dict.fromkeys(name for rows in side for name in rows) for side in (a, b))
    names = [name for name in names_a if name in names_b]
    cells = [[title, "A, ms", "B, ms", "quiet rounds", "B/A", f"{100 * LEVEL:.0f} % interval", "verdict"]]
    for name in names:
        own = [[rows[name] for rows in side if name in rows] for side in (a, b)]
        runs = own[0] + own[1]
        common = set.intersection(*(set(run.references) for run in runs)) if paced else set()
        rounds = quiet_rounds(runs, common, within)
        quiet = rounds[: len(own[0])], rounds[len(own[0]) :]
        times = [digits(np.exp(np.median(np.concatenate([run.own.ravel() for run in side]))), 1e3) for side in own]
        counts = [sum(map(len, side)) for side in (*quiet, *([run.own for run in side] for side in own))]
        rest = [NONE, NONE, f"too few quiet rounds, expected {LEAST} in each run"]
        if min(map(len, rounds)) >= LEAST:
            found = verdict(*quiet, len(names))
            rest = [f"{found.ratio:.3f}", f"{found.low:.3f}–{found.high:.3f}", found.words]
        cells.append([name, *times, "{} and {} of {} and {}".format(*counts), *rest])
    lines = ["", aligned(cells)] if names else []
    for side, here, there in (("A", names_a, names_b), ("B", names_b, names_a)):
        if alone := [name for name in here if name not in there]:
            lines += ["", f"{title} only in {side}: {'; '.join(alone)}"]
    return len(names), lines
