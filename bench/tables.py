"""Tables of results. The terminal, the page and the Markdown show the same ones."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from bench.digest import KernelRow, Run, Steps
from bench.results import Results, Step
from bench.rules import NO_TIME
from model.work import ATTAINED

NONE = "–"

Cells = dict[str, str]  # by heading: "name", or "name, unit"


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    rows: Sequence[tuple[str, Cells]]  # kind ("ours", "computed", "missing" or none) and cells

    @property
    def headings(self) -> list[str]:
        return list(self.rows[0][1])

    @property
    def numbers(self) -> list[str]:
        """Headings of the columns that are aligned to the right."""
        return [heading for heading in self.headings if ", " in heading or heading in ("rate", "samples")]

    def text(self) -> str:
        """The table for a terminal, without rows that have no numbers."""
        return aligned([self.headings, *(list(cells.values()) for kind, cells in self.rows if kind != "missing")])


def aligned(rows: list[list[str]]) -> str:
    """Columns, the first aligned to the left, the others to the right; a rule under the first row."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    lines = [form.format(*row) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def digits(value: float | None, times: float = 1, form: str = "") -> str:
    """The value times `times`, in format `form`, or with four digits, or more before the point. A dash for None."""
    if value is None:
        return NONE
    size = abs(times * value)
    places = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return format(times * value, form or f",.{places}f")


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def rate(row: KernelRow) -> str:
    """TFLOP/s if a matmul bounds the kernel, GB/s if a copy does."""
    if not row.bounded:
        return NONE
    return f"{digits(row.rate, 1e-12)} TFLOP/s" if row.bounded == "matmul" else f"{digits(row.rate, 1e-9)} GB/s"


def sources(found: Sequence[Steps]) -> str:
    return "; ".join(dict.fromkeys(steps.source for steps in found))


def devices(found: Sequence[Steps]) -> Table | None:
    """Our fastest step of each workload on each device, estimates too. None if there is none."""
    rows = []
    for steps in (steps for steps in found if steps.best):
        best, reference = steps.best, steps.baseline
        cells = {
            "workload": steps.name,
            "device": steps.label,
            "our best step": best.variant,
            "median, ms": digits(best.median, 1e3),
            **_mfu(steps, best),
            "floor, ms": digits(steps.floor, 1e3),
            "floor's MFU, %": digits(steps.floor and steps.mfu(best, seconds=steps.floor), 100, ".1f"),
            "reference, ms": digits(reference and reference.median, 1e3),
            "speed-up, ×": digits(steps.speedup(best), form=".2f"),
        }
        rows.append(("computed" if steps.estimated else "", cells))
    measured, guesses = ([steps for steps in found if steps.estimated is kind] for kind in (False, True))
    caption = "MFU counts (6N + 12LHQT) FLOPs a token, MFU 6N counts 6N, over the device's dense peak. "
    if references := dict.fromkeys(s.baseline.variant for s in measured if s.best and s.baseline):
        caption += f"The reference is the fastest of its modes ({', '.join(references)}). "
    caption += "The floor is computed, at the rates that the run measured. "
    if guesses:
        caption += (
            "Estimates are not measurements: nobody has run these. Their floor takes each part of the step at its data "
            "sheet's FLOP/s or bytes/s, whichever takes longer. Their time assumes that every device reaches what good "
            f"kernels reach on an H100: {100 * ATTAINED.matmul:.0f} % of the sheet's FLOP/s in matmuls, "
            f"{100 * ATTAINED.attention:.0f} % in attention, {100 * ATTAINED.bandwidth:.0f} % of its bytes/s. "
            f"Whether the step fits into the memory is not checked. Data sheets: {sources(guesses)}. "
        )
    return Table("Our best step on each device", f"{caption}From {sources(measured)}.", rows) if rows else None


def steps(found: Steps) -> Table:
    """One workload of one run, a row for each variant."""
    rows = [
        ("missing" if not row.seconds else "ours" if row is found.best else "", _step(found, row)) for row in found.rows
    ]
    caption = f"Speed-up is over {found.baseline.variant}. " if found.baseline else ""
    if found.floor:
        first = found.rows[0]
        cells = dict.fromkeys(rows[0][1], NONE) | {
            "step": "floor",
            "median, ms": digits(found.floor, 1e3),
            "tokens, 1/s": digits(first.tokens / found.floor),
            **_mfu(found, first, found.floor),
            "speed-up, ×": digits(found.baseline and found.baseline.median / found.floor, form=".2f"),
            "note": "computed, not measured",
        }
        rows.append(("computed", cells))
        parts = "each part of the step at the matmul and copy rates of this run."
        flops = "the step's FLOPs at the matmul rate of this run; its bytes stay in the caches."
        caption += f"The floor is computed: {parts if np.isfinite(found.copy) else flops}"
    else:
        caption += "It has no floor, since the file lacks a measured rate."
    return Table(f"{found.name} on {found.label}", f"{caption} From {found.source}.", rows)


def _step(steps: Steps, row: Step) -> Cells:
    host = median(row.host_seconds) / row.median if row.host_seconds and row.seconds else None
    return {
        "step": row.variant,
        "dtype": row.dtype,
        **_times(row.seconds, "ms", 1e3),
        "tokens, 1/s": digits(row.median and row.tokens / row.median),
        **_mfu(steps, row),
        "speed-up, ×": digits(steps.speedup(row), form=".2f"),
        "memory, GB": digits(row.peak_memory if row.seconds else None, 1e-9, ".2f"),
        "host, %": digits(host, 100, ".1f"),
        "samples": str(len(row.seconds)),
        "note": row.missing if not row.seconds else "" if row.compares else "rung",
    }


def _times(seconds: list[float], unit: str, times: float) -> Cells:
    """The median, and the samples that 10 % and 90 % of the samples lie below."""
    low, high = np.quantile(seconds, [0.1, 0.9], method="nearest").tolist() if seconds else (None, None)
    found = {"median": median(seconds) if seconds else None, "p10": low, "p90": high}
    return {f"{name}, {unit}": digits(value, times) for name, value in found.items()}


def _mfu(steps: Steps, row: Step, seconds: float | None = None) -> Cells:
    headings = {"nanogpt": "MFU, %", "6n": "MFU 6N, %"}
    return {heading: digits(steps.mfu(row, formula, seconds), 100, ".1f") for formula, heading in headings.items()}


def kernels(run: Run) -> Table | None:
    """Every kernel's row that has samples; None if there is none."""
    rows = []
    for row in run.kernels:
        kernel = row.kernel
        cells = {
            "kernel": kernel.case,
            "shape": kernel.sizes,
            "dtype": kernel.dtype,
            "direction": kernel.direction,
            "variant": kernel.variant,
            **_times(kernel.seconds, "µs", 1e6),
            "rate": rate(row),
            "share, %": digits(row.share, 100, ".1f"),
            "speed-up, ×": digits(row.speedup, form=".2f"),
        }
        rows.append(("ours" if kernel.variant == "fused" else "", cells))
    caption = (
        "Share is of the ceiling that the operation meets first, copy or matmul, as measured in the same run. "
        f"Speed-up is over torch.compile of the reference. From {run.source}."
    )
    return Table(f"Kernels on {run.label}", caption, rows) if rows else None


def files(runs: Sequence[Run]) -> Table:
    """A row for each file."""
    rows = []
    for run in runs:
        found, software = run.results, run.results.software
        cells = {
            "file": run.file,
            "device": run.device,
            "commit": run.commit,
            "date": run.day,
            "torch": software.torch,
            "Triton": software.triton or NONE,
            "CUDA": software.cuda or NONE,
            "driver": found.device.driver or NONE,
            "peak, TFLOP/s": digits(found.peak.flops, 1e-12),
            "matmul, TFLOP/s": digits(found.ceiling("matmul"), 1e-12),
            "copy, GB/s": digits(found.ceiling("copy"), 1e-9),
            "state": "complete" if found.complete else "partial",
        }
        rows.append(("" if found.complete else "missing", cells))
    peaks = dict.fromkeys(f"{run.device}: {run.results.peak.source}" for run in runs)
    caption = "Peak is what MFU is a share of. Matmul and copy are the best that the device did in the same run."
    return Table("The files", f"{caption} Peaks: {'; '.join(peaks)}.", rows)


def missing(run: Run) -> list[str]:
    """What a run lacks, one line each: failed parts, failed tests, skipped rows."""
    results, tests = run.results, run.results.tests
    lines = [] if results.complete else ["The run is partial: it was stopped, ran out of time, or a part failed."]
    if tests is None:
        lines.append("It ran no tests.")
    elif tests.failed:
        lines.append(f"{tests.failed} of its tests failed: {', '.join(tests.failures)}.")
    present = {f"{what} ceiling": results.ceiling(what) for what in ("matmul", "copy")}
    present |= {"kernel row": results.kernels, "training step": results.steps}
    return [*lines, *(f"There is no {what}." for what, value in present.items() if not value), *skipped(run)]


def skipped(run: Run) -> list[str]:
    """Failed parts, and rows without samples, and why. Kernels with the same variant and reason share a line."""
    failed = [f"{failure.part} failed: {failure.error}" for failure in run.results.failures]
    steps = [f"{w.name}, {row.variant}: {row.missing}" for w in run.steps for row in w.rows if not row.seconds]
    late = Counter(
        ("" if k.skipped == NO_TIME else f" of {k.variant}", k.skipped or "no reason given")
        for k in run.results.kernels
        if not k.seconds
    )
    return [*failed, *steps, *(f"{n} kernel rows{of} not measured: {why}" for (of, why), n in late.items())]


def summary(results: Results) -> str:
    """Everything that was measured, and what was not, for a terminal."""
    run = Run(Path(), results)
    lines = [f"{run.device}, torch {results.software.torch}, commit {run.commit}"]
    lines.append(f"peak {digits(results.peak.flops, 1e-12)} TFLOP/s: {results.peak.source}")
    for each in results.ceilings:
        times, unit = (1e-12, "TFLOP/s") if each.what == "matmul" else (1e-9, "GB/s")
        lines.append(f"measured ceiling of a {each.what}: {digits(max(each.rates), times)} {unit} ({each.dtype})")
    if results.tests:
        lines.append(f"GPU tests: {results.tests.passed} passed, {results.tests.failed} failed")
    blocks = ["\n".join(lines)]
    if found := kernels(run):
        blocks.append(found.text())
    blocks += [f"{each.name}\n{steps(each).text()}" for each in run.steps]
    return "\n\n".join([*blocks, "\n".join(skipped(run))]).strip()
