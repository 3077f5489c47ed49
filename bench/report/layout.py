"""Two kinds of pictures for any width, bars and dots on lines. Wide ones put names beside, narrow ones above."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.report.scene import BOLD, SIZE, Dot, Line, Mark, Rect, Scene, Text, text_width, wrap
from train.plot import ticks

WIDE, NARROW = 1000, 352
BAR, ROW, LINE = 14, 24, 17  # heights of a bar, of its row, of a line of text
SMALL = 12  # text that comments
LEFT, RIGHT = 0, 2  # margins

Picture = Callable[[int], Scene]  # width -> scene
Look = tuple[str, bool]  # of a dot: its role, and whether it is filled


@dataclass(frozen=True)
class Bar:
    label: str
    words: str  # after the bar: its value, or why there is none
    end: float | None = None  # None: no bar
    start: float = 0.0
    low: float | None = None  # of a whisker
    high: float | None = None
    role: str = "reference"
    estimate: bool = False


@dataclass(frozen=True)
class Group:
    heading: str
    bars: list[Bar]
    marker: float | None = None  # a line across the group's bars
    marker_words: str = ""


def bars(title: str, groups: list[Group], *, axis: str = "", joined: bool = False) -> Picture:
    """Horizontal bars. With an `axis` (its unit) all groups share a scale, else each has its own.

    joined: each bar begins where the one before it ended, and a thin line says so.
    """
    return lambda width: _Bars(width, axis, joined).scene(title, groups)


class _Bars:
    """The layout of one picture of bars, from top to bottom."""

    def __init__(self, width: int, axis: str, joined: bool) -> None:
        self.width, self.axis, self.joined = width, axis, joined
        self.narrow = width < 600
        self.marks: list[Mark] = []
        self.y = 4.0

    def scene(self, title: str, groups: list[Group]) -> Scene:
        everything = [bar for group in groups for bar in group.bars]
        room = max((text_width(bar.words, SIZE) for bar in everything if bar.end is not None), default=0)
        self.left = LEFT if self.narrow else min(0.36 * self.width, max(text_width(b.label) for b in everything) + 16)
        self.right = self.width - RIGHT - room - 8
        top, whole = self.y, self._most(groups)
        for group in groups:
            self._group(group, whole if self.axis else self._most([group]))
        if self.axis:
            self._axis(top, whole)
        return Scene(title, self.width, round(self.y + 6), self.marks)

    def _most(self, groups: list[Group]) -> float:
        ends = [value for g in groups for b in g.bars for value in (b.start, b.end, b.high) if value is not None]
        return max([*ends, *(group.marker or 0 for group in groups)], default=0) or 1.0

    def _group(self, group: Group, most: float) -> None:
        for line in wrap(group.heading, (self.width - LEFT - RIGHT) / BOLD) if group.heading else ():
            self.y += LINE
            self.marks.append(Text(LEFT, self.y, line, bold=True))
        self.y += 7
        at = None if group.marker is None else self._x(group.marker, most)
        if at is not None:
            self.y += LINE
            beyond = at - text_width(group.marker_words, SMALL) < self.left
            anchor, shift = ("start", -1) if beyond else ("end", 1)
            self.marks.append(Text(at + shift, self.y - 4, group.marker_words, "floor", anchor, SMALL))
        else:
            self.y += 4
        top, previous, before = self.y, None, len(self.marks)
        for bar in group.bars:
            previous = self._bar(bar, most, previous)
        if at is not None:
            self.marks.append(Line(at, top, at, self.y - (ROW - BAR) / 2, "floor", 1.5))
        self.marks[before:] = sorted(self.marks[before:], key=lambda mark: isinstance(mark, Text))  # words on top
        self.y += 12

    def _bar(self, bar: Bar, most: float, previous: tuple[float, float] | None) -> tuple[float, float] | None:
        """Draw it at the current height. Returns where its end is, for the next one to join."""
        lines = wrap(bar.label, (self.width - RIGHT if self.narrow else self.left - 12) - LEFT)
        if self.narrow:
            for line in lines:
                self.y += LINE
                self.marks.append(Text(LEFT, self.y - 4, line))
        else:
            for i, line in enumerate(lines):
                self.marks.append(Text(LEFT, self.y + BAR - 2.5 + i * LINE, line))
        extra = 0 if self.narrow else (len(lines) - 1) * LINE
        if bar.end is None:
            reason = wrap(bar.words, self.width - RIGHT - self.left, SMALL)
            for i, line in enumerate(reason):
                self.marks.append(Text(self.left, self.y + BAR - 2.5 + i * LINE, line, "quiet", size=SMALL))
            self.y += ROW + max(extra, (len(reason) - 1) * LINE)
            return previous
        a, b = (self._x(value, most) for value in sorted((bar.start, bar.end)))
        if previous and self.joined:
            self.marks.append(Line(previous[0], previous[1], previous[0], self.y, "quiet", 0.8))
        self.marks.append(Rect(a, self.y, max(b - a, 1.0), BAR, bar.role, bar.estimate))
        edge, middle = b, self.y + BAR / 2
        if bar.low is not None and bar.high is not None:
            low, high = self._x(bar.low, most), self._x(bar.high, most)
            self.marks += [Line(low, middle, high, middle, "ink"), Line(low, middle - 3, low, middle + 3, "ink")]
            self.marks.append(Line(high, middle - 3, high, middle + 3, "ink"))
            edge = max(edge, high)
        self.marks.append(Text(edge + 6, self.y + BAR - 2.5, bar.words))
        joint = self._x(bar.end, most), self.y + BAR
        self.y += ROW + extra
        return joint

    def _axis(self, top: float, most: float) -> None:
        grid, labels = _scale(most, self.axis, self.left, self.right, top, self.y - 6)
        self.marks = [*grid, *self.marks, *labels]
        self.y += 12

    def _x(self, value: float, most: float) -> float:
        return self.left + value / most * (self.right - self.left)


def _scale(
    most: float, unit: str, left: float, right: float, top: float, bottom: float
) -> tuple[list[Mark], list[Mark]]:
    """Grid lines at round numbers from 0 to `most`, and below them as many of the numbers as there is room for."""
    grid, labels, free = [], [], left
    for tick in ticks(0, most):
        x, words = left + tick / most * (right - left), f"{tick:g}{unit}"
        grid.append(Line(x, top, x, bottom, "grid"))
        start = x if not tick else min(x - text_width(words, SMALL) / 2, right + 10 - text_width(words, SMALL))
        if start >= free:
            labels.append(Text(start, bottom + 14, words, "quiet", size=SMALL))
            free = start + text_width(words, SMALL) + 10
    return grid, labels


@dataclass(frozen=True)
class DotLine:
    name: str
    words: str  # at the line's end
    shares: Mapping[str, float]  # by variant, 1 is the ceiling


def dots(title: str, cases: Mapping[str, Sequence[DotLine]], looks: Mapping[str, Look]) -> Picture:
    """A line for each entry of a case, a dot for each variant, from none to the whole of a ceiling.

    looks: of all the variants, in the order in which they are laid over each other.
    """
    return lambda width: _Dots(width, looks).scene(title, cases)


class _Dots:
    """The layout of one picture of dots, from top to bottom."""

    def __init__(self, width: int, looks: Mapping[str, Look]) -> None:
        self.width, self.looks = width, looks
        self.narrow = width < 600
        self.marks: list[Mark] = []
        self.y = 12.0

    def scene(self, title: str, cases: Mapping[str, Sequence[DotLine]]) -> Scene:
        lines = [line for case in cases.values() for line in case]
        variants = {variant for line in lines for variant in line.shares}
        room = max(text_width(line.words, SMALL) for line in lines)
        self.left = (
            8 if self.narrow else min(max(text_width(line.name, SMALL) for line in lines) + 18, 0.36 * self.width)
        )
        self.right = self.width - 12 if self.narrow else self.width - RIGHT - room - 16
        self.most = max(1.0, *(share for line in lines for share in line.shares.values()))
        self.order = [variant for variant in self.looks if variant in variants]
        self._key()
        top = self.y
        for case, entries in cases.items():
            self.y += LINE + 4
            self.marks.append(Text(LEFT, self.y, case, bold=True))
            self.y += 6
            for line in entries:
                self._line(line)
        self._axis(top)
        return Scene(title, self.width, round(self.y), self.marks)

    def _key(self) -> None:
        """The variants' dots, each with its name."""
        x = 8.0
        for variant in self.order:
            room = text_width(variant, SMALL) + 30
            if x + room > self.width:
                x, self.y = 8.0, self.y + LINE
            self.marks += [self._dot(variant, x, self.y), Text(x + 9, self.y + 4, variant, size=SMALL)]
            x += room
        self.y += 10

    def _line(self, line: DotLine) -> None:
        names = wrap(line.name, (self.width - RIGHT if self.narrow else self.left - 14) - LEFT, SMALL)
        if self.narrow:
            for i, words in enumerate([*names, line.words]):
                self.y += LINE
                self.marks.append(Text(LEFT, self.y - 3, words, "ink" if i == len(names) else "quiet", size=SMALL))
            self.y += 2
        else:
            for i, words in enumerate(names):
                self.marks.append(Text(LEFT, self.y + 12 + i * LINE, words, "quiet", size=SMALL))
            self.marks.append(Text(self.right + 14, self.y + 12, line.words, size=SMALL))
        middle = self.y + 8
        self.marks.append(Line(self.left, middle, self.right, middle, "grid"))
        for variant in self.order:
            if variant in line.shares:
                self.marks.append(self._dot(variant, self._x(line.shares[variant]), middle))
        self.y += 20 + (0 if self.narrow else (len(names) - 1) * LINE)

    def _axis(self, top: float) -> None:
        grid, labels = _scale(100 * self.most, " %", self.left, self.right, top, self.y + 2)
        self.marks = [*grid, *self.marks, *labels]
        self.y += 24

    def _dot(self, variant: str, x: float, y: float) -> Dot:
        role, filled = self.looks[variant]
        return Dot(x, y, role, filled=filled)

    def _x(self, share: float) -> float:
        return self.left + share / self.most * (self.right - self.left)
