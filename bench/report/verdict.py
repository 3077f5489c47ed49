"""Is something faster, slower, or is there no difference to be seen? The statistics of `--compare`.

A machine changes its pace, within a run and from run to run. What runs none of our code, the reference's steps and a
kernel's other variants, took turns with ours; these controls tell the pace of each round of turns.

- Only quiet rounds count: those whose pace is within QUIET of the best that either run saw. When others are at work on
  a machine, ours need not suffer from them as the controls do.
- The figure is by how much our time over the controls', of the same round, changed: the median over the rounds.
- Its interval comes of a bootstrap that draws stretches of neighbouring rounds, and of APART, by which two runs of the
  same program differ for reasons of their own, as one standard deviation.

Each table's intervals hold together at 95 % (Bonferroni), so that a long table of equals stays one of equals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
QUIET = 0.05
APART = 0.008  # seen on a shared machine of two cores; on one of its own it should be less
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


Quiet = tuple[list[np.ndarray], list[np.ndarray]]  # both sides' quiet rounds, run by run


def quiet_rounds(row: Row, within: float) -> Quiet:
    """Our times over the controls'. within: the quantile of a turn's samples that stands for the turn, 0 to 1."""
    best = min(float(np.quantile(samples.pace, 0.05)) for samples in (*row.a, *row.b))
    a, b = ([samples.quiet(best, within) for samples in side] for side in (row.a, row.b))
    return a, b


def verdicts(found: Sequence[Quiet]) -> list[Verdict | None]:
    """One for each row, None where there are too few quiet rounds. The intervals hold together at LEVEL."""
    rng = np.random.default_rng(0)  # the same verdict every time
    enough = [min(map(len, (*a, *b))) >= LEAST for a, b in found]
    certainty = 1 - (1 - LEVEL) / max(1, sum(enough)) / 2
    return [_verdict(a, b, certainty, rng) if known else None for (a, b), known in zip(found, enough, strict=True)]


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
