"""The numbers that tables and pictures show, computed from results files.

The floor of a step is the time of its parts (`model/work.py`), one after the other, at the rates that the run measured.
Each part takes the longer of its FLOPs' and its bytes' times. No step is faster than its floor, unless a cache keeps
data from one part to the next.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from statistics import median

from bench.results import Kernel, Results, Step
from model.flops import mfu
from model.work import duration, step_work
from train.errors import one_line


def short_name(name: str) -> str:
    """torch's name of a device, without the maker NVIDIA."""
    return name.removeprefix("NVIDIA ").strip()


@dataclass(frozen=True)
class Steps:
    """The steps of one workload of a run, in the file's order."""

    run: "Run"
    name: str
    rows: list[Step]

    @property
    def references(self) -> list[Step]:
        return [row for row in self.rows if row.compares and not row.ours]

    @property
    def baseline(self) -> Step | None:
        """The fastest reference."""
        return _fastest(self.references)

    @property
    def best(self) -> Step | None:
        """Our fastest step."""
        return _fastest(row for row in self.rows if row.ours)

    def mfu(self, row: Step, seconds: float | None = None) -> float | None:
        """nanoGPT's, from 0 to 1; None without samples. seconds: a time to use instead of the step's own."""
        seconds = seconds or row.median
        return mfu(row.flops["nanogpt"], seconds, self.run.results.peak.flops) if seconds else None

    def speedup(self, row: Step) -> float | None:
        """Over the fastest reference in the same rounds; None without one, or without samples."""
        times = [median(samples) for other in self.references if (samples := other.beside(row))]
        return min(times) / row.median if times and row.median else None

    @property
    def floor(self) -> float | None:
        """Least seconds of a step; None if the run measured no rates.

        It uses the narrowest dtype of the rows, which moves the fewest bytes. A CPU's caches can hold all data of a
        small step, so there bytes take no time.
        """
        matmul, copy = (self.run.results.ceiling(what) for what in ("matmul", "copy"))
        if not (matmul and copy):
            return None
        size = 4 if all(row.dtype == "float32" for row in self.rows) else 2
        sizes, shape = dict.fromkeys(("compute", "stream", "gradients"), size), self.rows[0].shape
        parts = step_work(shape.config, shape.batch_size, accumulation=shape.accumulation, **sizes, fused_gelu=True)
        return duration(parts.items(), matmul, copy if self.run.on_gpu else inf)


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
    label: str = ""  # unique in a report: its device; if other runs have that device, also its file

    @property
    def file(self) -> str:
        """The name of the file, as a report may show it."""
        return one_line(self.path.name)

    @property
    def on_gpu(self) -> bool:
        return self.results.device.type == "cuda"

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
        return [Steps(self, name, rows) for name, rows in found.items()]

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
    """Each file once, GPUs before CPUs, then by device, date and file name, with labels."""
    once = {run.path.resolve(): run for run in runs}.values()
    ordered = sorted(once, key=lambda run: (not run.on_gpu, run.device, run.results.date, run.file))
    devices, files, found = [run.device for run in ordered], [run.file for run in ordered], []
    for run in ordered:
        file = run.file if files.count(run.file) == 1 else one_line(run.path)
        label = run.device if devices.count(run.device) == 1 else f"{run.device}, {file}"
        found.append(Run(run.path, run.results, label))
    return found
