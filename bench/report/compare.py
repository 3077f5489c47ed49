"""Two commits on one device: is a step or a kernel faster, slower, or is there no difference to be seen?

A machine changes its pace, within a run and from run to run. What runs none of our code, the reference's steps and a
kernel's other variants, took turns with ours; these controls tell the pace of each round of turns.

- Only quiet rounds count: those whose pace is within QUIET of the best that either run saw. When others are at work on
  a machine, ours need not suffer from them as the controls do.
- The figure is by how much our time over the controls', of the same round, changed: the median over the rounds.
- Its interval comes of a bootstrap that draws stretches of neighbouring rounds, and of APART, by which two runs of the
  same program differ for reasons of their own, as one standard deviation.

Each table's intervals hold together at 95 % (Bonferroni), so that a long table of equals stays one of equals.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, sqrt
from statistics import NormalDist

import numpy as np

from bench.report.digest import Run, is_ours
from bench.report.tables import NONE, milliseconds, shape
from bench.schema import Kernel, Step
from bench.tables import aligned, key
from train.errors import UserError

LEVEL = 0.95
QUIET = 0.05
APART = 0.008  # on a shared machine of two cores; on one of its own it should be less
WITHIN = {"cpu": 0.1, "cuda": 0.5}  # quantile of a turn's samples: whatever else runs on a CPU can only add
STRETCHES = 30  # into which the rounds are cut, at least, where there are so many
LEAST = 8  # quiet rounds, below which there is no verdict
DRAWS = 400


@dataclass(frozen=True)
class Samples:
    """Of one row in one run, and of its controls: logarithms of seconds, (rounds, samples of a turn)."""

    own: np.ndarray
    controls: list[np.ndarray]

    @property
    def rounds(self) -> int:
        return min(map(len, (self.own, *self.controls)))  # a run that was stopped may end within a round

    @property
    def pace(self) -> np.ndarray:
        """Of each round: the controls' mean; 0 without any."""
        if not self.controls:
            return np.zeros(self.rounds)
        return np.mean([np.median(control[: self.rounds], axis=1) for control in self.controls], axis=0)

    def quiet(self, best: float, within: float) -> np.ndarray:
        """Of the rounds that are: our time over the controls'."""
        quiet = self.pace <= best + QUIET
        return np.quantile(self.own[: self.rounds][quiet], within, axis=1) - self.pace[quiet]


@dataclass(frozen=True)
class Row:
    """Something of ours that both sides measured, run by run."""

    names: tuple[str, ...]
    a: list[Samples]
    b: list[Samples]


@dataclass(frozen=True)
class Verdict:
    ratio: float  # b over a, over the controls'
    low: float
    high: float

    @property
    def words(self) -> str:
        if self.low <= 1 <= self.high:
            return "no difference"
        # by how much the time changed; the interval's ends in the order of their size
        sizes = sorted(abs(value - 1) * 100 for value in (self.low, self.high))
        which = "faster" if self.ratio < 1 else "slower"
        return f"{which} by {abs(self.ratio - 1) * 100:.1f} % ({sizes[0]:.1f}–{sizes[1]:.1f})"


def verdicts(rows: Sequence[Row], within: float) -> list[Verdict | None]:
    """One each, None where there are too few quiet rounds. The intervals hold together at LEVEL."""
    rng = np.random.default_rng(0)  # the same verdict every time
    found = [quiet_rounds(row, within) for row in rows]
    enough = [min(map(len, (*a, *b))) >= LEAST for a, b in found]
    certainty = 1 - (1 - LEVEL) / max(1, sum(enough)) / 2
    return [_verdict(a, b, certainty, rng) if known else None for (a, b), known in zip(found, enough, strict=True)]


def quiet_rounds(row: Row, within: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Both sides', run by run."""
    best = min(float(np.quantile(samples.pace, 0.05)) for samples in (*row.a, *row.b))
    a, b = ([samples.quiet(best, within) for samples in side] for side in (row.a, row.b))
    return a, b


@dataclass(frozen=True)
class Level:
    """Of a row's relative times, in logarithms."""

    middle: float
    error: float  # standard, as far as the rounds tell
    freedom: float  # degrees of
    runs: int = 1


def _verdict(a: list[np.ndarray], b: list[np.ndarray], certainty: float, rng: np.random.Generator) -> Verdict:
    before, after = (_side([_level(rounds, rng) for rounds in side]) for side in (a, b))
    ratio = after.middle - before.middle
    square = before.error**2 + after.error**2
    # Welch's degrees of freedom
    freedom = square**2 / sum(x.error**4 / x.freedom for x in (before, after)) if square else before.freedom
    apart = APART**2 * (1 / before.runs + 1 / after.runs) / 2
    reach = student(certainty, freedom) * sqrt(square + apart)
    return Verdict(exp(ratio), exp(ratio - reach), exp(ratio + reach))


def _side(levels: Sequence[Level]) -> Level:
    """The mean of several runs."""
    n = len(levels)
    return Level(
        sum(level.middle for level in levels) / n,
        sqrt(sum(level.error**2 for level in levels)) / n,
        sum(level.freedom for level in levels),
        n,
    )


def _level(rounds: np.ndarray, rng: np.random.Generator) -> Level:
    length = max(1, len(rounds) // STRETCHES)
    n = len(rounds) // length
    drawn = rounds[: n * length].reshape(n, length)[rng.integers(n, size=(DRAWS, n))].reshape(DRAWS, -1)
    error = float(np.median(drawn, axis=1).std()) * sqrt(n / (n - 1))
    return Level(float(np.median(rounds)), error, n - 1)


def student(quantile: float, n: float) -> float:
    """The quantile of Student's t with n degrees of freedom, at least 3 (Cornish and Fisher's expansion)."""
    z, n = NormalDist().inv_cdf(quantile), max(3.0, n)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / n**i for i, term in enumerate(terms, 1))


# The files


def report(runs: Sequence[Run]) -> str:
    """What to print of two files, or of the files of two commits. UserError for what cannot be compared."""
    a, b = sides(runs)
    lines = [f"{name}: {'; '.join(run.source for run in side)}" for name, side in (("A", a), ("B", b))]
    differing = _differing(runs)
    if differing:
        lines.append(f"They differ in {differing}: their references too, which tell nothing of the machine's pace then")
    within = WITHIN[runs[0].results.device.type]
    for title, gather in (("Steps", _steps), ("Kernels", _kernels)):
        rows_a, rows_b = gather(a), gather(b)
        both = [names for names in rows_a if names in rows_b]
        ours = [names for names in both if rows_a[names].ours]
        rows = [Row(names, *_joined(rows_a, rows_b, names, [] if differing else both)) for names in ours]
        if rows:
            lines += ["", *_tell(title, rows, within)]
        for name, here, there in (("A", rows_a, rows_b), ("B", rows_b, rows_a)):
            if alone := [" ".join(names) for names in here if names not in there]:
                lines += ["", f"{title} only in {name}: {'; '.join(alone)}"]
    return "\n".join(lines)


def sides(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs as A and B: two files as they are named, more by their commits, the one named first being A.

    UserError unless all are of one device and have something of ours in common, of one shape.
    """
    a, b = list(runs[:1]), list(runs[1:])
    if len(runs) != 2:
        commits = list(dict.fromkeys(run.commit for run in runs))
        if len(commits) != 2:
            raise UserError(
                f"compare: got {len(runs)} results file{'s' * (len(runs) != 1)} of {len(commits)} "
                f"commit{'s' * (len(commits) != 1)}, expected two files, or files of two commits"
            )
        a, b = ([run for run in runs if run.commit == commit] for commit in commits)
    devices = list(dict.fromkeys(run.device for run in runs))
    if len(devices) > 1:
        raise UserError(f"compare: got results of {' and '.join(devices)}, expected one device")
    shapes_a, shapes_b = _shapes(a), _shapes(b)
    common = shapes_a.keys() & shapes_b.keys()
    if not common and not any(_kernels(a)[names].ours for names in _kernels(a).keys() & _kernels(b).keys()):
        found = " and ".join(", ".join(shapes) or "no training step" for shapes in (shapes_a, shapes_b))
        raise UserError(f"compare: got {found}, expected a workload that both have measured")
    for name in sorted(common):
        if shapes_a[name] != shapes_b[name]:
            raise UserError(f"compare: {name} is of another shape or another number of tokens in each, expected one")
    return a, b


def _shapes(runs: Sequence[Run]) -> dict[str, set]:
    """Of each workload with samples: its shapes, which should be one."""
    found: dict[str, set] = {}
    for step in (step for run in runs for step in run.results.steps if step.seconds):
        found.setdefault(step.workload, set()).add((step.tokens, *sorted(step.shape.items())))
    return found


def _differing(runs: Sequence[Run]) -> str:
    """Software that is not the same in all."""
    versions = [asdict(run.results.software) for run in runs]
    return ", ".join(name for name in versions[0] if len({version[name] for version in versions}) > 1)


@dataclass
class Gathered:
    """A row of one side."""

    group: Hashable  # what it took turns with
    ours: bool
    runs: dict[str, np.ndarray]  # by file: logarithms of seconds, (rounds, samples of a turn)


Names = tuple[str, ...]


def _steps(runs: Sequence[Run]) -> dict[Names, Gathered]:
    return _gather(
        (run, step, (step.workload, step.variant, step.dtype), step.workload, is_ours(step), step.turn)
        for run in runs
        for step in run.results.steps
    )


def _kernels(runs: Sequence[Run]) -> dict[Names, Gathered]:
    return _gather(
        (run, k, (k.case, shape(k), k.dtype, k.direction, k.variant), key(k), k.variant == "fused", 1)
        for run in runs
        for k in run.results.kernels
    )


def _gather(found: Iterable[tuple[Run, Step | Kernel, Names, Hashable, bool, int]]) -> dict[Names, Gathered]:
    gathered: dict[Names, Gathered] = {}
    for run, record, names, group, ours, turn in found:
        if record.seconds:
            rounds = np.log(record.seconds[: len(record.seconds) // turn * turn]).reshape(-1, turn)
            gathered.setdefault(names, Gathered(group, ours, {})).runs[str(run.path)] = rounds
    return gathered


def _joined(
    a: Mapping[Names, Gathered], b: Mapping[Names, Gathered], names: Names, both: Sequence[Names]
) -> tuple[list[Samples], list[Samples]]:
    """A row's samples on both sides, with the controls out of `both` that all its runs have."""
    files = [*((a, name) for name in a[names].runs), *((b, name) for name in b[names].runs)]
    others = [other for other in both if a[other].group == a[names].group and not a[other].ours]
    controls = [other for other in others if all(name in side[other].runs for side, name in files)]
    samples = [Samples(side[names].runs[name], [side[c].runs[name] for c in controls]) for side, name in files]
    return samples[: len(a[names].runs)], samples[len(a[names].runs) :]


def _tell(title: str, rows: Sequence[Row], within: float) -> list[str]:
    cells = [[title, "A, ms", "B, ms", "quiet rounds", "B/A", f"{100 * LEVEL:.0f} % interval", "verdict"]]
    for row, verdict in zip(rows, verdicts(rows, within), strict=True):
        times = [milliseconds(exp(np.median(np.concatenate([s.own.ravel() for s in side])))) for side in (row.a, row.b)]
        quiet = [sum(map(len, side)) for side in quiet_rounds(row, within)]
        counts = f"{quiet[0]} and {quiet[1]} of {sum(s.rounds for s in row.a)} and {sum(s.rounds for s in row.b)}"
        rest = [NONE, NONE, f"too few quiet rounds, expected {LEAST} in each run"]
        if verdict:
            rest = [f"{verdict.ratio:.3f}", f"{verdict.low:.3f}–{verdict.high:.3f}", verdict.words]
        cells.append([" ".join(row.names), *times, counts, *rest])
    return [
        aligned(cells),
        "ms are medians. B/A is of the times over the references' in the same round. Quiet rounds: those in which the "
        f"references took at most {100 * QUIET:.0f} % more than in either run's best; longer runs have more of them.",
    ]
