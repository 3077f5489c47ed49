"""The numbers that tables and pictures show: rows computed from results files, and estimates for other devices.

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
from bench.variants import WORKLOADS
from model.work import ATTAINED, SHEET, Shares, duration, mfu, step_work
from train.errors import one_line
from train.hardware import CARDS, data_sheet

ESTIMATED = ("gpt2", "shakespeare_char")  # workloads
ESTIMATED_ON = ("a100", "h100", "h200", "b200", "l4", "4090")  # of CARDS


def short_name(name: str) -> str:
    """torch's name of a device, without the maker NVIDIA."""
    return name.removeprefix("NVIDIA ").strip()


def roofline(step: Shape, size: int, flops: float, bandwidth: float, shares: Shares = SHEET) -> float:
    """Seconds of a step's parts, one after the other. Each part takes the longer of its FLOPs' and its bytes' times.

    size: bytes of every element. flops, bandwidth: FLOP/s and bytes/s.
    """
    sizes = dict.fromkeys(("compute", "stream", "gradients"), size)
    parts = step_work(step.config, step.batch_size, accumulation=step.accumulation, **sizes, fused_gelu=True)
    return duration(parts.items(), flops, bandwidth, shares)


@dataclass(frozen=True)
class Steps:
    """The steps of one workload on one device, in the file's order; or one step that nobody measured."""

    name: str
    rows: list[Step]
    peak: float  # FLOP/s
    matmul: float | None  # FLOP/s; None: not measured
    copy: float | None  # bytes/s; infinite on a CPU, whose caches can hold all data of a small step
    label: str  # the device's
    source: str  # the file, or the data sheet
    suffix: str = ""  # for names of files
    estimated: bool = False

    @property
    def references(self) -> list[Step]:
        return [row for row in self.rows if row.compares and not row.ours]

    @property
    def baseline(self) -> Step | None:
        """The fastest reference."""
        return _fastest(self.references)

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
        return mfu(row.flops[formula], seconds, self.peak) if seconds else None

    def speedup(self, row: Step) -> float | None:
        """Over the fastest reference in the same rounds; None without one, or without samples."""
        times = [median(samples) for other in self.references if (samples := other.beside(row))]
        return min(times) / row.median if times and row.median else None

    @property
    def floor(self) -> float | None:
        """Least seconds of a step, at the device's rates; None without them.

        It uses the narrowest dtype of the rows, which moves the fewest bytes.
        """
        size = 4 if all(row.dtype == "float32" for row in self.rows) else 2
        known = self.matmul and self.copy
        return roofline(self.rows[0].shape, size, self.matmul, self.copy) if known else None

    @property
    def ladder(self) -> list[Step]:
        """From the reference's step to ours: all modes of the first row, the rungs, and the last row, after the rows
        that it extends. "ours compiled + graphed" extends "ours compiled". Each changes the one before it, so a plain
        torch that is not compiled, as the row before it is, is no rung.
        """
        first, last = self.rows[0].variant.partition(" ")[0] + " ", self.rows[-1].variant

        def belongs(row: Step) -> bool:
            if row.compares:
                return row.variant.startswith(first) or last.startswith(row.variant)
            return row.ours or not row.variant.endswith(" eager")

        return [row for row in self.rows if belongs(row)]


def _fastest(rows: Iterable[Step]) -> Step | None:
    return min((row for row in rows if row.seconds), key=lambda row: row.median, default=None)


@dataclass(frozen=True)
class KernelRow:
    """A kernel's row that has samples, and the ceiling that bounds it: the matmul's for its FLOPs, or the copy's for
    its bytes, whichever takes longer. Without ceilings, a kernel with FLOPs counts as a matmul."""

    kernel: Kernel
    bounded: str  # "matmul", "copy", or "" if it counts neither FLOPs nor bytes
    rate: float | None  # FLOP/s or bytes/s
    share: float | None  # of the ceiling, 0 to 1; None if that was not measured
    speedup: float | None  # over torch.compile of the reference


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
        results, found = self.results, {}
        for step in results.steps:
            found.setdefault(step.workload, []).append(step)
        copy = results.ceiling("copy") if results.device.type == "cuda" else inf
        rates = results.peak.flops, results.ceiling("matmul"), copy
        return [Steps(name, rows, *rates, self.label, self.source, self.suffix) for name, rows in found.items()]

    @cached_property
    def kernels(self) -> list[KernelRow]:
        copy, found = self.results.ceiling("copy"), []
        rows = [kernel for kernel in self.results.kernels if kernel.seconds]
        compiled = {row.group: row.median for row in rows if row.variant == "compiled"}
        for row in rows:
            work = [("matmul", row.flops, self.results.ceiling("matmul", row.dtype)), ("copy", row.bytes, copy)]
            bounds = [(n / ceiling if ceiling else 0.0, what, n) for what, n, ceiling in work if n]
            least, what, amount = max(bounds, key=lambda bound: bound[0], default=(None, "", None))
            rate, share = amount and amount / row.median, least / row.median if least else None
            speedup = compiled[row.group] / row.median if row.group in compiled else None
            found.append(KernelRow(row, what, rate, share, speedup))
        return found


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


def estimates(runs: Iterable[Run]) -> list[Steps]:
    """The attainable step of each workload of ESTIMATED on each device of ESTIMATED_ON, unless a run measured it."""
    measured = {
        (data_sheet(run.results.device.name), s.workload) for run in runs for s in run.results.steps if s.seconds
    }
    found = []
    for name in ESTIMATED:
        for card in ESTIMATED_ON:
            sheet = data_sheet(CARDS[card].name)
            if (sheet, name) not in measured:
                workload, rates = WORKLOADS[name], (sheet.bf16 * 1e12, sheet.bandwidth * 1e9)
                row = workload.row("an estimate", seconds=[roofline(workload.shape, 2, *rates, ATTAINED)])
                label = short_name(CARDS[card].name)
                found.append(Steps(name, [row], rates[0], *rates, label, sheet.source, estimated=True))
    return found


def slug(text: str) -> str:
    """The text as a part of a file's name. Names in a results file can have any characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
