"""Two commits on one device: is a step or a kernel faster, slower, or is there no difference to be seen?

A machine changes its pace, within a run and from run to run. What runs none of our code, the reference's steps and a
kernel's other variants, took turns with ours; these controls tell the pace. So the figure is a ratio of ratios: by how
much our time changed, over how much the controls' changed. Its interval has two sources:

- Within a run: a bootstrap that draws stretches of neighbouring rounds, the same ones for a row and its controls, so
  that a drift that both share cancels.
- Between runs: ours need not follow a change of pace as the controls do. It is taken for right within LEFT of what the
  controls changed by, as one standard deviation.

On a CPU the times are low quantiles of the samples: whatever else the machine does can only add. On a GPU, medians.
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
QUANTILE = {"cpu": 0.05, "cuda": 0.5}
STRETCHES = 30  # into which a run's rounds are cut, at least, where there are so many
LEAST = 8  # rounds, below which there is no verdict
LEFT = 0.5
DRAWS = 400


@dataclass(frozen=True)
class Samples:
    """Of one row in one run, and of its controls: logarithms of seconds, (rounds, samples of a turn)."""

    own: np.ndarray
    controls: list[np.ndarray]

    @property
    def rounds(self) -> int:
        return min(map(len, (self.own, *self.controls)))  # a run that was stopped may end within a round


@dataclass(frozen=True)
class Row:
    """Something of ours that both sides measured, run by run."""

    names: tuple[str, ...]
    a: list[Samples]
    b: list[Samples]


@dataclass(frozen=True)
class Verdict:
    ratio: float  # b over a, the change of pace taken out
    low: float
    high: float
    pace: float  # the controls' b over a

    @property
    def words(self) -> str:
        if self.low <= 1 <= self.high:
            return "no difference"
        # by how much the time changed; the interval's ends in the order of their size
        sizes = sorted(abs(value - 1) * 100 for value in (self.low, self.high))
        which = "faster" if self.ratio < 1 else "slower"
        return f"{which} by {abs(self.ratio - 1) * 100:.1f} % ({sizes[0]:.1f}–{sizes[1]:.1f})"


def verdicts(rows: Sequence[Row], quantile: float) -> list[Verdict | None]:
    """One each, None where there are too few rounds. The intervals hold together at LEVEL."""
    rng = np.random.default_rng(0)  # the same verdict every time
    enough = [min(samples.rounds for samples in (*row.a, *row.b)) >= LEAST for row in rows]
    certainty = 1 - (1 - LEVEL) / max(1, sum(enough)) / 2
    return [_verdict(row, quantile, certainty, rng) if known else None for row, known in zip(rows, enough, strict=True)]


@dataclass(frozen=True)
class Level:
    """Of a row's times on one side, in logarithms."""

    own: float
    pace: float  # of the controls, 0 without any
    error: float  # standard, of own - pace
    freedom: float  # degrees of


def _verdict(row: Row, quantile: float, certainty: float, rng: np.random.Generator) -> Verdict:
    a, b = (_side([_level(samples, quantile, rng) for samples in side]) for side in (row.a, row.b))
    pace = b.pace - a.pace
    ratio = b.own - a.own - pace
    square = a.error**2 + b.error**2
    # Welch's degrees of freedom
    freedom = square**2 / (a.error**4 / a.freedom + b.error**4 / b.freedom) if square else a.freedom
    reach = student(certainty, freedom) * sqrt(square + (LEFT * pace) ** 2)
    return Verdict(exp(ratio), exp(ratio - reach), exp(ratio + reach), exp(pace))


def _side(levels: Sequence[Level]) -> Level:
    """The mean of several runs."""
    n = len(levels)
    return Level(
        sum(level.own for level in levels) / n,
        sum(level.pace for level in levels) / n,
        sqrt(sum(level.error**2 for level in levels)) / n,
        sum(level.freedom for level in levels),
    )


def _level(samples: Samples, quantile: float, rng: np.random.Generator) -> Level:
    length = max(1, samples.rounds // STRETCHES)
    n = samples.rounds // length
    drawn = rng.integers(n, size=(DRAWS, n))

    def both(rounds: np.ndarray) -> tuple[float, np.ndarray]:
        """The quantile of all, and of each draw."""
        cut = rounds[: n * length].reshape(n, -1)
        return np.quantile(rounds[: samples.rounds], quantile), np.quantile(cut[drawn].reshape(DRAWS, -1), quantile, 1)

    own, draws = both(samples.own)
    found = [both(control) for control in samples.controls]
    pace = np.mean([level for level, _ in found]) if found else 0.0
    paces = np.mean([levels for _, levels in found], axis=0) if found else 0.0
    return Level(float(own), float(pace), float((draws - paces).std()) * sqrt(n / (n - 1)), n - 1)


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
    quantile = QUANTILE[runs[0].results.device.type]
    for title, gather in (("Steps", _steps), ("Kernels", _kernels)):
        rows_a, rows_b = gather(a), gather(b)
        both = [names for names in rows_a if names in rows_b]
        ours = [names for names in both if rows_a[names].ours]
        rows = [Row(names, *_joined(rows_a, rows_b, names, [] if differing else both)) for names in ours]
        if rows:
            lines += ["", *_tell(title, rows, quantile)]
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


def _tell(title: str, rows: Sequence[Row], quantile: float) -> list[str]:
    cells = [[title, "A, ms", "B, ms", "references, B/A", "ours over that", f"{100 * LEVEL:.0f} % interval", "verdict"]]
    for row, verdict in zip(rows, verdicts(rows, quantile), strict=True):
        times = [milliseconds(exp(np.mean([np.quantile(s.own, quantile) for s in side]))) for side in (row.a, row.b)]
        if verdict is None:
            rounds = [min(s.rounds for s in side) for side in (row.a, row.b)]
            rest = [NONE, NONE, NONE, f"too few rounds ({rounds[0]} and {rounds[1]}, expected {LEAST})"]
        else:
            pace = f"{verdict.pace:.3f}" if row.a[0].controls else NONE
            rest = [pace, f"{verdict.ratio:.3f}", f"{verdict.low:.3f}–{verdict.high:.3f}", verdict.words]
        cells.append([" ".join(row.names), *times, *rest])
    what = "medians" if quantile == 0.5 else f"the fastest {100 * quantile:.0f} % of the samples take less"
    return [aligned(cells), f"Times: {what}."]
