"""Results as text for a terminal."""

from collections.abc import Iterable

from bench.bounds import Bound, bound
from bench.budget import NO_TIME
from bench.schema import Kernel, Peak, Results, Step, beside, median
from train.metrics import mfu, tokens_per_second


def quantile(samples: list[float], share: float) -> float:
    """The sample at that share of the way from the least to the largest, 0 to 1."""
    ordered = sorted(samples)
    return ordered[round(share * (len(ordered) - 1))]


def aligned(rows: list[list[str]]) -> str:
    """Columns, the first to the left, the others to the right; a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(results: Results) -> str:
    """Everything that was measured, in short."""
    blocks = [f"{results.device.name}, torch {results.software.torch}, commit {results.commit.id}"]
    rates = {"matmul": (1e12, "TFLOP/s"), "copy": (1e9, "GB/s")}
    found = [f"{c.what} {c.rate / rates[c.what][0]:.4g} {rates[c.what][1]} ({c.dtype})" for c in results.ceilings]
    if found:
        blocks.append("measured ceilings: " + ", ".join(found))
    if results.tests:
        blocks.append(f"GPU tests: {results.tests.passed} passed, {results.tests.failed} failed")
    if results.kernels:
        blocks.append(kernels_table(results.kernels, results.ceiling("matmul"), results.ceiling("copy")))
    for workload in dict.fromkeys(step.workload for step in results.steps):
        rows = [step for step in results.steps if step.workload == workload]
        blocks.append(f"{workload}\n{steps_table(rows, results.peak.flops if results.peak else None)}")
    skipped = [f"{row.variant}: {row.skipped}" for row in results.steps if row.skipped]
    if late := sum(row.skipped == NO_TIME for row in results.kernels):
        skipped.append(f"{late} of {len(results.kernels)} rows of kernels: {NO_TIME}")
    blocks += ["not measured: " + "; ".join(skipped)] if skipped else []
    blocks += [f"failed: {failure.part}: {failure.error}" for failure in results.failures]
    return "\n\n".join(blocks)


def short_name(name: str) -> str:
    """Of torch's name of a device: without the maker, who is nearly always the same."""
    return name.removeprefix("NVIDIA ").strip()


def steps_table(rows: list[Step], peak: float | None) -> str:
    """One workload's: times, tokens/s, MFU of `peak` FLOP/s in both conventions, memory, and the ratio to the best of
    the reference's modes."""
    head = ["step", "ms/iter", "p10", "p90", "tokens/s", "MFU", "MFU 6N", "host ms", "peak GB", "speed-up"]
    table = [head]
    for row in (row for row in rows if row.seconds):
        seconds, reference = median(row.seconds), baseline(row, rows)
        shares = [f"{mfu(row.flops[formula], seconds, peak):.1%}" if peak else "" for formula in ("nanogpt", "6n")]
        table.append(
            [
                row.variant,
                *(f"{1e3 * s:.2f}" for s in (seconds, quantile(row.seconds, 0.1), quantile(row.seconds, 0.9))),
                f"{tokens_per_second(row.tokens, seconds):,.0f}",
                *shares,
                f"{1e3 * median(row.host_seconds):.2f}" if row.host_seconds else "",
                f"{row.peak_memory / 1e9:.2f}" if row.peak_memory else "",
                f"{reference / seconds:.2f}x" if reference else "",
            ]
        )
    return aligned(table)


def step_facts(row: Step, peak: Peak) -> dict[str, object]:
    """What stands beside a row's times in a file of pytest-benchmark's; of the median."""
    seconds = median(row.seconds)
    return {
        "dtype": row.dtype,
        "tokens_per_second": tokens_per_second(row.tokens, seconds),
        **{f"mfu_{formula}": mfu(flops, seconds, peak.flops) for formula, flops in row.flops.items()},
        "peak_memory": row.peak_memory,
        "host_seconds": median(row.host_seconds) if row.host_seconds else None,
    }


def baseline(row: Step, rows: Iterable[Step]) -> float | None:
    """Seconds of the fastest of the reference's modes, in the rounds of this row."""
    references = [beside(other, row) for other in rows if other.compares and is_reference(other)]
    return min((median(samples) for samples in references if samples), default=None)


def is_reference(row: Step) -> bool:
    """Whether it runs none of our code."""
    return row.variant.startswith(("reference ", "nanoGPT "))


def kernels_table(rows: list[Kernel], matmul: float | None, copy: float | None) -> str:
    """Every row with samples: median time, rate, share of the ceiling that it meets first (FLOP/s of a matmul, bytes/s
    of a copy), and how many times faster than torch.compile's."""
    table = [["kernel", "shape", "direction", "variant", "us", "rate", "of ceiling", "to compiled"]]
    compiled = {key(row): median(row.seconds) for row in rows if row.variant == "compiled" and row.seconds}
    for row in (row for row in rows if row.seconds):
        seconds, other = median(row.seconds), compiled.get(key(row))
        found = bound(row, matmul, copy)
        table.append(
            [
                row.case,
                "x".join(map(str, row.shape)),
                row.direction,
                row.variant,
                f"{1e6 * seconds:.1f}",
                rate(found) if found else "",
                f"{found.share:.0%}" if found and found.share else "",
                f"{other / seconds:.2f}x" if other else "",
            ]
        )
    return aligned(table)


def rate(found: Bound) -> str:
    if found.what == "matmul":
        return f"{number(found.rate / 1e12)} TFLOP/s"
    return f"{number(found.rate / 1e9)} GB/s"


def number(value: float) -> str:
    """Four digits, or as many as there are before the point."""
    size = abs(value)
    places = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{places}f}"


def key(row: Kernel) -> tuple:
    return row.case, tuple(row.shape), row.dtype, row.direction
