"""Results files as rows of numbers: what the report's tables and pictures show, computed in one place."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from bench.bounds import Bound, bound
from bench.devices import short_name
from bench.report.estimates import step_floor
from bench.schema import Kernel, Results, Step, median
from bench.tables import is_reference, key, quantile
from model.flops import FORMULAS
from train.metrics import mfu, tokens_per_second


@dataclass(frozen=True)
class Timing:
    median: float  # seconds
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing | None":
        return cls(median(samples), quantile(samples, 0.1), quantile(samples, 0.9)) if samples else None


@dataclass(frozen=True)
class StepRow:
    """A step of one run. What cannot be told from the file is None."""

    step: Step
    timing: Timing | None
    mfu: dict[str, float]  # by formula, 0 to 1; empty without a peak
    tokens_per_second: float | None
    speedup: float | None  # against the workload's baseline
    host_share: float | None  # of the step's time, that the host spent in the call


@dataclass(frozen=True)
class Workload:
    """The rows of one workload in one run, in the file's order."""

    name: str
    rows: list[StepRow]
    baseline: StepRow | None  # the fastest step that is not ours
    floor: float | None  # seconds that a step takes at least, at the ceilings that this run measured
    floor_mfu: dict[str, float]

    @property
    def compared(self) -> list[StepRow]:
        """All but what leads from the reference's step to ours within our code."""
        return [row for row in self.rows if row.step.compares or not is_ours(row.step)]

    @property
    def best(self) -> StepRow | None:
        """Our fastest step."""
        return _fastest([row for row in self.compared if is_ours(row.step)])

    @property
    def ladder(self) -> list[StepRow]:
        """From the reference's step to ours: its modes, the rungs, what leads from the last rung to the last row."""
        if len(self.rows) < 2:
            return self.rows
        rungs = [i for i, row in enumerate(self.rows) if not row.step.compares]
        first, last = self.rows[0].step.variant, self.rows[-1].step.variant
        start, end = (rungs[0], rungs[-1] + 1) if rungs else (len(self.rows) - 1,) * 2
        family = first.partition(" ")[0]
        return [
            *(row for row in self.rows[:start] if row.step.compares and row.step.variant.partition(" ")[0] == family),
            *(self.rows[i] for i in rungs),
            *(row for row in self.rows[end:] if last.startswith(row.step.variant)),
        ]


@dataclass(frozen=True)
class KernelRow:
    """A kernel's case of one run that has samples."""

    kernel: Kernel
    timing: Timing
    bound: Bound | None  # by the ceilings that its run measured
    speedup: float | None  # against torch.compile of the reference


@dataclass(frozen=True)
class Run:
    path: Path
    results: Results

    @property
    def device(self) -> str:
        name = short_name(self.results.device.name)
        threads = self.results.device.threads
        return f"{name}, {threads} thread{'s' * (threads != 1)}" if threads else name

    @property
    def commit(self) -> str:
        return self.results.commit.id[:12] + " (changed)" * (not self.results.commit.clean)

    @property
    def day(self) -> str:
        try:
            return datetime.fromisoformat(self.results.date).date().isoformat()
        except ValueError:
            return self.results.date

    @property
    def source(self) -> str:
        """Where numbers come from, for a caption."""
        state = "" if self.results.complete else ", a partial run"
        return f"{self.path.name} ({self.device}, commit {self.commit}, {self.day}{state})"

    @cached_property
    def workloads(self) -> list[Workload]:
        names = dict.fromkeys(step.workload for step in self.results.steps)
        return [self._workload(name) for name in names]

    def workload(self, name: str) -> Workload | None:
        return next((workload for workload in self.workloads if workload.name == name), None)

    @cached_property
    def kernels(self) -> list[KernelRow]:
        compiled = {key(k): median(k.seconds) for k in self.results.kernels if k.variant == "compiled" and k.seconds}
        return [self._kernel(k, compiled.get(key(k))) for k in self.results.kernels if k.seconds]

    def _workload(self, name: str) -> Workload:
        steps = [step for step in self.results.steps if step.workload == name]
        baseline = _fastest([self._row(s, None) for s in steps if s.compares and is_reference(s)])
        rows = [self._row(step, baseline.timing.median if baseline else None) for step in steps]
        # of the narrowest dtype: the bytes of the least that anybody has to move
        bounds = [bound for step in steps if (bound := step_floor(step, self.results)) is not None]
        floor = min(bounds, default=None)
        return Workload(name, rows, baseline, floor, self._mfu(steps[0], floor) if floor else {})

    def _row(self, step: Step, baseline: float | None) -> StepRow:
        timing = Timing.of(step.seconds)
        if timing is None:
            return StepRow(step, None, {}, None, None, None)
        return StepRow(
            step,
            timing,
            self._mfu(step, timing.median),
            tokens_per_second(step.tokens, timing.median),
            baseline / timing.median if baseline else None,
            median(step.host_seconds) / timing.median if step.host_seconds else None,
        )

    def _mfu(self, step: Step, seconds: float) -> dict[str, float]:
        peak = self.results.peak
        formulas = [formula for formula in FORMULAS if formula in step.flops]
        return {formula: mfu(step.flops[formula], seconds, peak.flops) for formula in formulas} if peak else {}

    def _kernel(self, kernel: Kernel, compiled: float | None) -> KernelRow:
        timing = Timing.of(kernel.seconds)
        # FLOPs meet the ceiling of their own dtype; bytes are bytes
        rates = [c.rate for c in self.results.ceilings if c.what == "matmul" and c.dtype == kernel.dtype]
        found = bound(kernel, max(rates, default=None), self.results.ceiling("copy"))
        return KernelRow(kernel, timing, found, compiled / timing.median if compiled else None)


def is_ours(step: Step) -> bool:
    """Whether a step runs our code."""
    return not is_reference(step)


def _fastest(rows: list[StepRow]) -> StepRow | None:
    return min((row for row in rows if row.timing), key=lambda row: row.timing.median, default=None)


def in_order(runs: Iterable[Run]) -> list[Run]:
    """GPUs before CPUs, then by name, date and commit."""
    return sorted(runs, key=lambda r: (r.results.device.type != "cuda", r.device, r.results.date, r.path.name))


def labels(runs: Sequence[Run]) -> dict[Path, str]:
    """What to call each run: its device; its day, its commit or its file too, what first tells it from its like."""
    names = {}
    for run in runs:
        same = [other for other in runs if other.device == run.device]
        told = ([other.day for other in same], [other.commit for other in same], [other.path.name for other in same])
        apart = next((every for every in told if len(set(every)) == len(same)), [str(other.path) for other in same])
        names[run.path] = f"{run.device}, {apart[same.index(run)]}" if len(same) > 1 else run.device
    return names
