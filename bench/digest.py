"""The numbers that tables and pictures show: rows computed from results files, and least times of devices.

A step's parts (`model/work.py`) have two rooflines. The floor uses full rates: those that a run measured, or those of a
data sheet. No step is faster than its floor, unless a cache keeps data from one part to the next. The attainable time
uses ATTAINED, the shares of a data sheet's rates that good kernels reached on an H100.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from pathlib import Path
from statistics import median

from bench.results import Kernel, Results, Shape, Step
from bench.variants import WORKLOADS, Workload
from model.flops import flops_per_token, mfu
from model.work import SHEET, Shares, duration, step_work
from train.errors import one_line
from train.hardware import CARDS, lookup

ESTIMATED = ("gpt2", "shakespeare_char")  # workloads
ESTIMATED_ON = ("a100", "h100", "h200", "b200", "l4", "4090")  # of CARDS


def roofline(step: Workload | Shape, size: int, flops: float, bandwidth: float, shares: Shares = SHEET) -> float:
    """Seconds of a step's parts, one after the other. Each part takes the longer of its FLOPs' and its bytes' times.

    size: bytes of every element. flops, bandwidth: FLOP/s and bytes/s.
    """
    sizes = dict.fromkeys(("compute", "stream", "gradients"), size)
    parts = step_work(step.config, step.batch_size, accumulation=step.accumulation, **sizes, fused_gelu=True)
    return duration(parts.items(), flops, bandwidth, shares)


def short_name(name: str) -> str:
    """torch's name of a device, without the maker NVIDIA."""
    return name.removeprefix("NVIDIA ").strip()


@dataclass(frozen=True)
class Estimate:
    """A workload on a device where it was not measured."""

    device: str
    workload: Workload
    peak: float  # FLOP/s, dense, bfloat16
    bandwidth: float  # bytes/s
    source: str

    def seconds(self, shares: Shares) -> float:
        return roofline(self.workload, 2, self.peak, self.bandwidth, shares)

    def mfu(self, shares: Shares, formula: str = "nanogpt") -> float:
        flops = flops_per_token(self.workload.config, formula) * self.workload.tokens
        return mfu(flops, self.seconds(shares), self.peak)


def estimates(runs: Iterable["Run"]) -> list[Estimate]:
    """An estimate for each workload of ESTIMATED on each device of ESTIMATED_ON, unless a run measured it."""
    measured = {(lookup(run.results.device.name), s.workload) for run in runs for s in run.results.steps if s.seconds}
    return [
        Estimate(short_name(CARDS[card].name), WORKLOADS[name], row.bf16 * 1e12, row.bandwidth * 1e9, row.source)
        for name in ESTIMATED
        for card in ESTIMATED_ON
        if ((row := lookup(CARDS[card].name)), name) not in measured
    ]


@dataclass(frozen=True)
class Steps:
    """The steps of one workload in one run, in the file's order."""

    name: str
    run: "Run"
    rows: list[Step]

    @property
    def baseline(self) -> Step | None:
        """The fastest reference."""
        return _fastest(row for row in self.rows if row.compares and not row.ours)

    @property
    def compared(self) -> list[Step]:
        """All steps except our rungs, the steps between the reference's and ours."""
        return [row for row in self.rows if row.compares or not row.ours]

    @property
    def best(self) -> Step | None:
        """Our fastest step."""
        return _fastest(row for row in self.compared if row.ours)

    def mfu(self, row: Step, formula: str = "nanogpt", seconds: float | None = None) -> float | None:
        """From 0 to 1; None without samples. seconds: a time to use instead of the step's own."""
        seconds = seconds or row.median
        return mfu(row.flops[formula], seconds, self.run.results.peak.flops) if seconds else None

    def speedup(self, row: Step) -> float | None:
        """Over the fastest reference in the same rounds; None without one, or without samples."""
        references = [other for other in self.rows if other.compares and not other.ours]
        times = [median(samples) for other in references if (samples := other.beside(row))]
        return min(times) / row.median if times and row.median else None

    @cached_property
    def floor(self) -> float | None:
        """Least seconds of a step, at the rates that its run measured; None without them.

        It uses the narrowest dtype of the rows, which moves the fewest bytes. On a CPU only FLOPs count: its caches can
        hold all data of a small step.
        """
        results = self.run.results
        rates = results.ceiling("matmul"), results.ceiling("copy") if results.device.type == "cuda" else inf
        size = 4 if all(row.dtype == "float32" for row in self.rows) else 2
        return roofline(self.rows[0].shape, size, *rates) if all(rates) else None

    @property
    def ladder(self) -> list[Step]:
        """From the reference's step to ours: all modes of the first row, the rungs, and the last row, after the rows
        that it extends. "ours compiled + graphed" extends "ours compiled".
        """
        first, last = self.rows[0].variant.partition(" ")[0] + " ", self.rows[-1].variant
        rows = [(row, row.variant) for row in self.rows]
        return [row for row, name in rows if not row.compares or name.startswith(first) or last.startswith(name)]


@dataclass(frozen=True)
class KernelRow:
    """A kernel's row that has samples, and the ceiling that bounds it: the matmul's for its FLOPs, or the copy's for
    its bytes, whichever takes longer."""

    kernel: Kernel
    bounded: str  # "matmul", "copy", or "" if it counts neither FLOPs nor bytes
    rate: float | None  # FLOP/s or bytes/s
    share: float | None  # of the ceiling, 0 to 1; None if that was not measured
    speedup: float | None  # over torch.compile of the reference

    @property
    def seconds(self) -> float:
        return median(self.kernel.seconds)

    @property
    def shape(self) -> str:
        return "×".join(map(str, self.kernel.shape))


def kernel_row(kernel: Kernel, matmul: float | None, copy: float | None, compiled: float | None) -> KernelRow:
    """matmul: FLOP/s in the kernel's dtype; copy: bytes/s; compiled: seconds. Without ceilings, a kernel with FLOPs
    counts as a matmul."""
    seconds = median(kernel.seconds)
    work = [("matmul", kernel.flops, matmul), ("copy", kernel.bytes, copy)]
    bounds = [(n / ceiling if ceiling else 0.0, what, n) for what, n, ceiling in work if n]
    least, what, amount = max(bounds, key=lambda bound: bound[0], default=(None, "", None))
    speedup = compiled / seconds if compiled else None
    return KernelRow(kernel, what, amount and amount / seconds, least / seconds if least else None, speedup)


@dataclass(frozen=True)
class Run:
    path: Path
    results: Results
    label: str = ""  # its device; if other runs have that device, also its file
    suffix: str = ""  # for names of files; unique

    @property
    def file(self) -> str:
        """The name of the file, as a report may show it."""
        return one_line(self.path.name)

    @property
    def device(self) -> str:
        name, threads = short_name(self.results.device.name), self.results.device.threads
        return f"{name}, {threads} thread{'s' * (threads != 1)}" if threads else name

    @property
    def commit(self) -> str:
        return self.results.commit.id[:12] + " (changed)" * (not self.results.commit.clean)

    @property
    def day(self) -> str:
        return self.results.date[:10]

    @property
    def source(self) -> str:
        """File, device, commit and day, for a caption."""
        state = "" if self.results.complete else ", a partial run"
        return f"{self.file} ({self.device}, commit {self.commit}, {self.day}{state})"

    @cached_property
    def steps(self) -> list[Steps]:
        found: dict[str, list[Step]] = {}
        for step in self.results.steps:
            found.setdefault(step.workload, []).append(step)
        return [Steps(name, self, rows) for name, rows in found.items()]

    @cached_property
    def kernels(self) -> list[KernelRow]:
        rows, copy = [kernel for kernel in self.results.kernels if kernel.seconds], self.results.ceiling("copy")
        compiled = {row.group: median(row.seconds) for row in rows if row.variant == "compiled"}
        return [
            kernel_row(row, self.results.ceiling("matmul", row.dtype), copy, compiled.get(row.group)) for row in rows
        ]


def _fastest(rows: Iterable[Step]) -> Step | None:
    return min((row for row in rows if row.seconds), key=lambda row: row.median, default=None)


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Each file once, GPUs before CPUs, then by device, date and file name. Labels and suffixes are filled in."""
    once = {run.path.resolve(): run for run in runs}.values()
    ordered = sorted(once, key=lambda r: (r.results.device.type != "cuda", r.device, r.results.date, r.file))
    devices, names = [run.device for run in ordered], [slug(run.path.stem) for run in ordered]
    unique, found = len(set(names)) == len(names), []
    for i, (run, name) in enumerate(zip(ordered, names, strict=True)):
        file = run.file if unique else one_line(run.path)
        label = run.device if devices.count(run.device) == 1 else f"{run.device}, {file}"
        found.append(replace(run, label=label, suffix=name if unique else f"{i}-{name}"))
    return found


def slug(text: str) -> str:
    """The text as a part of a file's name. Names in a results file can have any characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
