"""A picture as a list of marks. Two pens draw it, SVG and, with matplotlib, PNG; neither lays anything out.

Marks have roles, not colours: a page knows what "ours" looks like by day and by night. Lengths are CSS pixels.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from train.plot import COLOURS, GRID, INK, PAPER, QUIET

SIZE = 13  # of ordinary text
BOLD = 1.15  # times as wide as ordinary text
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
LIGHT = {
    "paper": PAPER,
    "ink": INK,
    "quiet": QUIET,
    "grid": GRID,
    "ours": COLOURS[0],
    "reference": "#8d96a5",
    "rung": "#7ba3ee",
    "better": "#15924b",
    "worse": "#d9541e",
    "floor": "#b4232c",
}
DARK = {
    "paper": "#14171c",
    "ink": "#e6e8ec",
    "quiet": "#9aa3b0",
    "grid": "#2b3039",
    "ours": "#6ea0ff",
    "reference": "#7d8797",
    "rung": "#4468ad",
    "better": "#4cc38a",
    "worse": "#f0875a",
    "floor": "#f0747c",
}


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    role: str
    estimate: bool = False  # outlined and hatched: nobody measured it


@dataclass(frozen=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    role: str
    width: float = 1.0


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    role: str
    radius: float = 4.5
    filled: bool = True


@dataclass(frozen=True)
class Text:
    x: float
    y: float  # of the baseline
    words: str
    role: str = "ink"
    anchor: str = "start"  # "start", "middle", "end"
    size: float = SIZE
    bold: bool = False


Mark = Rect | Line | Dot | Text


@dataclass(frozen=True)
class Scene:
    title: str
    width: int
    height: int
    marks: Sequence[Mark]
    left: int = 0  # the coordinates of its upper left corner
    top: int = 0


def framed(scene: Scene, caption: str) -> Scene:
    """The picture as it stands alone: on paper, its title above it, its caption below."""
    around, line = 20, 18
    title = wrap(scene.title, scene.width / BOLD, 16)
    below = wrap(caption, scene.width, 12)
    top = -around - 8 - 22 * len(title)
    width, height = scene.width + 2 * around, scene.height - top + line * len(below) + around + 6
    marks = [
        Rect(-around, top, width, height, "paper"),
        *(Text(0, top + around + 16 + 22 * i, words, size=16, bold=True) for i, words in enumerate(title)),
        *scene.marks,
        *(Text(0, scene.height + line * (i + 1), words, "quiet", size=12) for i, words in enumerate(below)),
    ]
    return Scene(scene.title, width, height, marks, -around, top)


def text_width(words: str, size: float = SIZE) -> float:
    """About how wide the words are in any ordinary sans-serif; rather too much than too little."""
    narrow = sum(c in "iljtfrI.,:;'|!()[] ·" for c in words)
    wide = sum(c in "mwMW%@—" for c in words)
    return size * (0.62 * len(words) - 0.27 * narrow + 0.3 * wide)


def wrap(words: str, width: float, size: float = SIZE) -> list[str]:
    """The words on as many lines as it takes, none wider than `width`; a word that is too long is broken."""
    lines = [""]
    for word in words.split():
        if lines[-1] and text_width(f"{lines[-1]} {word}", size) > width:
            lines.append("")
        for c in f"{' ' if lines[-1] else ''}{word}":
            if text_width(lines[-1] + c, size) > width and lines[-1]:
                lines.append("")
            lines[-1] += c
    return lines


# As SVG


def escaped(words: str) -> str:
    """For markup; without control characters, which a compiler's message may hold and XML may not."""
    return escape(printable(words))


def printable(words: str) -> str:
    return "".join(c for c in words if c.isprintable())


STYLE = "".join(f".{role}{{fill:var(--{role})}}.s-{role}{{stroke:var(--{role})}}" for role in LIGHT) + (
    # a rim of paper keeps words readable where a line passes behind them
    "svg text{font-variant-numeric:tabular-nums;paint-order:stroke;stroke:var(--paper);stroke-width:3px;"
    "stroke-linejoin:round}"
)


def variables(colours: dict[str, str]) -> str:
    """CSS declarations of a colour scheme, a variable a role."""
    return ";".join(f"--{role}:{colour}" for role, colour in colours.items())


def schemes(root: str) -> str:
    """CSS: both schemes on `root`; the dark one only on screens."""
    return f"{root}{{{variables(LIGHT)}}}@media screen and (prefers-color-scheme:dark){{{root}{{{variables(DARK)}}}}}"


def inline_svg(scene: Scene, css_class: str = "") -> str:
    """For a page that defines the roles (STYLE) and the colours (schemes)."""
    shown = f' class="{css_class}"' if css_class else ""
    box = (
        f'viewBox="{scene.left} {scene.top} {scene.width} {scene.height}" width="{scene.width}" height="{scene.height}"'
    )
    body = "".join(map(_element, scene.marks))
    font = f'font-family="{FONT}" font-size="{SIZE}"'
    name = f"<title>{escaped(scene.title)}</title>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img"{shown} {box} {font}>{name}{body}</svg>'


def svg_file(scene: Scene) -> bytes:
    """For a file: light or dark as its reader has it."""
    styled = f"</title><style>{schemes('svg')}{STYLE}</style>"
    return inline_svg(scene).replace("</title>", styled, 1).encode() + b"\n"


def _element(mark: Mark) -> str:
    match mark:
        case Rect(x, y, width, height, role, False):
            return f'<rect class="{role}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
        case Rect(role=role):
            hatch = "".join(map(_element, _hatch(mark)))
            place = f'x="{mark.x:.1f}" y="{mark.y:.1f}" width="{mark.width:.1f}" height="{mark.height:.1f}"'
            return f'{hatch}<rect class="s-{role}" fill="none" stroke-dasharray="4 2" {place}/>'
        case Line(x1, y1, x2, y2, role, width):
            return (
                f'<path class="s-{role}" fill="none" stroke-width="{width}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'
            )
        case Dot(x, y, role, radius, filled):
            pen = f'class="{role}"' if filled else f'class="s-{role}" fill="none" stroke-width="1.5"'
            return f'<circle {pen} cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
        case Text(x, y, words, role, anchor, size, bold):
            more = f' font-size="{size:g}"' * (size != SIZE) + ' font-weight="600"' * bold
            more += f' text-anchor="{anchor}"' * (anchor != "start")
            return f'<text class="{role}" x="{x:.1f}" y="{y:.1f}"{more}>{escaped(words)}</text>'


def _hatch(rect: Rect, gap: float = 6) -> list[Line]:
    """Slanted lines that fill the rectangle, cut at its edges."""
    lines, x0, y0, w, h = [], rect.x, rect.y, rect.width, rect.height
    offset = gap
    while offset < w + h:  # from the lower left to the upper right: x - x0 + y - y0 = offset
        a, b = max(0.0, offset - h), min(w, offset)
        lines.append(Line(x0 + a, y0 + offset - a, x0 + b, y0 + offset - b, rect.role, 0.6))
        offset += gap
    return lines


# As PNG


def png_file(scene: Scene, dpi: int = 144) -> bytes:
    """The same picture by day. ImportError without matplotlib."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure  # not pyplot: it would pick a window system
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    right, bottom = scene.left + scene.width, scene.top + scene.height
    figure = Figure(figsize=(scene.width / 96, scene.height / 96), facecolor=LIGHT["paper"])
    axes = figure.add_axes((0, 0, 1, 1), xlim=(scene.left, right), ylim=(bottom, scene.top))
    axes.axis("off")
    points = 72 / 96  # a CSS pixel
    rim = withStroke(linewidth=3 * points, foreground=LIGHT["paper"])
    for order, mark in enumerate(scene.marks):
        colour = LIGHT[mark.role]
        match mark:
            case Rect(x, y, width, height, _, estimate):
                look = {"facecolor": "none", "edgecolor": colour, "linestyle": (0, (4, 2))}
                look = look if estimate else {"facecolor": colour, "edgecolor": "none"}
                axes.add_patch(Rectangle((x, y), width, height, zorder=order, **look))
                hatch = [((line.x1, line.y1), (line.x2, line.y2)) for line in _hatch(mark) if estimate]
                axes.add_collection(LineCollection(hatch, colors=colour, linewidths=0.45, zorder=order), autolim=False)
            case Line(x1, y1, x2, y2, _, width):
                axes.plot((x1, x2), (y1, y2), color=colour, linewidth=width * points, zorder=order)
            case Dot(x, y, _, radius, filled):
                size, face = 2 * radius * points, colour if filled else "none"
                axes.plot(x, y, "o", color=colour, markersize=size, markerfacecolor=face, zorder=order)
            case Text(x, y, words, _, anchor, size, bold):
                side = {"start": "left", "middle": "center", "end": "right"}[anchor]
                weight = "bold" if bold else "normal"
                look = {"color": colour, "fontsize": size * points, "weight": weight, "parse_math": False}
                axes.text(x, y, printable(words), ha=side, va="baseline", zorder=order, path_effects=[rim], **look)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
