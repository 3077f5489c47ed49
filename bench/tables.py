"""Results as text for a terminal."""

from bench.schema import Kernel, Results, Step, median
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
    blocks += [kernels_table(results)] if results.kernels else []
    for workload in dict.fromkeys(step.workload for step in results.steps):
        rows = [step for step in results.steps if step.workload == workload]
        blocks.append(f"{workload}\n{steps_table(rows, results)}")
    skipped = [f"{row.variant}: {row.skipped}" for row in results.steps if row.skipped]
    blocks += ["not measured: " + "; ".join(skipped)] if skipped else []
    blocks += [f"failed: {failure.part}: {failure.error}" for failure in results.failures]
    return "\n\n".join(blocks)


def steps_table(rows: list[Step], results: Results) -> str:
    """One workload's: times, tokens/s, MFU of the device's peak in both conventions, memory, and the ratio to the best
    of the reference's modes."""
    references = [median(row.seconds) for row in rows if row.seconds and is_reference(row)]
    head = ["step", "ms/iter", "p10", "p90", "tokens/s", "MFU", "MFU 6N", "host ms", "peak GB", "speed-up"]
    table = [head]
    for row in (row for row in rows if row.seconds):
        seconds = median(row.seconds)
        peak = results.peak.flops if results.peak else float("nan")
        shares = [f"{mfu(row.flops[formula], seconds, peak):.1%}" for formula in ("nanogpt", "6n")]
        table.append(
            [
                row.variant,
                *(f"{1e3 * s:.2f}" for s in (seconds, quantile(row.seconds, 0.1), quantile(row.seconds, 0.9))),
                f"{tokens_per_second(row.tokens, seconds):,.0f}",
                *shares,
                f"{1e3 * median(row.host_seconds):.2f}" if row.host_seconds else "",
                f"{row.peak_memory / 1e9:.2f}" if row.peak_memory else "",
                f"{min(references) / seconds:.2f}x" if references else "",
            ]
        )
    return aligned(table)


def is_reference(row: Step) -> bool:
    return row.variant.startswith(("reference ", "nanoGPT "))


def kernels_table(results: Results) -> str:
    """Every kernel's rows: time, rate, share of the measured ceiling, ratio to torch.compile."""
    table = [["kernel", "shape", "direction", "variant", "us", "GB/s", "of copy", "to compiled"]]
    compiled = {key(row): median(row.seconds) for row in results.kernels if row.variant == "compiled" and row.seconds}
    copy = results.ceiling("copy")
    for row in (row for row in results.kernels if row.seconds):
        seconds = median(row.seconds)
        rate = row.bytes / seconds if row.bytes else None
        other = compiled.get(key(row))
        table.append(
            [
                row.case,
                "x".join(map(str, row.shape)),
                row.direction,
                row.variant,
                f"{1e6 * seconds:.1f}",
                f"{rate / 1e9:.0f}" if rate else "",
                f"{rate / copy:.0%}" if rate and copy else "",
                f"{other / seconds:.2f}x" if other else "",
            ]
        )
    return aligned(table)


def key(row: Kernel) -> tuple:
    return row.case, tuple(row.shape), row.dtype, row.direction
