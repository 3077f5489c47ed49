"""Tables of results, for the terminal, the page and the Markdown."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.digest import KernelRow, Run, StepRow, Steps
from bench.results import Results, quantile
from bench.timing import NO_TIME

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
    columns = [list(column) for column in zip(*rows, strict=True)]
    for i, column in enumerate(columns):
        width = max(map(len, column))
        columns[i] = [cell.rjust(width) if i else cell.ljust(width) for cell in column]
    lines = ["  ".join(row) for row in zip(*columns, strict=True)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float) -> str:
    """The number with four digits, or more if there are more before the point."""
    size = abs(value)
    places = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{places}f}"


def shown(value: float | None, times: float = 1, form: str = "") -> str:
    """A cell with the value times `times`, in format `form`, or with four digits; a dash for None."""
    if value is None:
        return NONE
    return format(times * value, form) if form else number(times * value)


def rate(row: KernelRow) -> str:
    """TFLOP/s if a matmul bounds the kernel, GB/s if a copy does."""
    if not row.bounded:
        return NONE
    return f"{number(row.rate / 1e12)} TFLOP/s" if row.bounded == "matmul" else f"{number(row.rate / 1e9)} GB/s"


def steps(found: Steps) -> Table:
    """One workload of one run, a row for each variant."""
    kinds = ["missing" if not row.seconds else "ours" if row is found.best else "" for row in found.rows]
    rows = list(zip(kinds, map(_step_cells, found.rows), strict=True))
    caption = f"Speed-up is over {found.baseline.step.variant}. " if found.baseline else ""
    if found.floor:
        first = found.rows[0]
        cells = dict.fromkeys(rows[0][1], NONE) | {
            "step": "floor",
            "median, ms": shown(found.floor, 1e3),
            "tokens, 1/s": shown(first.step.tokens / found.floor),
            "MFU, %": shown(first.mfu(seconds=found.floor), 100, ".1f"),
            "MFU 6N, %": shown(first.mfu("6n", found.floor), 100, ".1f"),
            "speed-up, ×": shown(found.baseline and found.baseline.seconds / found.floor, form=".2f"),
            "note": "computed, not measured",
        }
        rows.append(("computed", cells))
        parts = "each part of the step at the matmul and copy rates of this run."
        flops = "the step's FLOPs at the matmul rate of this run; its bytes stay in the caches."
        caption += f"The floor is computed: {parts if found.run.results.device.type == 'cuda' else flops}"
    else:
        caption += "It has no floor, since the file lacks a measured rate."
    return Table(f"{found.name} on {found.run.label}", f"{caption} From {found.run.source}.", rows)


def _step_cells(row: StepRow) -> Cells:
    step = row.step
    return {
        "step": step.variant,
        "dtype": step.dtype,
        "median, ms": shown(row.seconds, 1e3),
        "p10, ms": shown(row.quantile(0.1), 1e3),
        "p90, ms": shown(row.quantile(0.9), 1e3),
        "tokens, 1/s": shown(row.tokens_per_second),
        **mfu_cells(row),
        "speed-up, ×": shown(row.speedup, form=".2f"),
        "memory, GB": shown(step.peak_memory if row.seconds else None, 1e-9, ".2f"),
        "host, %": shown(row.host_share, 100, ".1f"),
        "samples": str(len(step.seconds)),
        "note": row.missing if not row.seconds else "" if step.compares else "rung",
    }


def mfu_cells(row: StepRow) -> Cells:
    return {"MFU, %": shown(row.mfu(), 100, ".1f"), "MFU 6N, %": shown(row.mfu("6n"), 100, ".1f")}


def kernels(run: Run) -> Table | None:
    """Every kernel's row that has samples; None if there is none."""
    rows = [("ours" if row.kernel.variant == "fused" else "", _kernel_cells(row)) for row in run.kernels]
    caption = (
        "Share is of the ceiling that the operation meets first, copy or matmul, as measured in the same run. "
        f"Speed-up is over torch.compile of the reference. From {run.source}."
    )
    return Table(f"Kernels on {run.label}", caption, rows) if rows else None


def _kernel_cells(row: KernelRow) -> Cells:
    kernel = row.kernel
    return {
        "kernel": kernel.case,
        "shape": row.shape,
        "dtype": kernel.dtype,
        "direction": kernel.direction,
        "variant": kernel.variant,
        "median, µs": shown(row.seconds, 1e6),
        "p10, µs": shown(quantile(kernel.seconds, 0.1), 1e6),
        "p90, µs": shown(quantile(kernel.seconds, 0.9), 1e6),
        "rate": rate(row),
        "share, %": shown(row.share, 100, ".1f"),
        "speed-up, ×": shown(row.speedup, form=".2f"),
    }


def missing(run: Run) -> list[str]:
    """What a run lacks, one line each: failed parts, failed tests, skipped rows."""
    results, tests = run.results, run.results.tests
    lines = [] if results.complete else ["The run is partial: it was stopped, ran out of time, or a part failed."]
    lines += failed(results)
    if tests is None:
        lines.append("It ran no tests.")
    elif tests.failed:
        names = ", ".join(tests.failures)
        lines.append(f"{tests.failed} of its tests failed{': ' if names else ''}{names}.")
    present = {
        "matmul ceiling": results.ceiling("matmul"),
        "copy ceiling": results.ceiling("copy"),
        "kernel row": results.kernels,
        "training step": results.steps,
    }
    return lines + [f"There is no {what}." for what, value in present.items() if not value] + skipped(run)


def failed(results: Results) -> list[str]:
    return [f"{failure.part} failed: {failure.error}" for failure in results.failures]


def skipped(run: Run) -> list[str]:
    """Rows without samples, and why: one line for each step; kernels with the same variant and reason share a line."""
    steps = [f"{w.name}, {row.step.variant}: {row.missing}" for w in run.steps for row in w.rows if not row.seconds]
    late = Counter(
        ("" if k.skipped == NO_TIME else f" of {k.variant}", k.skipped or "no reason given")
        for k in run.results.kernels
        if not k.seconds
    )
    return steps + [f"{count} kernel rows{of} not measured: {why}" for (of, why), count in late.items()]


def summary(results: Results) -> str:
    """Everything that was measured, and what was not, for a terminal."""
    run = Run(Path(), results)
    lines = [f"{run.device}, torch {results.software.torch}, commit {run.commit}"]
    lines.append(f"peak {number(results.peak.flops / 1e12)} TFLOP/s: {results.peak.source}")
    rates = {"matmul": (1e-12, "TFLOP/s"), "copy": (1e-9, "GB/s")}
    for each in results.ceilings:
        times, unit = rates[each.what]
        lines.append(f"measured ceiling of a {each.what}: {number(times * each.rate)} {unit} ({each.dtype})")
    if results.tests:
        lines.append(f"GPU tests: {results.tests.passed} passed, {results.tests.failed} failed")
    blocks = ["\n".join(lines)]
    if found := kernels(run):
        blocks.append(found.text())
    blocks += [f"{each.name}\n{steps(each).text()}" for each in run.steps]
    return "\n\n".join([*blocks, "\n".join([*skipped(run), *failed(results)])]).strip()
