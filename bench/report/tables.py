"""The report's tables, and its list of what is missing. The same cells go into Markdown and into the page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench import tables
from bench.report.digest import KernelRow, Run, StepRow, Workload
from bench.report.estimates import ATTAINED, Estimate
from bench.schema import Kernel, Results

NONE = "–"
NO_FLOOR = "no floor, since the file lacks a ceiling or the shape"


@dataclass(frozen=True)
class Column:
    name: str
    unit: str = ""  # of every cell; a column with a unit, or with `number`, is set to the right
    number: bool = False

    @property
    def right(self) -> bool:
        return bool(self.unit) or self.number

    @property
    def heading(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    columns: Sequence[Column]
    rows: list[list[str]]
    kinds: list[str] = field(default_factory=list)  # of the rows, where they differ: "ours", "computed", "missing"


def number(value: float | None) -> str:
    return NONE if value is None else tables.number(value)


def milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e3)


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share * 100:.1f}"


def ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def gigabytes(count: int | None) -> str:
    return NONE if count is None else f"{count / 1e9:.2f}"


def mfu_cells(shares: dict[str, float]) -> list[str]:
    return [percent(shares.get("nanogpt")), percent(shares.get("6n"))]


MFU = (Column("MFU", "%"), Column("MFU 6N", "%"))


def best(found: Sequence[tuple[str, Run, Workload]]) -> Table:
    """Our fastest step of every workload of every run (label, run, workload), beside the reference's and the floor."""
    columns = [Column("workload"), Column("device"), Column("our best step"), Column("median", "ms"), *MFU]
    columns += [Column("floor's MFU", "%"), Column("reference", "ms"), Column("speed-up", "×"), Column("file")]
    rows, kinds, over = [], [], []
    for label, run, workload in found:
        ours, baseline = workload.best, workload.baseline
        if ours is None:
            continue
        over += [baseline.step.variant] if baseline else []
        rows.append(
            [
                workload.name,
                label,
                ours.step.variant,
                milliseconds(ours.timing.median),
                *mfu_cells(ours.mfu),
                percent(workload.floor_mfu.get("nanogpt")),
                milliseconds(baseline.timing.median if baseline else None),
                ratio(ours.speedup),
                run.path.name + " (partial)" * (not run.results.complete),
            ]
        )
        kinds.append("")
    caption = "MFU counts (6N + 12LHQT) FLOPs a token, MFU 6N 6N, over the device's dense peak. "
    caption += f"The reference is the fastest of its modes ({', '.join(dict.fromkeys(over))}). " if over else ""
    caption += f"The floor is computed. From {'; '.join(dict.fromkeys(run.source for _, run, _ in found))}."
    return Table("Our best step on each device", caption, columns, rows, kinds)


def files(runs: Sequence[Run]) -> Table:
    """What each file is."""
    columns = [Column(name) for name in ("file", "device", "commit", "date")]
    columns += [Column("torch"), Column("Triton"), Column("CUDA"), Column("driver")]
    columns += [Column("peak", "TFLOP/s"), Column("matmul", "TFLOP/s"), Column("copy", "GB/s"), Column("state")]
    rows = []
    for run in runs:
        results, software = run.results, run.results.software
        peak, matmul, copy = results.peak, results.ceiling("matmul"), results.ceiling("copy")
        rows.append(
            [
                run.path.name,
                run.device,
                run.commit,
                run.day,
                software.torch,
                software.triton or NONE,
                software.cuda or NONE,
                results.device.driver or NONE,
                number(peak.flops / 1e12 if peak else None),
                number(matmul / 1e12 if matmul else None),
                number(copy / 1e9 if copy else None),
                "complete" if results.complete else "partial",
            ]
        )
    sources = dict.fromkeys(f"{run.device}: {run.results.peak.source}" for run in runs if run.results.peak)
    caption = "Peak is what MFU is a share of. Matmul and copy are the best that the device did in the same run."
    peaks = f" Peaks: {'; '.join(sources)}." if sources else ""
    kinds = ["" if run.results.complete else "missing" for run in runs]
    return Table("The files", caption + peaks, columns, rows, kinds)


def steps(run: Run, workload: Workload, label: str) -> Table:
    """One workload of one run, variant by variant."""
    columns = [Column("step"), Column("dtype"), Column("median", "ms"), Column("p10", "ms"), Column("p90", "ms")]
    columns += [Column("tokens", "1/s"), *MFU, Column("speed-up", "×"), Column("memory", "GB")]
    columns += [Column("host", "%"), Column("samples", number=True), Column("note")]
    rows, kinds = [], []
    for row in workload.rows:
        rows.append(_step_cells(row))
        kinds.append("missing" if not row.timing else "ours" if row is workload.best else "")
    if workload.floor:
        tokens = workload.rows[0].step.tokens / workload.floor
        gained = workload.baseline.timing.median / workload.floor if workload.baseline else None
        cells = ["floor", NONE, milliseconds(workload.floor), NONE, NONE, number(tokens)]
        cells += [*mfu_cells(workload.floor_mfu), ratio(gained), NONE, NONE, NONE, "computed, not measured"]
        rows.append(cells)
        kinds.append("computed")
    baseline = f"Speed-up is over {workload.baseline.step.variant}. " if workload.baseline else ""
    floor = _floor_words(run, workload)
    return Table(f"{workload.name} on {label}", f"{baseline}{floor} From {run.source}.", columns, rows, kinds)


def _step_cells(row: StepRow) -> list[str]:
    step, timing = row.step, row.timing
    note = f"not measured: {step.skipped or 'no reason given'}" if not timing else "" if step.compares else "rung"
    return [
        step.variant,
        step.dtype,
        milliseconds(timing and timing.median),
        milliseconds(timing and timing.p10),
        milliseconds(timing and timing.p90),
        number(row.tokens_per_second),
        *mfu_cells(row.mfu),
        ratio(row.speedup),
        gigabytes(step.peak_memory if timing else None),
        percent(row.host_share),
        str(len(step.seconds)),
        note,
    ]


def _floor_words(run: Run, workload: Workload) -> str:
    if not workload.floor:
        return f"It has {NO_FLOOR}."
    if run.results.device.type == "cuda":
        return "The floor is computed: each part of the step at the matmul and copy rates of this run."
    return "The floor is computed: the step's FLOPs at the matmul rate of this run; its bytes stay in the caches."


def kernels(run: Run, label: str) -> Table:
    """Every kernel's case that has samples."""
    columns = [Column("kernel"), Column("shape"), Column("dtype"), Column("direction"), Column("variant")]
    columns += [
        Column("median", "µs"),
        Column("p10", "µs"),
        Column("p90", "µs"),
        Column("rate", number=True),
        Column("share", "%"),
    ]
    columns += [Column("speed-up", "×")]
    rows = [_kernel_cells(row) for row in run.kernels]
    kinds = ["ours" if row.kernel.variant == "fused" else "" for row in run.kernels]
    caption = (
        "Share is of the ceiling that the operation meets first, copy or matmul, as measured in the same run. "
        f"Speed-up is over torch.compile of the reference. From {run.source}."
    )
    return Table(f"Kernels on {label}", caption, columns, rows, kinds)


def _kernel_cells(row: KernelRow) -> list[str]:
    kernel, timing = row.kernel, row.timing
    return [
        kernel.case,
        shape(kernel),
        kernel.dtype,
        kernel.direction,
        kernel.variant,
        number(timing.median * 1e6),
        number(timing.p10 * 1e6),
        number(timing.p90 * 1e6),
        tables.rate(row.bound) if row.bound else NONE,
        percent(row.bound and row.bound.share),
        ratio(row.speedup),
    ]


def shape(kernel: Kernel) -> str:
    return "×".join(map(str, kernel.shape))


def estimated(found: Sequence[Estimate]) -> Table:
    columns = [Column("workload"), Column("device"), Column("peak", "TFLOP/s"), Column("memory", "GB/s")]
    columns += [Column("floor", "ms"), Column("MFU at the floor", "%"), Column("attainable", "ms")]
    columns += [Column("tokens", "1/s"), *MFU, Column("what it is")]
    rows = [
        [
            one.workload,
            one.device,
            number(one.peak / 1e12),
            number(one.bandwidth / 1e9),
            milliseconds(one.floor),
            percent(one.floor_mfu["nanogpt"]),
            milliseconds(one.attainable),
            number(one.tokens / one.attainable),
            *mfu_cells(one.attainable_mfu),
            "estimate",
        ]
        for one in found
    ]
    caption = (
        "Estimates, not measurements: nobody has run these. The floor is each part of the step at its data sheet's "
        "FLOP/s or bytes/s, whichever takes longer. Attainable assumes what good kernels reach on an H100, on every "
        f"device: of the sheet's FLOP/s {100 * ATTAINED.matmul:.0f} % in matmuls, {100 * ATTAINED.attention:.0f} % in "
        f"attention; of its bytes/s {100 * ATTAINED.bandwidth:.0f} %. Whether the step fits the memory is not asked. "
        f"Data sheets: {'; '.join(dict.fromkeys(one.source for one in found))}."
    )
    return Table("Devices that nobody measured", caption, columns, rows, ["computed"] * len(rows))


def missing(run: Run) -> list[str]:
    """What a run lacks, a line each: parts that failed, tests that failed, rows that were skipped."""
    results = run.results
    lines = [] if results.complete else ["The run is partial: it was stopped, ran out of time, or a part failed."]
    lines += [f"{failure.part} failed: {failure.error}" for failure in results.failures]
    if results.tests and results.tests.failed:
        names = ", ".join(results.tests.failures)
        lines.append(f"{results.tests.failed} of its tests failed{': ' if names else ''}{names}.")
    if results.tests is None:
        lines.append("It ran no tests.")
    lines += [f"There is no {what}." for what in _absent(results)]
    lines += [
        f"{step.workload}, {step.variant}: not measured: {step.skipped or 'no reason given'}"
        for step in results.steps
        if not step.seconds
    ]
    skipped = Counter((k.variant, k.skipped or "no reason given") for k in results.kernels if not k.seconds)
    lines += [f"{count} kernel rows of {name} not measured: {reason}" for (name, reason), count in skipped.items()]
    return lines


def _absent(results: Results) -> list[str]:
    found = {
        "peak, so no MFU": results.peak,
        "matmul ceiling": results.ceiling("matmul"),
        "copy ceiling": results.ceiling("copy"),
        "kernel row": results.kernels,
        "training step": results.steps,
    }
    return [what for what, value in found.items() if not value]
