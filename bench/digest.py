"""Results files as rows of numbers, and what devices could do at best: all that the report shows is computed here.

A step's parts (`model/work.py`) have two rooflines. The floor takes the rates that a run measured, or those of a data
sheet, at their word. No step is faster, unless a cache hands on what one part leaves for the next. The attainable time
takes the share of a data sheet that good kernels reach, ATTAINED. They reached it on an H100; that they would on other
devices is assumed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from math import inf
from pathlib import Path

from bench import schema
from bench.bounds import Bound, bound
from bench.schema import Kernel, Results, Step, median
from bench.tables import baseline as fastest_reference
from bench.tables import is_reference, key, quantile, short_name
from bench.workloads import WORKLOADS
from model.config import GPTConfig
from model.flops import flops_per_token
from model.work import Work, floor, step_work
from train.hardware import CARDS, lookup
from train.metrics import mfu

ESTIMATED = ("gpt2", "shakespeare_char")  # workloads
ESTIMATED_ON = ("a100", "h100", "h200", "b200", "l4", "4090")  # of CARDS


@dataclass(frozen=True)
class Shares:
    """Of a data sheet's rates."""

    matmul: float = 1.0
    attention: float = 1.0  # its products are small, and half of each diagonal tile is thrown away
    bandwidth: float = 1.0


SHEET = Shares()
ATTAINED = Shares(matmul=0.81, attention=0.34, bandwidth=0.9)


def roofline(parts: dict[str, Work], flops: float, bandwidth: float, shares: Shares = SHEET) -> float:
    """Seconds that the parts take one after the other, each at the slower of its FLOPs and its bytes."""
    of_flops = {"attention forward": shares.attention, "attention backward": shares.attention}
    return sum(
        floor(work, flops * of_flops.get(name, shares.matmul), bandwidth * shares.bandwidth)
        for name, work in parts.items()
    )


def least_work(config: GPTConfig, batch_size: int, accumulation: int, size: int) -> dict[str, Work]:
    """The parts of a step whose every element has `size` bytes."""
    sizes = dict.fromkeys(("compute", "stream", "gradients"), size)
    return step_work(config, batch_size, accumulation=accumulation, **sizes, fused_gelu=True)


def step_floor(step: Step, results: Results) -> float | None:
    """Seconds that a measured step takes at least, at the rates of its own run. None where the file cannot tell.

    On a CPU only the FLOPs count: its caches hold what the parts of a small step hand to each other.
    """
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    flops, bandwidth = results.ceiling("matmul"), results.ceiling("copy")
    if results.device.type != "cuda":
        bandwidth = inf
    if not flops or not bandwidth or any(name not in step.shape for name in (*names, "batch_size")):
        return None
    try:
        config = GPTConfig(**{name: step.shape[name] for name in names}, bias=bool(step.shape.get("bias", 0)))
    except ValueError:  # no such model can be built
        return None
    size = 4 if step.dtype == "float32" else 2
    parts = least_work(config, step.shape["batch_size"], step.shape.get("accumulation", 1), size)
    return roofline(parts, flops, bandwidth) or None


@dataclass(frozen=True)
class Estimate:
    """A device that nobody measured with that workload."""

    device: str
    workload: str
    tokens: int  # an iteration
    peak: float  # FLOP/s, dense, bfloat16
    bandwidth: float  # bytes/s
    source: str
    floor: float  # seconds
    attainable: float  # seconds

    def mfu(self, seconds: float, formula: str = "nanogpt") -> float:
        return mfu(flops_per_token(WORKLOADS[self.workload].config, formula) * self.tokens, seconds, self.peak)


def estimates(runs: Sequence["Run"]) -> list[Estimate]:
    """For every device of ESTIMATED_ON, and every workload of ESTIMATED, that none of the runs measured."""
    measured = {
        (lookup(run.results.device.name), workload.name)
        for run in runs
        for workload in run.workloads
        if any(row.seconds for row in workload.rows)
    }
    found = []
    for workload in map(WORKLOADS.get, ESTIMATED):
        parts = least_work(workload.config, workload.batch_size, workload.accumulation, size=2)
        for name in (CARDS[card].name for card in ESTIMATED_ON):
            row = lookup(name)
            if (row, workload.name) not in measured:
                rates = row.bf16 * 1e12, row.bandwidth * 1e9
                seconds = roofline(parts, *rates), roofline(parts, *rates, ATTAINED)
                found.append(Estimate(short_name(name), workload.name, workload.tokens, *rates, row.source, *seconds))
    return found


@dataclass(frozen=True)
class StepRow:
    """A step of one run. What the file cannot tell is None."""

    step: Step
    peak: float | None  # FLOP/s
    baseline: float | None = None  # seconds of the fastest step that is not ours, in the same rounds

    @property
    def seconds(self) -> float | None:
        """The median."""
        return median(self.step.seconds) if self.step.seconds else None

    def quantile(self, share: float) -> float | None:
        return quantile(self.step.seconds, share) if self.step.seconds else None

    def mfu(self, formula: str = "nanogpt", seconds: float | None = None) -> float | None:
        """From 0 to 1. seconds: of another step with as many FLOPs."""
        flops, seconds = self.step.flops.get(formula), seconds or self.seconds
        return mfu(flops, seconds, self.peak) if flops is not None and seconds and self.peak else None

    @property
    def speedup(self) -> float | None:
        return self.baseline / self.seconds if self.baseline and self.seconds else None

    @property
    def host_share(self) -> float | None:
        """Of the step's time, what the host spent in the call."""
        return median(self.step.host_seconds) / self.seconds if self.step.host_seconds and self.seconds else None

    @property
    def ours(self) -> bool:
        return not is_reference(self.step)

    @property
    def missing(self) -> str:
        return f"not measured: {self.step.skipped or 'no reason given'}"


@dataclass(frozen=True)
class Workload:
    """The rows of one workload in one run, in the file's order."""

    name: str
    rows: list[StepRow]
    baseline: StepRow | None  # the fastest step that is not ours
    floor: float | None  # seconds that a step takes at least, at the rates that this run measured

    def floor_mfu(self, formula: str = "nanogpt") -> float | None:
        return self.rows[0].mfu(formula, self.floor) if self.floor else None

    @property
    def compared(self) -> list[StepRow]:
        """All but the steps that lead from the reference's to ours within our code."""
        return [row for row in self.rows if row.step.compares or not row.ours]

    @property
    def best(self) -> StepRow | None:
        """Our fastest step."""
        return _fastest(row for row in self.compared if row.ours)

    @property
    def ladder(self) -> list[StepRow]:
        """From the reference's step to ours: the reference's modes, the rungs, then what the last row's name begins
        with ("ours compiled", "ours compiled + graphed")."""
        if len(self.rows) < 2:
            return self.rows
        rungs = [i for i, row in enumerate(self.rows) if not row.step.compares]
        start, end = (rungs[0], rungs[-1] + 1) if rungs else (len(self.rows) - 1,) * 2
        first, last = self.rows[0].step.variant.partition(" ")[0], self.rows[-1].step.variant
        before = [r for r in self.rows[:start] if r.step.compares and r.step.variant.partition(" ")[0] == first]
        after = [r for r in self.rows[end:] if last.startswith(r.step.variant)]
        return before + [self.rows[i] for i in rungs] + after


@dataclass(frozen=True)
class KernelRow:
    """A kernel's case of one run that has samples."""

    kernel: Kernel
    bound: Bound | None  # by the rates that its run measured
    compiled: float | None  # seconds of torch.compile of the reference

    @property
    def seconds(self) -> float:
        return median(self.kernel.seconds)

    @property
    def shape(self) -> str:
        return "×".join(map(str, self.kernel.shape))


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

    @cached_property
    def kernels(self) -> list[KernelRow]:
        rows, results = [k for k in self.results.kernels if k.seconds], self.results
        compiled = {key(k): median(k.seconds) for k in rows if k.variant == "compiled"}
        matmul: dict[str, float] = {}  # FLOPs meet the rate of their own dtype; bytes are bytes
        for ceiling in results.ceilings:
            if ceiling.what == "matmul":
                matmul[ceiling.dtype] = max(ceiling.rate, matmul.get(ceiling.dtype, 0.0))
        copy = results.ceiling("copy")
        return [KernelRow(k, bound(k, matmul.get(k.dtype), copy), compiled.get(key(k))) for k in rows]

    def _workload(self, name: str) -> Workload:
        steps = [step for step in self.results.steps if step.workload == name]
        peak = self.results.peak.flops if self.results.peak else None
        baseline = _fastest(StepRow(step, peak) for step in steps if step.compares and is_reference(step))
        rows = [StepRow(step, peak, fastest_reference(step, steps)) for step in steps]
        # of the narrowest dtype: the fewest bytes that anybody has to move
        floors = [seconds for step in steps if (seconds := step_floor(step, self.results))]
        return Workload(name, rows, baseline, min(floors, default=None))


def read(path: Path) -> Run:
    """The run of a results file. OSError, or ValueError naming the field: no results file, a time or rate that is not
    positive, a turn that is not whole."""
    results = schema.read(path)
    found = {
        f"{part}[{i}].seconds": x.seconds for part in ("kernels", "steps") for i, x in enumerate(getattr(results, part))
    }
    for i, ceiling in enumerate(results.ceilings):
        if not ceiling.rates:
            raise ValueError(f"ceilings[{i}].rates: got none, expected one at least")
        found[f"ceilings[{i}].rates"] = ceiling.rates
    found["peak.flops"] = [results.peak.flops] if results.peak else []
    for where, values in found.items():
        if values and min(values) <= 0:
            raise ValueError(f"{where}: got {min(values)}, expected more than 0")
    for i, step in enumerate(results.steps):
        if step.turn < 1 or len(step.seconds) % step.turn:
            raise ValueError(f"steps[{i}].turn: got {step.turn}, expected a divisor of its {len(step.seconds)} samples")
    return Run(path, results)


def _fastest(rows: Iterable[StepRow]) -> StepRow | None:
    return min((row for row in rows if row.seconds), key=lambda row: row.seconds, default=None)


def in_order(runs: Iterable[Run]) -> list[Run]:
    """GPUs before CPUs, then by name, date and commit."""
    return sorted(runs, key=lambda r: (r.results.device.type != "cuda", r.device, r.results.date, r.path.name))


def labels(runs: Sequence[Run]) -> dict[Path, str]:
    """A name for each run: its device. Runs of one device also have what first tells them apart: day, commit, file."""
    names = {}
    for run in runs:
        same = [other for other in runs if other.device == run.device]
        told = ([other.day for other in same], [other.commit for other in same], [other.path.name for other in same])
        apart = next((every for every in told if len(set(every)) == len(same)), [str(other.path) for other in same])
        names[run.path] = f"{run.device}, {apart[same.index(run)]}" if len(same) > 1 else run.device
    return names
