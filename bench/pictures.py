"""The report's pictures: bars, and dots on lines. A wide one has names beside its lines, a narrow one above them.

The first half draws. The second half chooses what each picture shows.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from bench.digest import Estimate, KernelRow, Run, StepRow, Steps, slug
from bench.tables import number, rate
from model.work import ATTAINED
from train.plot import LIGHT, new_figure, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 1000, 352  # points, which a page shows as pixels
BAR, ROW, TEXT = 14, 24, 17  # heights of a bar, of its row, of a line of text
MARKS = {"reference": ("o", "reference", True), "compiled": ("o", "ink", False), "fused": ("o", "ours", True)}
BEHIND = {"facecolor": LIGHT["paper"], "linewidth": 0, "pad": 1.0}  # keeps text readable on rules
OTHERS = [("sD^v"[i % 4], ("worse", "better", "floor")[i % 3], False) for i in range(12)]  # for other variants


@dataclass(frozen=True)
class Line:
    """A bar, or dots on a line."""

    label: str
    words: str  # its value as text, or why there is none
    value: float | None = None  # where the bar ends; None: no bar
    start: float = 0.0
    whisker: tuple[float, float] | None = None
    role: str = "reference"
    estimate: bool = False  # hatched: not measured
    dots: Mapping[str, float] = field(default_factory=dict)  # by variant

    @property
    def most(self) -> float:
        return max([self.value or 0.0, self.start, *(self.whisker or ()), *self.dots.values()])


@dataclass(frozen=True)
class Group:
    heading: str
    lines: Sequence[Line]
    floor: float | None = None  # a rule across the group
    floor_words: str = ""

    @property
    def most(self) -> float:
        return max([self.floor or 0.0, *(line.most for line in self.lines)]) or 1.0


@dataclass(frozen=True)
class Picture:
    name: str  # of its files, without the ending
    title: str
    caption: str
    groups: Sequence[Group]
    unit: str = ""  # of the axis that all groups share; empty: each group has its own scale
    least: float = 0.0  # the axis reaches at least this value
    joined: bool = False  # each bar begins where the last one ended; a thin rule joins them
    marks: Mapping[str, tuple[str, str, bool]] = field(default_factory=dict)  # by variant: marker, colour, filled

    def draw(self, width: int, *, alone: bool = False) -> "Figure":
        """width: points. alone: with its title above and its caption below, for a file of its own."""
        sheet, edge = _Sheet(self, width), 20 * alone
        if self.marks:
            sheet.key()
        top = sheet.y
        for group in self.groups:
            sheet.group(group)
        if self.unit:
            sheet.axis(top)
        title, caption = _wrapped(self.title, 0.85 * width, 16), _wrapped(self.caption, width)
        above, below = alone * (22 * len(title) + 16), alone * (16 * len(caption) + 18) + 4
        wide, high = width + 2 * edge, above + sheet.y + below + 2 * edge
        figure, axes = sheet.axes.figure, sheet.axes
        figure.set_size_inches(wide / 72, high / 72)
        axes.set_position(((edge + sheet.left) / wide, (edge + below) / high, sheet.length / wide, sheet.y / high))
        axes.set(xlim=(0, 1), ylim=(sheet.y, 0))
        if alone:
            figure.text(
                edge / wide, 1 - edge / high, "\n".join(title), size=16, weight="bold", va="top", **_text_style("ink")
            )
            figure.text(edge / wide, edge / high, "\n".join(caption), size=12, va="bottom", **_text_style("quiet"))
        return figure


@cache
def _width(words: str) -> float:
    """About how wide the text is in size 13, in points."""
    from matplotlib.textpath import TextPath

    return max((x for x, _ in TextPath((0, 0), printable(words).replace("$", "S"), size=13).vertices), default=0.0)


def _wrapped(words: str, width: float, size: float = 12) -> list[str]:
    words = printable(words)
    if _width(words) * size / 13 <= width:
        return [words]
    return textwrap.wrap(words, max(8, int(width / (0.6 * size))))


def _text_style(role: str) -> dict:
    return {"color": LIGHT[role], "parse_math": False, "linespacing": 1.35}


class _Sheet:
    """A picture that is being drawn. y is in points, from the top down. x is a share of the axis, 0 to 1."""

    def __init__(self, picture: Picture, width: int) -> None:
        lines = [line for group in picture.groups for line in group.lines]
        words = max((_width(line.words) for line in lines if line.dots or line.value is not None), default=0) + 14
        self.picture, self.width, self.y, self.narrow = picture, width, 0.0, width < 600
        self.left = (
            8 * bool(picture.marks) if self.narrow else min(0.36 * width, max(_width(x.label) for x in lines) + 14)
        )
        self.length = width - self.left - (8 if self.narrow and picture.marks else words)
        self.scale = max([picture.least, *(group.most for group in picture.groups)])
        self.axes = new_figure(width, width).add_axes((0, 0, 1, 1), facecolor="none")
        self.axes.spines[:].set_visible(False)
        self.axes.set(yticks=[], xticks=[])

    def key(self) -> None:
        """Draw the legend: each variant's dot and name."""
        x, self.y = 8.0, 4.0
        for variant in self.picture.marks:
            if x + _width(variant) + 30 > self.width:
                x, self.y = 8.0, self.y + TEXT
            self.text(variant, x + 10)
            self.dot(variant, (x - self.left) / self.length, self.y + 7)
            x += _width(variant) + 30
        self.y += TEXT

    def text(
        self, words: str, x: float, role: str = "ink", *, width: float = 1e6, size: float = 13, **more: str
    ) -> float:
        """Write on the current row, x points from the left edge. Returns the extra height of wrapped lines."""
        lines = _wrapped(words, width, size)
        for i, line in enumerate(lines):
            at = (x - self.left) / self.length, self.y + 11.5 + TEXT * i
            self.axes.text(*at, line, size=size, bbox=BEHIND, zorder=4, **_text_style(role), **more)
        return TEXT * (len(lines) - 1)

    def dot(self, variant: str, x: float, y: float) -> None:
        marker, role, filled = self.picture.marks[variant]
        face = LIGHT[role] if filled else "none"
        self.axes.plot(x, y, marker, color=LIGHT[role], markersize=8, markerfacecolor=face, clip_on=False, zorder=3)

    def rule(self, x: Sequence[float], y: Sequence[float], role: str, width: float = 1.0, order: float = 2) -> None:
        self.axes.plot(x, y, color=LIGHT[role], linewidth=width, clip_on=False, zorder=order)

    def axis(self, top: float) -> None:
        """Draw rules at round numbers from `top` down, with the numbers below them."""
        from matplotlib.ticker import MaxNLocator

        steps = MaxNLocator(4 if self.narrow else 9, steps=[1, 2, 2.5, 5, 10])
        for tick in steps.tick_values(0, self.scale):
            if tick <= self.scale:
                self.rule([tick / self.scale] * 2, (top, self.y), "grid", order=0)
                words = f"{tick:g} {self.picture.unit}"
                x, room = self.left + tick / self.scale * self.length, _width(words)
                self.text(words, min(max(0, x - room / 2), self.width - room), "quiet", size=12)
        self.y += TEXT

    def group(self, group: Group) -> None:
        scale = self.scale if self.picture.unit else group.most
        if group.heading:
            self.y += 12
            self.y += TEXT + self.text(group.heading, 0, width=self.width / 1.15, weight="bold")
        self.y += 6
        if group.floor is not None:
            x = self.left + group.floor / scale * self.length
            beyond = x - _width(group.floor_words) < self.left
            self.text(group.floor_words, x, "floor", size=12, ha="left" if beyond else "right")
            self.y += TEXT + 2
        top, self.end = self.y, None
        for line in group.lines:
            self.line(line, scale)
        if group.floor is not None:
            self.rule([group.floor / scale] * 2, (top, self.y - (ROW - BAR) / 2), "floor", 1.5, order=2.5)

    def line(self, line: Line, scale: float) -> None:
        size, role = (12, "quiet") if line.dots else (13, "ink")
        extra = self.text(line.label, 0, role, width=self.width if self.narrow else self.left - 6, size=size)
        if self.narrow:
            self.y, extra = self.y + TEXT + 2 + extra, 0
        if line.dots:
            if self.narrow:
                self.text(line.words, 0, size=12)
                self.y += TEXT
            else:
                self.text(line.words, self.left + self.length + 10, size=12)
            self.rule((0, 1), (self.y + BAR / 2,) * 2, "grid", order=1)
            for variant in self.picture.marks:  # ours comes last, on top
                if variant in line.dots:
                    self.dot(variant, line.dots[variant] / scale, self.y + BAR / 2)
        elif line.value is None:
            extra = max(extra, self.text(line.words, self.left, "quiet", width=self.width - self.left, size=12))
        else:
            self.bar(line, scale)
        self.y += ROW - 4 * bool(line.dots) + extra

    def bar(self, line: Line, scale: float) -> None:
        start, end = sorted((line.start / scale, line.value / scale))
        paint = {"color": LIGHT[line.role], "linewidth": 0}
        if line.estimate:
            paint = {"facecolor": "none", "edgecolor": LIGHT[line.role], "linestyle": (0, (4, 2)), "hatch": "///"}
        self.axes.barh(self.y, max(end - start, 0.001), BAR, start, align="edge", clip_on=False, zorder=1, **paint)
        if self.picture.joined and self.end:
            self.rule([self.end[0]] * 2, (self.end[1], self.y), "quiet", 0.8)
        if line.whisker:
            low, high = (value / scale for value in line.whisker)
            self.rule((low, low, low, high, high, high), self.y + 7 + 3 * np.array([-1, 1, 0, 0, -1, 1]), "ink")
            end = max(end, high)
        self.text(line.words, self.left + end * self.length + 6)
        self.end = line.value / scale, self.y + BAR


# What the pictures show


def mfu(name: str, found: Sequence[Steps], guesses: Sequence[Estimate]) -> Picture:
    """MFU of all compared steps, on every device that ran the workload; then the estimates."""
    groups = []
    for steps in found:
        floor = 100 * steps.rows[0].mfu(seconds=steps.floor) if steps.floor else None
        bars = [_bar(row, 100, row.mfu(), "{:.1f} %".format) for row in steps.compared]
        groups.append(Group(steps.run.label, bars, floor, f"floor {floor or 0:.1f} %, computed"))
    caption = "nanoGPT's MFU: (6N + 12LHQT) FLOPs a token over the device's dense peak. "
    if any(group.floor and group.floor > 100 for group in groups):
        caption += "It counts attention whole, but a step computes half of it. So the floor can pass 100 %. "
    caption += f"From {sources(found)}. " if found else "No results file measured this workload. "
    if shares := {one.device: 100 * one.mfu(ATTAINED) for one in guesses if one.workload.name == name}:
        bars = [Line(device, f"{share:.1f} %, estimate", share, estimate=True) for device, share in shares.items()]
        groups.append(Group("Not measured: attainable by the roofline, an estimate", bars))
        caption += "Hatched bars are roofline estimates; nobody measured them."
    return Picture(slug(f"mfu-{name}"), f"MFU, {name}", caption.strip(), groups, unit="%")


def time(found: Sequence[Steps]) -> Picture:
    """ms/iter of every variant, rungs too. Each device has its own scale."""
    groups = []
    for steps in found:
        bars = [_bar(row, 1e3, row.seconds, _milliseconds, whiskers=True) for row in steps.rows]
        floor = steps.floor and 1e3 * steps.floor
        groups.append(Group(steps.run.label, bars, floor, f"floor {_milliseconds(floor or 0)}, computed"))
    caption = "Medians; whiskers from the 10th to the 90th percentile; each device has a scale of its own. "
    name = found[0].name
    return Picture(slug(f"time-{name}"), f"Time an iteration, {name}", f"{caption}From {sources(found)}.", groups)


def memory(found: Sequence[Steps]) -> Picture | None:
    """Peak memory of the compared steps. None if no device reports it."""
    reporting = [steps for steps in found if any(row.step.peak_memory and row.seconds for row in steps.compared)]
    groups = []
    for steps in reporting:
        rows = [row for row in steps.compared if row.step.peak_memory is not None or not row.seconds]
        bars = [_bar(row, 1e-9, row.step.peak_memory, "{:.2f} GB".format) for row in rows]
        groups.append(Group(steps.run.label, bars))
    caption, name = (
        f"Of the device, during the step, beyond what was held before it. From {sources(reporting)}.",
        found[0].name,
    )
    return Picture(slug(f"memory-{name}"), f"Peak memory, {name}", caption, groups) if reporting else None


def waterfall(steps: Steps) -> Picture | None:
    """From the reference's step to ours, rung by rung. None with fewer than two measured steps."""
    ladder, bars, last = steps.ladder, [], None
    if sum(row.seconds is not None for row in ladder) < 2:
        return None
    for i, row in enumerate(ladder):
        if row.seconds is None:
            bars.append(Line(row.step.variant, row.missing))
            continue
        now = 1e3 * row.seconds
        if last is not None:
            sign, role = ("−", "better") if now <= last else ("+", "worse")
            change = f"{sign}{_milliseconds(abs(now - last))}"
            bars.append(Line(f"+ {row.step.variant}", change, now, start=last, role=role))
        if last is None or i == len(ladder) - 1:
            total = row.step.variant if last is None else f"{row.step.variant}, in all"
            bars.append(Line(total, _milliseconds(now), now, role="ours" if row.ours else "reference"))
        last = now
    title = f"From the reference's step to ours, {steps.name} on {steps.run.label}"
    caption = "Each bar is what one change, on top of those above it, takes off or adds to the median. "
    name = slug(f"waterfall-{steps.name}-{steps.run.suffix}")
    return Picture(name, title, f"{caption}From {steps.run.source}.", [Group("", bars)], joined=True)


def kernels(run: Run) -> Picture | None:
    """Share of the ceiling: a line for each shape and direction, a dot for each variant. None if there is no share."""
    rows = [row for row in run.kernels if row.share]
    cases: dict[str, dict[str, list[KernelRow]]] = {}
    for row in rows:
        line = f"{row.shape} {row.kernel.direction}, {row.kernel.dtype}"
        cases.setdefault(row.kernel.case, {}).setdefault(line, []).append(row)
    groups = [Group(case, [_dotted(name, line) for name, line in lines.items()]) for case, lines in cases.items()]
    variants = dict.fromkeys(row.kernel.variant for row in rows)
    others = dict(zip((v for v in variants if v not in MARKS), cycle(OTHERS), strict=False))
    known = {"reference": 0, "compiled": 1, "fused": 3}
    marks = {v: {**MARKS, **others}[v] for v in sorted(variants, key=lambda v: known.get(v, 2))}
    caption = "Of the copy bandwidth, or of the matmul rate where that comes first, measured in the same run. "
    caption += f"The figure at the end of a line is fused's; without one, the fastest's. From {run.source}."
    title, name = f"Kernels, share of the measured ceiling, {run.label}", f"kernels-{run.suffix}"
    return Picture(name, title, caption, groups, unit="%", least=100.0, marks=marks) if rows else None


def _dotted(name: str, line: list[KernelRow]) -> Line:
    fused = [row for row in line if row.kernel.variant == "fused"]
    head = fused[0] if fused else min(line, key=lambda row: row.seconds)
    words = f"{100 * head.share:.1f} %, {rate(head)}"
    values = {row.kernel.variant: 100 * row.share for row in line}
    return Line(name, words if fused else f"{head.kernel.variant} {words}", dots=values)


def _bar(row: StepRow, unit: float, value: float | None, words: Callable[[float], str], whiskers=False) -> Line:
    """A step's bar of length `value` times `unit`. `words` formats the length."""
    if row.seconds is None:
        return Line(row.step.variant, row.missing)
    role = "reference" if not row.ours else "ours" if row.step.compares else "rung"
    ends = (unit * row.quantile(0.1), unit * row.quantile(0.9)) if whiskers else None
    return Line(row.step.variant, words(unit * value), unit * value, whisker=ends, role=role)


def _milliseconds(value: float) -> str:
    return f"{number(value)} ms"


def sources(found: Sequence[Steps]) -> str:
    return "; ".join(dict.fromkeys(steps.run.source for steps in found))
