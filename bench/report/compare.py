"""Two commits on one device: is a step or a kernel faster, slower, or is there no difference to be seen?

The figure is the ratio of the medians, its interval from three sources of noise:

- Within a run samples are not independent: a machine drifts. So the bootstrap draws whole stretches of neighbouring
  samples (blocks), not single ones; and as far as the medians of neighbouring blocks still resemble each other, the
  drift is slower than a block, and the interval is widened by what an autoregressive process of that correlation needs.
- A handful of blocks underestimate a spread: Student's t instead of the normal quantile.
- Between runs the whole machine may have changed pace. The rows that run none of our code, the reference's, tell by
  how much they moved between the same two runs: that much is added, in squares, to everything.

Each table's intervals hold together at 95 % (Bonferroni), so that a long table of equals stays one of equals.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import NormalDist

import numpy as np

from bench.report.digest import Run, is_ours
from bench.report.tables import NONE, milliseconds, shape
from bench.schema import Kernel, Step, median
from bench.tables import aligned
from train.errors import UserError

LEVEL = 0.95
BLOCKS = 10  # stretches that a run's samples are cut into
LEAST = 5  # samples in all, below which there is no verdict
DRAWS = 1000

Samples = list[list[float]]  # seconds, run by run


@dataclass(frozen=True)
class Row:
    """Something that both sides measured."""

    names: tuple[str, ...]
    a: Samples
    b: Samples
    control: bool  # it runs none of our code
    kind: str = ""  # what its controls must share with it: the workload

    @property
    def log_ratio(self) -> float:
        return log(_median(self.b) / _median(self.a))


@dataclass(frozen=True)
class Verdict:
    ratio: float  # of the medians, b over a
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


def verdicts(rows: Sequence[Row]) -> list[Verdict | None]:
    """One each, None where there are too few samples. The intervals hold together at LEVEL."""
    rng = np.random.default_rng(0)  # the same verdict every time
    noises = [_noise(row, rng) if min(_count(row.a), _count(row.b)) >= LEAST else None for row in rows]
    known = [(row, noise) for row, noise in zip(rows, noises, strict=True) if noise]
    quantile = 1 - (1 - LEVEL) / max(1, len(known)) / 2
    return [
        noise and _verdict(row, noise, _pace(row, known), quantile) for row, noise in zip(rows, noises, strict=True)
    ]


@dataclass(frozen=True)
class Noise:
    """Of a logarithm of a ratio of medians, as far as the samples within the runs tell."""

    error: float  # standard
    freedom: float  # degrees of


def _noise(row: Row, rng: np.random.Generator) -> Noise:
    """Both sides' together, with Welch's degrees of freedom."""
    sides = [_spread(samples, rng) for samples in (row.a, row.b)]
    square = sum(side.error**2 for side in sides)
    freedom = square**2 / sum(side.error**4 / side.freedom for side in sides) if square else sides[0].freedom
    return Noise(sqrt(square), freedom)


def _pace(row: Row, known: Sequence[tuple[Row, Noise]]) -> float:
    """How far, in logarithms, times moved between the two runs though nothing of ours changed in them.

    A robust spread of the other controls of the row's kind, less what their own noise explains; 0 without controls.
    """
    others = [(c, noise) for c, noise in known if c.control and c is not row and c.kind == row.kind]
    if not others:
        return 0.0
    moved = 1.4826 * median([abs(c.log_ratio) for c, _ in others])
    return sqrt(max(0.0, moved**2 - median([noise.error for _, noise in others]) ** 2))


def _verdict(row: Row, noise: Noise, pace: float, quantile: float) -> Verdict:
    reach = student(quantile, noise.freedom) * sqrt(noise.error**2 + pace**2)
    return Verdict(exp(row.log_ratio), exp(row.log_ratio - reach), exp(row.log_ratio + reach))


def _spread(samples: Samples, rng: np.random.Generator) -> Noise:
    """Of the logarithm of one side's median."""
    runs = [np.array_split(np.log(one), min(BLOCKS, len(one))) for one in samples]
    blocks = [block for run in runs for block in run]
    n, length = len(blocks), min(map(len, blocks))
    whole = np.array([block[:length] for block in blocks])  # (n, length)
    drawn = whole[rng.integers(n, size=(DRAWS, n))].reshape(DRAWS, n * length)
    error = float(np.median(drawn, axis=1).std()) * sqrt(n / (n - 1))
    kept = _correlation([np.array([np.median(block) for block in run]) for run in runs])
    slower = (1 + kept) / (1 - kept)  # by so much fewer samples than it seems
    return Noise(error * sqrt(slower), (n - 1) / slower)


def _correlation(runs: Sequence[np.ndarray]) -> float:
    """Of neighbouring blocks' medians, from 0 to 0.8, with what so few values hide of it."""
    away = [run - run.mean() for run in runs]
    whole = sum(float((run**2).sum()) for run in away)
    if not whole:
        return 0.0
    found = sum(float((run[1:] * run[:-1]).sum()) for run in away) / whole
    found += (1 + 3 * found) / np.mean([len(run) for run in runs])
    return min(0.8, max(0.0, found))


def student(quantile: float, n: float) -> float:
    """The quantile of Student's t with n degrees of freedom, at least 3 (Cornish and Fisher's expansion)."""
    z, n = NormalDist().inv_cdf(quantile), max(3.0, n)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / n**i for i, term in enumerate(terms, 1))


def _median(samples: Samples) -> float:
    return median([second for run in samples for second in run])


def _count(samples: Samples) -> int:
    return sum(map(len, samples))


# The files


def report(runs: Sequence[Run]) -> str:
    """What to print of two files, or of the files of two commits. UserError for what cannot be compared."""
    a, b = sides(runs)
    lines = [f"{name}: {'; '.join(run.source for run in side)}" for name, side in (("A", a), ("B", b))]
    for title, rows_a, rows_b in (("Steps", _steps(a), _steps(b)), ("Kernels", _kernels(a), _kernels(b))):
        both = [key for key in rows_a if key in rows_b]
        if both:
            lines += ["", *_tell(title, [_join(rows_a[key], rows_b[key]) for key in both])]
        for name, here, there in (("A", rows_a, rows_b), ("B", rows_b, rows_a)):
            if alone := [" ".join(key) for key in here if key not in there]:
                lines += ["", f"{title} only in {name}: {'; '.join(alone)}"]
    return "\n".join(lines)


def sides(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs as A and B: two files as they are named, more by their commits, the one named first being A.

    UserError unless all are of one device and have workloads in common, of one shape.
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
    if not common and (shapes_a or shapes_b or not _kernels(a).keys() & _kernels(b).keys()):
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


def _steps(runs: Sequence[Run]) -> dict[tuple[str, ...], tuple[Step, Samples]]:
    return _gather((s.workload, s.variant, s.dtype, s) for run in runs for s in run.results.steps)


def _kernels(runs: Sequence[Run]) -> dict[tuple[str, ...], tuple[Kernel, Samples]]:
    return _gather((k.case, shape(k), k.dtype, k.direction, k.variant, k) for run in runs for k in run.results.kernels)


def _gather(found: Iterable[tuple]) -> dict[tuple[str, ...], tuple]:
    """By name, the record and the samples of every run that has some."""
    gathered: dict[tuple[str, ...], tuple] = {}
    for *names, record in found:
        if record.seconds:
            gathered.setdefault(tuple(names), (record, []))[1].append(record.seconds)
    return gathered


def _join(a: tuple, b: tuple) -> Row:
    record: Step | Kernel = a[0]
    if isinstance(record, Step):
        names = (record.workload, record.variant, record.dtype)
        return Row(names, a[1], b[1], control=not is_ours(record), kind=record.workload)
    names = (record.case, shape(record), record.dtype, record.direction, record.variant)
    return Row(names, a[1], b[1], control=record.variant != "fused")


def _tell(title: str, rows: Sequence[Row]) -> list[str]:
    cells = [[title, "A, ms", "B, ms", "B/A", f"{100 * LEVEL:.0f} % interval", "verdict"]]
    for row, verdict in zip(rows, verdicts(rows), strict=True):
        a, b = _median(row.a), _median(row.b)
        interval, words = NONE, f"too few samples ({_count(row.a)} and {_count(row.b)}, expected {LEAST})"
        if verdict:
            interval, words = f"{verdict.low:.3f}–{verdict.high:.3f}", verdict.words
        cells.append([" ".join(row.names), milliseconds(a), milliseconds(b), f"{b / a:.3f}", interval, words])
    lines = [aligned(cells)]
    for kind in dict.fromkeys(row.kind for row in rows if row.control):
        moved = [abs(exp(row.log_ratio) - 1) for row in rows if row.control and row.kind == kind]
        lines.append(
            f"{kind or 'kernels'}: what runs none of our code changed by {median(moved) * 100:.1f} % "
            f"(median of {len(moved)}); the intervals allow for it"
        )
    return lines
