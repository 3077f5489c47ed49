"""The report's pictures: which bars and dots there are, what they say, and where their numbers come from."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

from bench.report.digest import KernelRow, Run, StepRow, Workload, is_ours
from bench.report.estimates import Estimate
from bench.report.layout import Bar, DotLine, Group, Look, Picture, bars, dots
from bench.report.tables import milliseconds, percent, shape
from bench.tables import rate


@dataclass(frozen=True)
class Figure:
    name: str  # of its files
    title: str
    caption: str
    draw: Picture


def slug(text: str) -> str:
    """The text as a file's name: a results file may call things what it likes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


# How the dots of others' kernels look, whoever is there; no two alike as long as these last.
OTHERS = [(role, filled) for filled in (False, True) for role in ("worse", "better", "floor", "rung")]


def _looks(variants: Iterable[str]) -> dict[str, Look]:
    """In the order in which dots are laid over each other: what is ours lies on top."""
    others = dict.fromkeys(v for v in variants if v not in ("reference", "compiled", "fused"))
    looks = dict(zip(others, cycle(OTHERS), strict=False))
    return {"reference": ("reference", True), "compiled": ("ink", False), **looks, "fused": ("ours", True)}


def mfu(name: str, found: list[tuple[str, Run, Workload]], guesses: Sequence[Estimate]) -> Figure:
    """MFU of every step that is more than a rung, on every device that ran the workload; then the estimates."""
    groups = [
        Group(
            label,
            [
                _step_bar(row, row.mfu.get("nanogpt"), "MFU", lambda share: f"{percent(share)} %")
                for row in workload.compared
            ],
            100 * workload.floor_mfu["nanogpt"] if "nanogpt" in workload.floor_mfu else None,
            f"floor {percent(workload.floor_mfu.get('nanogpt'))} %, computed",
        )
        for label, _, workload in found
    ]
    if guesses:
        hatched = [
            Bar(one.device, f"{percent(share)} %, estimate", 100 * share, role="reference", estimate=True)
            for one in guesses
            for share in [one.attainable_mfu["nanogpt"]]
        ]
        groups.append(Group("Not measured: attainable by the roofline, an estimate", hatched))
    sources = _sources([run for _, run, _ in found])
    caption = "nanoGPT's MFU: (6N + 12LHQT) FLOPs a token over the device's dense peak. "
    if any(group.marker and group.marker > 100 for group in groups):
        caption += "It counts attention whole, a step computes half of it: so the floor can pass 100 %. "
    caption += f"From {sources}. " if found else "No results file measured this workload. "
    caption += "Hatched bars are roofline estimates; nobody measured them." if guesses else ""
    title = f"MFU, {name}"
    return Figure(slug(f"mfu-{name}"), title, caption.strip(), bars(title, groups, axis=" %"))


def time(name: str, found: list[tuple[str, Run, Workload]]) -> Figure:
    """ms/iter of every variant, rungs too, each device on its own scale."""
    groups = [
        Group(label, [_time_bar(row) for row in workload.rows], 1e3 * workload.floor if workload.floor else None,
              f"floor {milliseconds(workload.floor)} ms, computed")
        for label, _, workload in found
    ]  # fmt: skip
    title = f"Time an iteration, {name}"
    caption = "Medians; whiskers from the 10th to the 90th percentile; each device has a scale of its own. "
    caption += f"From {_sources([run for _, run, _ in found])}."
    return Figure(slug(f"time-{name}"), title, caption, bars(title, groups))


def memory(name: str, found: list[tuple[str, Run, Workload]]) -> Figure | None:
    """Peak memory of the steps that compare; None where no device told it."""
    groups, told = [], []
    for label, run, workload in found:
        rows = [row for row in workload.compared if row.step.peak_memory is not None or not row.timing]
        if any(row.timing for row in rows):
            told.append(run)
            groups.append(Group(label, [_memory_bar(row) for row in rows]))
    title = f"Peak memory, {name}"
    caption = f"Of the device, during the step, beyond what was held before it. From {_sources(told)}."
    return Figure(slug(f"memory-{name}"), title, caption, bars(title, groups)) if groups else None


def waterfall(label: str, run: Run, workload: Workload, suffix: str) -> Figure | None:
    """From the reference's step to ours, rung by rung; None where there are not two steps to stand between."""
    ladder, drawn, last = workload.ladder, [], None
    if sum(row.timing is not None for row in ladder) < 2:
        return None
    for i, row in enumerate(ladder):
        if not row.timing:
            drawn.append(_step_bar(row, None, "", str))
            continue
        now = 1e3 * row.timing.median
        if last is None or i == len(ladder) - 1:
            if last is not None:
                drawn.append(_delta(f"+ {row.step.variant}", last, now))
            role = "ours" if is_ours(row.step) else "reference"
            total = row.step.variant if last is None else f"{row.step.variant}, in all"
            drawn.append(Bar(total, f"{milliseconds(row.timing.median)} ms", now, role=role))
        else:
            drawn.append(_delta(f"+ {row.step.variant}", last, now))
        last = now
    title = f"From the reference's step to ours, {workload.name} on {label}"
    caption = "Each bar is what one change, on top of those above it, takes off or adds to the median. "
    caption += f"From {run.source}."
    return Figure(
        slug(f"waterfall-{workload.name}-{suffix}"),
        title,
        caption,
        bars(title, [Group("", drawn)], joined=True),
    )


def _delta(label: str, before: float, after: float) -> Bar:
    sign, role = ("−", "better") if after <= before else ("+", "worse")
    return Bar(label, f"{sign}{milliseconds(abs(after - before) / 1e3)} ms", after, before, role=role)


def kernels(label: str, run: Run, suffix: str) -> Figure | None:
    """Share of the ceiling, a line for each case and a dot for each variant; None where there is no share."""
    rows = [row for row in run.kernels if row.bound and row.bound.share]
    title = f"Kernels, share of the measured ceiling, {label}"
    caption = "Of the copy bandwidth, or of the matmul rate where that comes first, measured in the same run. "
    caption += "The figure at the end of a line is fused's; without one, the fastest's. "
    caption += f"From {run.source}."
    cases: dict[str, dict[str, list[KernelRow]]] = {}
    for row in rows:
        line = f"{shape(row.kernel)} {row.kernel.direction}, {row.kernel.dtype}"
        cases.setdefault(row.kernel.case, {}).setdefault(line, []).append(row)
    drawn = {case: [_dot_line(name, line) for name, line in lines.items()] for case, lines in cases.items()}
    return (
        Figure(
            slug(f"kernels-{suffix}"), title, caption, dots(title, drawn, _looks(row.kernel.variant for row in rows))
        )
        if rows
        else None
    )


def _dot_line(name: str, line: list[KernelRow]) -> DotLine:
    fused = [row for row in line if row.kernel.variant == "fused"]
    head = fused[0] if fused else min(line, key=lambda row: row.timing.median)
    words = f"{percent(head.bound.share)} %, {rate(head.bound)}"
    shares = {row.kernel.variant: row.bound.share for row in line}
    return DotLine(name, words if fused else f"{head.kernel.variant} {words}", shares)


def _role(row: StepRow) -> str:
    return "reference" if not is_ours(row.step) else "ours" if row.step.compares else "rung"


def _step_bar(row: StepRow, share: float | None, what: str, words: Callable[[float], str]) -> Bar:
    if not row.timing:
        return Bar(row.step.variant, f"not measured: {row.step.skipped or 'no reason given'}")
    if share is None:
        return Bar(row.step.variant, f"no {what}: the file names no peak")
    return Bar(row.step.variant, words(share), 100 * share, role=_role(row))


def _time_bar(row: StepRow) -> Bar:
    timing = row.timing
    if not timing:
        return _step_bar(row, None, "", str)
    low, high = 1e3 * timing.p10, 1e3 * timing.p90
    return Bar(row.step.variant, f"{milliseconds(timing.median)} ms", 1e3 * timing.median, 0, low, high, _role(row))


def _memory_bar(row: StepRow) -> Bar:
    if not row.timing:
        return _step_bar(row, None, "", str)
    size = row.step.peak_memory / 1e9
    return Bar(row.step.variant, f"{size:.2f} GB", size, role=_role(row))


def _sources(runs: Sequence[Run]) -> str:
    return "; ".join(dict.fromkeys(run.source for run in runs))
