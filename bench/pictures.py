"""The report's pictures: bars of percentages. A wide one has names beside its bars, a narrow one above them.

`Picture.draw` draws. The functions below it choose what each picture shows.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.digest import KernelRow, Run, Steps
from bench.results import Step
from bench.tables import digits, rate, sources
from train.plot import LIGHT, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 1000, 352  # points, which a page shows as pixels
ROW, BAR = 25, 14  # points: from one bar to the next, and its height


@dataclass(frozen=True)
class Line:
    """A bar, or only words."""

    label: str
    words: str  # its value as text, or why there is none
    value: float | None = None  # where the bar ends; None: no bar
    role: str = "reference"


@dataclass(frozen=True)
class Group:
    heading: str
    lines: Sequence[Line]
    floor: float | None = None  # a rule across the group


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    groups: Sequence[Group]

    @property
    def name(self) -> str:
        """Of its files, without the ending. Names in a results file can have any characters."""
        return re.sub(r"[^a-z0-9._-]+", "-", self.title.lower())

    @property
    def most(self) -> float:
        """Where the axis ends."""
        ends = [line.value or 0.0 for group in self.groups for line in group.lines]
        return max([*ends, *(group.floor or 0.0 for group in self.groups)]) or 1.0

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
        axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g} %")
        axes.grid(axis="x", color=LIGHT["grid"])
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        height = ROW * y + 28
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
        narrow = labels is None
        heading = textwrap.fill(group.heading, 38 if narrow else 100)
        y += 0.7 * heading.count("\n") + 0.6 * (y > 0)
        sheet = "axes fraction" if narrow else "figure fraction"
        _write(axes, left, y + 0.3, heading, "ink", sheet, weight="bold", va="bottom")
        y += 1
        if group.floor is not None:
            side = "right" if group.floor > 0.3 * self.most else "left"
            _write(axes, group.floor, y, f"floor {group.floor:.1f} %, computed", "floor", ha=side)
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
            y += 1 - 0.3 * (narrow and line.value is None)
        if group.floor is not None:
            x = group.floor, group.floor
            axes.plot(x, (top, y - 0.5), color=LIGHT["floor"], linewidth=1.5, clip_on=False, zorder=1.5)
        return y

    def _line(self, axes: "Axes", line: Line, words: str, y: float) -> None:
        """Draw a bar at row y, and the words beside it."""
        if line.value is None:
            _write(axes, 0, y, textwrap.shorten(words, 90), "quiet", gap=6)
            return
        length = max(line.value, 0.001 * self.most)
        axes.barh(y, length, BAR / ROW, clip_on=False, color=LIGHT[line.role], linewidth=0)
        _write(axes, line.value, y, words, "ink", gap=6)


def _write(
    axes: "Axes", x: float, y: float, words: str, role: str, x_is: str = "data", gap: float = 0, **style: str
) -> None:
    """Write words at row y. x_is: matplotlib's name of x's unit. gap: points between x and the words."""
    behind = {"facecolor": LIGHT["paper"], "linewidth": 0, "pad": 0.5}  # keeps words readable on rules
    style = {"size": 13, "va": "center_baseline", "color": LIGHT[role], "parse_math": False, "bbox": behind} | style
    text = axes.annotate(words, (x, y), (gap, 0), (x_is, "data"), "offset points", **style)
    text.set_in_layout(x_is == "data")  # the other words lie within the picture


# What the pictures show


def mfu(found: Sequence[Steps]) -> Picture:
    """MFU, time and memory of all steps of one workload, on every device that ran it."""
    groups = []
    for steps in found:
        floor = 100 * steps.mfu(steps.rows[0], steps.floor) if steps.floor else None
        groups.append(Group(steps.run.label, [_step(steps, row) for row in steps.rows], floor))
    caption = "nanoGPT's MFU: (6N + 12LHQT) FLOPs a token over the device's dense peak. Beside it are the median time "
    caption += "of an iteration and, on a GPU, the step's peak memory. "
    if any(group.floor and group.floor > 100 for group in groups):
        caption += "MFU counts attention whole, but a step computes half of it. So the floor can pass 100 %. "
    return Picture(f"MFU, {found[0].name}", f"{caption}From {sources(found)}.", groups)


def _step(steps: Steps, row: Step) -> Line:
    if not row.seconds:
        return Line(row.variant, row.missing)
    share = 100 * steps.mfu(row)
    words = f"{share:.1f} %, {digits(row.median, 1e3)} ms"
    words += f", {row.peak_memory / 1e9:.2f} GB" if row.peak_memory else ""
    return Line(row.variant, words, share, "ours" if row.ours else "reference")


def kernels(run: Run) -> Picture | None:
    """Share of the ceiling: a bar for each shape and direction. None if there is no share."""
    cases: dict[str, dict[str, list[KernelRow]]] = {}
    for row in (row for row in run.kernels if row.share):
        line = f"{row.kernel.sizes} {row.kernel.direction}, {row.kernel.dtype}"
        cases.setdefault(row.kernel.case, {}).setdefault(line, []).append(row)
    groups = [Group(case, [_kernel(name, rows) for name, rows in lines.items()]) for case, lines in cases.items()]
    caption = "Share of the copy bandwidth, or of the matmul rate where that comes first, measured in the same run. "
    caption += f"A bar is fused's; without it, the fastest's. From {run.source}."
    return Picture(f"Kernels, {run.label}", caption, groups) if groups else None


def _kernel(name: str, rows: list[KernelRow]) -> Line:
    best = min(rows, key=lambda row: (row.kernel.variant != "fused", row.kernel.median))
    words = f"{best.kernel.variant} {100 * best.share:.1f} %, {rate(best)}"
    return Line(name, words, 100 * best.share, "ours" if best.kernel.ours else "reference")
