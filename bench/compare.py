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
from statistics import NormalDist
from typing import NamedTuple

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


class Rounds(NamedTuple):
    """A row of ours of one run: logarithms of seconds, (rounds, samples of a turn)."""

    own: np.ndarray
    references: dict[str, np.ndarray]  # in the same rounds


class Verdict(NamedTuple):
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


def quiet_rounds(sides: Sequence[Sequence[Rounds]], within: float, *, paced: bool = True) -> list[list[np.ndarray]]:
    """For each run of each side, log(our time / the references') of its quiet rounds.

    within: which quantile of our turn counts. paced: whether references show the pace; those that all runs have count.
    Without one, every round is quiet.
    """
    common = set.intersection(*(set(run.references) for side in sides for run in side)) if paced else set()

    def pace(run: Rounds) -> np.ndarray:
        references = [run.references[name] for name in sorted(common)]
        rounds = min(map(len, (run.own, *references)))  # a run can stop within a round
        medians = [np.median(reference[:rounds], axis=1) for reference in references] or [np.zeros(rounds)]
        return np.mean(medians, axis=0)

    runs = [[(run.own, pace(run)) for run in side] for side in sides]
    best = min(np.quantile(pace, 0.05) for side in runs for _, pace in side)
    return [
        [(np.quantile(own[: len(pace)], within, axis=1) - pace)[pace <= best + QUIET] for own, pace in side]
        for side in runs
    ]


def report(runs: Sequence[Run]) -> str:
    """The comparison of two files, or of the files of two commits, as text. UserError if they cannot be compared."""
    sides = split(runs)
    lines = [f"{name}: {'; '.join(run.source for run in side)}" for name, side in zip("AB", sides, strict=True)]
    versions = [asdict(run.results.software) for run in runs]
    if differing := ", ".join(name for name in versions[0] if len({version[name] for version in versions}) > 1):
        lines.append(f"They differ in {differing}. So do their references, and these do not show the machine's pace.")
    within = 0.1 if runs[0].results.device.type == "cpu" else 0.5  # other programs on a CPU only add time
    found = False
    for title, part in (("Steps", "steps"), ("Kernels", "kernels")):
        rows = [[_rows(getattr(run.results, part)) for run in side] for side in sides]
        in_a, in_b = (dict.fromkeys(name for of_run in side for name in of_run) for side in rows)
        both = [name for name in in_a if name in in_b]
        if both:
            found = True
            heads = [title, "A, ms", "B, ms", "quiet rounds", "B/A", f"{100 * LEVEL:.0f} % interval", "verdict"]
            named = {name: [[of_run[name] for of_run in side if name in of_run] for side in rows] for name in both}
            cells = [[name, *_cells(own, within, not differing, len(both))] for name, own in named.items()]
            lines += ["", aligned([heads, *cells])]
        for side, here, there in (("A", in_a, in_b), ("B", in_b, in_a)):
            if alone := [name for name in here if name not in there]:
                lines += ["", f"{title} only in {side}: {'; '.join(alone)}"]
    if not found:
        raise UserError("compare: got nothing of ours that both have measured, expected a workload or a kernel")
    return "\n".join([*lines, "", LEGEND])


def split(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of A and of B. Two files are A and B in this order. More files are split by commit, the first is A.

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


def _rows(found: Sequence[Kernel | Step]) -> dict[str, Rounds]:
    """Our rows, and those of others that took turns with them."""
    rows = {}
    for row in (row for row in found if row.ours and row.seconds):
        others = [other for other in found if other.group == row.group and not other.ours and other.beside(row)]
        references = {other.name: np.log(other.beside(row)).reshape(-1, other.turn) for other in others}
        rows[row.name] = Rounds(np.log(row.seconds).reshape(-1, row.turn), references)
    return rows


def _cells(own: Sequence[Sequence[Rounds]], within: float, paced: bool, rows: int) -> list[str]:
    """A line of the table. own: a row of ours, by side, in each run that has it."""
    quiet = quiet_rounds(own, within, paced=paced)
    times = [digits(np.exp(np.median(np.concatenate([run.own.ravel() for run in side]))), 1e3) for side in own]
    counts = [*(sum(map(len, side)) for side in quiet), *(sum(len(run.own) for run in side) for side in own)]
    cells = [*times, "{} and {} of {} and {}".format(*counts)]
    if min(len(rounds) for side in quiet for rounds in side) < LEAST:
        return [*cells, NONE, NONE, f"too few quiet rounds, expected {LEAST} in each run"]
    found = verdict(*quiet, rows)
    return [*cells, f"{found.ratio:.3f}", f"{found.low:.3f}–{found.high:.3f}", found.words]
