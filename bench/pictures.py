"""The report's pictures: bars, and dots on lines. A wide one has names beside its lines, a narrow one above them.

`Picture.draw` draws. The functions below it choose what each picture shows.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.digest import KernelRow, Run, Steps, slug
from bench.results import Step
from bench.tables import digits, rate, sources
from train.plot import LIGHT, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 1000, 352  # points, which a page shows as pixels
ROW, BAR = 25, 14  # points: from one bar to the next, and its height
OTHERS = ("worse", "better", "floor")  # colours of other people's kernels


@dataclass(frozen=True)
class Line:
    """A bar, or dots on a line, or only words."""

    label: str
    words: str  # its value as text, or why there is none
    value: float | None = None  # where the bar ends; None: no bar
    start: float = 0.0
    role: str = "reference"
    estimate: bool = False  # hatched: not measured
    dots: Mapping[str, float] = field(default_factory=dict)  # by variant


@dataclass(frozen=True)
class Group:
    heading: str
    lines: Sequence[Line]
    floor: float | None = None  # a rule across the group


@dataclass(frozen=True)
class Picture:
    name: str  # of its files, without the ending
    title: str
    caption: str
    groups: Sequence[Group]
    unit: str  # of the axis
    joined: bool = False  # each bar begins where the last one ended; a thin rule joins them
    marks: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # by variant: how its dots are plotted

    @property
    def most(self) -> float:
        """Where the axis ends."""
        lines = [line for group in self.groups for line in group.lines]
        ends = [end for line in lines for end in (line.value or 0.0, *line.dots.values())]
        return max([*ends, *(group.floor or 0.0 for group in self.groups), 100.0 * bool(self.marks)]) or 1.0

    def draw(self, width: int, *, alone: bool = False) -> "Figure":
        """width: points. alone: with its title above and its caption below, for a file of its own."""
        figure, narrow = new_figure(width, width), width < 600
        figure.set_layout_engine("constrained", h_pad=0.2 if alone else 0.08, w_pad=0.2 if alone else 0.02)
        axes = figure.add_subplot(facecolor="none")
        labels: dict[float, str] = {}  # by row
        y = 0.0  # rows from the top
        for group in self.groups:
            y = self._group(axes, group, y, None if narrow else labels, 0.02 * alone)
        axes.set(xlim=(0, self.most), ylim=(y - 0.4, -0.6))
        axes.set_yticks(list(labels), labels.values(), parse_math=False)
        axes.tick_params(length=0, labelsize=13, labelcolor=LIGHT["ink"])
        axes.tick_params("x", labelsize=12, labelcolor=LIGHT["quiet"])
        axes.locator_params("x", nbins=4 if narrow else 9, steps=[1, 2, 2.5, 5, 10])
        axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g} {self.unit}")
        axes.grid(axis="x", color=LIGHT["grid"])
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        height = ROW * y + 28
        if self.marks:
            handles = [axes.plot([], [], label=variant, **mark)[0] for variant, mark in self.marks.items()]
            key = {"labelcolor": LIGHT["ink"], "frameon": False, "fontsize": 13, "handletextpad": 0.1}
            columns = 2 if narrow else 6
            axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **key)
            height += 22 * -(-len(handles) // columns)
        if alone:
            title, caption = textwrap.wrap(self.title, 90), textwrap.wrap(self.caption, 140)
            at = {"x": 0.02, "ha": "left", "parse_math": False}
            figure.suptitle("\n".join(title), size=16, weight="bold", color=LIGHT["ink"], **at)
            figure.supxlabel("\n".join(caption), size=12, color=LIGHT["quiet"], **at)
            height += 22 * len(title) + 17 * len(caption) + 24
        figure.set_size_inches(width / 72, height / 72)
        return figure

    def _group(self, axes: "Axes", group: Group, y: float, labels: dict[float, str] | None, left: float) -> float:
        """Draw a group from row y on; returns the row below it. labels: gets the names of lines by row; None: they and
        long words are drawn above the lines. left: where the heading begins, as a share of the figure."""
        narrow, last = labels is None, None
        if group.heading:
            heading = textwrap.fill(group.heading, 38 if narrow else 100)
            y += 0.7 * heading.count("\n") + 0.6 * (y > 0)
            sheet = "axes fraction" if narrow else "figure fraction"
            _write(axes, left, y + 0.3, heading, "ink", sheet, weight="bold", va="bottom")
            y += 1
        if group.floor is not None:
            side = "right" if group.floor > 0.3 * self.most else "left"
            _write(axes, group.floor, y, f"floor {group.floor:.1f} {self.unit}, computed", "floor", ha=side)
            y += 1
        top = y - 0.6
        for line in group.lines:
            beside = line.words
            if narrow:
                beside = "" if len(line.words) > 12 else line.words
                for words, role in [(line.label, "ink"), (line.words, "quiet")][: 1 if beside else 2]:
                    _write(axes, 0, y, textwrap.shorten(words, 44), role, "axes fraction")
                    y += 0.75
            else:
                labels[y] = line.label
            self._line(axes, line, beside, y)
            if self.joined and last and line.value is not None:
                _rule(axes, (last[0],) * 2, (last[1] + BAR / ROW / 2, y - BAR / ROW / 2), "quiet", 0.8)
            last = (line.value, y) if line.value is not None else last
            y += 1 - 0.3 * (narrow and line.value is None and not line.dots)
        if group.floor is not None:
            _rule(axes, (group.floor,) * 2, (top, y - 0.5), "floor", 1.5)
        return y

    def _line(self, axes: "Axes", line: Line, words: str, y: float) -> None:
        """Draw a bar or dots at row y, and the words beside them."""
        if line.dots:
            _rule(axes, (0, self.most), (y, y), "grid", 1.0)
            for variant in (variant for variant in self.marks if variant in line.dots):
                axes.plot(line.dots[variant], y, clip_on=False, zorder=3, **self.marks[variant])
            _write(axes, 1.01, y, words, "ink", "axes fraction")
        elif line.value is None:
            _write(axes, 0, y, textwrap.shorten(words, 90), "quiet", gap=6)
        else:
            start, length = min(line.start, line.value), abs(line.value - line.start)
            paint = {"color": LIGHT[line.role], "linewidth": 0}
            if line.estimate:
                paint = {"facecolor": "none", "edgecolor": LIGHT[line.role], "linestyle": (0, (4, 2)), "hatch": "///"}
            axes.barh(y, max(length, 0.001 * self.most), BAR / ROW, start, clip_on=False, **paint)
            _write(axes, start + length, y, words, "ink", gap=6)


def _mark(marker: str, role: str, *, filled: bool = False) -> dict[str, Any]:
    face = LIGHT[role] if filled else "none"
    return {"marker": marker, "color": LIGHT[role], "markersize": 8, "markerfacecolor": face, "linestyle": ""}


def _rule(axes: "Axes", x: tuple[float, float], y: tuple[float, float], role: str, width: float) -> None:
    axes.plot(x, y, color=LIGHT[role], linewidth=width, clip_on=False, zorder=1.5)


def _write(
    axes: "Axes", x: float, y: float, words: str, role: str, x_is: str = "data", gap: float = 0, **style: str
) -> None:
    """Write words at row y. x_is: matplotlib's name of x's unit. gap: points between x and the words."""
    behind = {"facecolor": LIGHT["paper"], "linewidth": 0, "pad": 0.5}  # keeps words readable on rules
    style = {"size": 13, "va": "center_baseline", "color": LIGHT[role], "parse_math": False, "bbox": behind} | style
    text = axes.annotate(words, (x, y), (gap, 0), (x_is, "data"), "offset points", **style)
    text.set_in_layout(x_is == "data" or x > 1)  # the other words lie within the picture


# What the pictures show


def mfu(name: str, found: Sequence[Steps]) -> Picture:
    """MFU, time and memory of all compared steps, on every device that ran the workload; then the estimates."""
    measured, guesses = ([steps for steps in found if steps.estimated is kind] for kind in (False, True))
    groups = []
    for steps in measured:
        floor = 100 * steps.mfu(steps.rows[0], seconds=steps.floor) if steps.floor else None
        groups.append(Group(steps.label, [_bar(steps, row) for row in steps.compared], floor))
    caption = "nanoGPT's MFU: (6N + 12LHQT) FLOPs a token over the device's dense peak. Beside it are the median time "
    caption += "of an iteration and, on a GPU, the step's peak memory. "
    if any(group.floor and group.floor > 100 for group in groups):
        caption += "MFU counts attention whole, but a step computes half of it. So the floor can pass 100 %. "
    caption += f"From {sources(measured)}. " if measured else "No results file measured this workload. "
    if guesses:
        bars = [_bar(steps, steps.rows[0]) for steps in guesses]
        groups.append(Group("Not measured: attainable by the roofline, an estimate", bars))
        caption += "Hatched bars are roofline estimates; nobody measured them."
    return Picture(slug(f"mfu-{name}"), f"MFU, {name}", caption.strip(), groups, unit="%")


def _bar(steps: Steps, row: Step) -> Line:
    if not row.seconds:
        return Line(row.variant, row.missing)
    share = 100 * steps.mfu(row)
    words = f"{share:.1f} %, {digits(row.median, 1e3)} ms"
    if steps.estimated:
        return Line(steps.label, f"{words}, estimate", share, estimate=True)
    words += f", {row.peak_memory / 1e9:.2f} GB" if row.peak_memory else ""
    return Line(row.variant, words, share, role="ours" if row.ours else "reference")


def waterfall(steps: Steps) -> Picture | None:
    """From the reference's step to ours, rung by rung. None with fewer than two measured steps."""
    bars, last = [], None
    measured = [row for row in steps.ladder if row.seconds]
    if len(measured) < 2:
        return None
    for row in steps.ladder:
        if not row.seconds:
            bars.append(Line(row.variant, row.missing))
            continue
        now = 1e3 * row.median
        if last is not None:
            sign, role = ("−", "better") if now <= last else ("+", "worse")
            bars.append(Line(f"+ {row.variant}", f"{sign}{digits(abs(now - last))} ms", now, start=last, role=role))
        if row in (measured[0], measured[-1]):
            total = row.variant if last is None else f"{row.variant}, in all"
            bars.append(Line(total, f"{digits(now)} ms", now, role="ours" if row.ours else "reference"))
        last = now
    title = f"From the reference's step to ours, {steps.name} on {steps.label}"
    caption = "Each bar is what one change, on top of those above it, takes off or adds to the median. "
    name = slug(f"waterfall-{steps.name}-{steps.suffix}")
    return Picture(name, title, f"{caption}From {steps.source}.", [Group("", bars)], unit="ms", joined=True)


def kernels(run: Run) -> Picture | None:
    """Share of the ceiling: a line for each shape and direction, a dot for each variant. None if there is no share."""
    rows = [row for row in run.kernels if row.share]
    cases: dict[str, dict[str, list[KernelRow]]] = {}
    for row in rows:
        line = f"{row.kernel.sizes} {row.kernel.direction}, {row.kernel.dtype}"
        cases.setdefault(row.kernel.case, {}).setdefault(line, []).append(row)
    groups = [Group(case, [_dotted(name, line) for name, line in lines.items()]) for case, lines in cases.items()]
    variants = list(dict.fromkeys(row.kernel.variant for row in rows))
    others = [v for v in variants if v not in ("reference", "compiled", "fused")]
    marks = {"reference": _mark("o", "reference", filled=True), "compiled": _mark("o", "ink")}
    marks |= {v: _mark("sD^v"[i % 4], OTHERS[i % 3]) for i, v in enumerate(others)}
    marks["fused"] = _mark("o", "ours", filled=True)  # the last one lies on top
    marks = {v: mark for v, mark in marks.items() if v in variants}
    caption = "Of the copy bandwidth, or of the matmul rate where that comes first, measured in the same run. "
    caption += f"The figure at the end of a line is fused's; without one, the fastest's. From {run.source}."
    title, name = f"Kernels, share of the measured ceiling, {run.label}", f"kernels-{run.suffix}"
    return Picture(name, title, caption, groups, unit="%", marks=marks) if rows else None


def _dotted(name: str, line: list[KernelRow]) -> Line:
    fused = [row for row in line if row.kernel.variant == "fused"]
    head = fused[0] if fused else min(line, key=lambda row: row.kernel.median)
    words = f"{100 * head.share:.1f} %, {rate(head)}"
    values = {row.kernel.variant: 100 * row.share for row in line}
    return Line(name, words if fused else f"{head.kernel.variant} {words}", dots=values)
