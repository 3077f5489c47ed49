"""Draw the loss curves of runs: python -m train.plot out other_out --out=loss.svg

matplotlib draws PNG, PDF and the like. SVG is written here, so that a machine with nothing but torch gets the
same picture.
"""

import io
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path

from train.errors import UserError, run
from train.log import METRICS, Record, read_metrics
from train.settings import check_values, help_text, parse_settings, setting

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#db2777")
Y_LABEL = "loss, nats a token"
INK, QUIET, GRID, PAPER = "#1f2937", "#6b7280", "#e5e7eb", "#fdfdfc"

Point = tuple[float, float]  # (iteration, loss)


@dataclass(frozen=True)
class PlotConfig:
    out_dir: str = setting("out", "folder of the run, where none is named before the settings")
    out: str = setting("", "picture to write; loss.png beside the run, or loss.svg without matplotlib")


@dataclass(frozen=True)
class Series:
    """One line, or with `dots` one set of points, of the picture."""

    points: Sequence[Point]
    colour: str
    label: str = ""  # in the legend; empty: not there
    width: float = 1.5  # of the line, in points; 0: no line
    opacity: float = 1.0
    dots: float = 0.0  # radius, in points; 0: no dots
    filled: bool = True


def plot_run(out_dir: str | os.PathLike) -> Path | None:
    """Draw a run's metrics.jsonl as loss.png beside it, or loss.svg where matplotlib is missing.

    Returns the picture's path, or None where there is nothing to draw or nowhere to write it.
    """
    try:
        records = read_metrics(Path(out_dir) / METRICS)
        return write_picture(Path(out_dir) / default_name(), {Path(out_dir).resolve().name: records})
    except (OSError, UserError):
        return None


def write_picture(path: Path, runs: dict[str, list[Record]]) -> Path:
    """Draw runs (name -> records), whole or not at all.

    UserError where there is no loss, or no way to draw the format that path's suffix names. OSError.
    """
    alone = len(runs) == 1
    series = []
    for i, (name, records) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        series += _alone(records) if alone else _among_others(name, records, colour)
    if not series:
        raise UserError(f"{METRICS}: no losses yet in {', '.join(runs)}")
    title = _title(runs)
    picture = _svg(series, title) if path.suffix == ".svg" else _matplotlib(series, title, path.suffix)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(picture)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def default_name() -> str:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return "loss.svg"
    return "loss.png"


# What to draw


def _alone(records: list[Record]) -> list[Series]:
    """One run: training in one colour, validation in another."""
    train, val = _points(records, "iter", "loss"), _points(records, "eval", "val_loss")
    series = []
    if train:
        series += [
            Series(_thin(train), COLOURS[0], width=0.8, opacity=0.2),
            Series(_thin(_smooth(train)), COLOURS[0], "training"),
        ]
    if evaluated := _points(records, "eval", "train_loss"):
        series.append(Series(evaluated, COLOURS[0], "training, evaluated", width=0, dots=3, filled=False))
    return series + _validation(val, COLOURS[1], "validation")


def _among_others(name: str, records: list[Record], colour: str) -> list[Series]:
    """One run of several: training faint, validation over it, in the run's colour."""
    train, val = _points(records, "iter", "loss"), _points(records, "eval", "val_loss")
    series = [Series(_thin(_smooth(train)), colour, "" if val else name, opacity=0.5)] if train else []
    return series + _validation(val, colour, name)


def _validation(val: list[Point], colour: str, label: str) -> list[Series]:
    """The validation losses, the best one ringed."""
    if not val:
        return []
    best = min(val, key=lambda point: point[1])
    return [
        Series(val, colour, f"{label}, best {best[1]:.4f} at {best[0]}", width=2, dots=3),
        Series([best], colour, width=0, dots=6, filled=False),
    ]


def _points(records: list[Record], kind: str, name: str) -> list[Point]:
    """The finite values of one field, by iteration."""
    found = [(record["iter"], record.get(name)) for record in records if record["kind"] == kind]
    return sorted((x, y) for x, y in found if isinstance(x, int) and isinstance(y, int | float))


def _smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over a centred window, a thirtieth of the points; narrower at the start, where losses fall."""
    sums = [0.0, *accumulate(y for _, y in points)]
    smooth = []
    for i, (x, _) in enumerate(points):
        half = min(len(points) // 60, i)
        end = min(len(points), i + half + 1)
        smooth.append((x, (sums[end] - sums[i - half]) / (end - i + half)))
    return smooth


def _thin(points: Sequence[Point], most: int = 1500) -> Sequence[Point]:
    """At most about `most` of the points: a picture has no more columns."""
    return points[:: math.ceil(len(points) / most)]


def _title(runs: dict[str, list[Record]]) -> str:
    if len(runs) > 1:
        return "validation loss, with the training loss behind it"
    ((name, records),) = runs.items()
    facts = next((record for record in reversed(records) if record["kind"] == "run"), {})
    if not isinstance(facts.get("parameters"), int):
        return name
    return f"{name}: {facts['parameters'] / 1e6:.2f}M parameters, {facts.get('device')}"


# With matplotlib


def _matplotlib(series: list[Series], title: str, suffix: str) -> bytes:
    try:
        from matplotlib.figure import Figure  # not pyplot: it would pick a window system
    except ImportError as error:
        raise UserError(
            f"out: {suffix or 'this'} needs matplotlib; name a .svg, or pip install 'nanofuse[plot]'"
        ) from error
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained", facecolor=PAPER)
    formats = figure.canvas.get_supported_filetypes()
    if suffix[1:] not in formats:
        raise UserError(f"out: got a name ending in {suffix!r}, expected .{', .'.join(sorted(formats))}")
    axes = figure.add_subplot(facecolor=PAPER)
    for one in series:
        x, y = zip(*one.points, strict=True)
        axes.plot(
            x,
            y,
            color=one.colour,
            label=one.label or None,
            linewidth=one.width,
            alpha=one.opacity,
            marker="o" if one.dots else None,
            markersize=2 * one.dots,
            markerfacecolor=one.colour if one.filled else "none",
        )
    axes.set_title(title, loc="left", color=INK, parse_math=False)
    axes.set_xlabel("iteration", color=QUIET)
    axes.set_ylabel(Y_LABEL, color=QUIET)
    axes.tick_params(colors=QUIET, length=0)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK, loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:])
    return buffer.getvalue()


# Without


def _svg(series: list[Series], title: str) -> bytes:
    """The same picture as a self-contained SVG."""
    width, height = 900, 540
    left, right, top, bottom = 64, width - 24, 48, height - 52
    xs, ys = zip(*(point for one in series for point in one.points), strict=True)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    margin = 0.04 * (max(ys) - min(ys)) or 0.5
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def py(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    def text(x: float, y: float, words: str, colour: str, anchor: str = "start", more: str = "") -> str:
        place = f'x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" {more}'
        return f"<text {place}>{escape(words)}</text>"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, Helvetica, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        text(left, 28, title, INK, more='font-size="16"'),
        text((left + right) / 2, height - 12, "iteration", QUIET, "middle"),
        text(0, 0, Y_LABEL, QUIET, "middle", f'transform="translate(18 {height / 2}) rotate(-90)"'),
    ]
    for y in ticks(y_low, y_high):
        parts.append(f'<path d="M{left} {py(y):.1f}H{right}" stroke="{GRID}"/>')
        parts.append(text(left - 8, py(y) + 4, f"{y:g}", QUIET, "end"))
    for x in ticks(x_low, x_high):
        parts.append(f'<path d="M{px(x):.1f} {top}V{bottom}" stroke="{GRID}"/>')
        parts.append(text(px(x), bottom + 20, f"{x:.10g}", QUIET, "middle"))
    for one in series:
        dots = [(px(x), py(y)) for x, y in one.points]
        pen = f'stroke="{one.colour}" stroke-opacity="{one.opacity}" stroke-linejoin="round"'
        if one.width:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
            parts.append(f'<polyline points="{line}" fill="none" {pen} stroke-width="{one.width}"/>')
        if one.dots:
            fill = one.colour if one.filled else "none"
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{one.dots}" fill="{fill}" {pen}/>' for x, y in dots]
    for row, one in enumerate(one for one in series if one.label):
        x, y = right - 8, top + 16 + 20 * row
        mark = f"M{x - 26} {y - 4}h26" if one.width else f"M{x - 13} {y - 4}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0"
        parts.append(f'<path d="{mark}" fill="none" stroke="{one.colour}" stroke-width="{one.width or 1}"/>')
        parts.append(text(x - 34, y, one.label, INK, "end"))
    return "\n".join([*parts, "</svg>\n"]).encode()


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers, evenly spaced, between low and high."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (5, 2, 1) if (high - low) / (m * power) >= 4)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# The command


def main(argv: list[str] | None = None) -> None:
    parsed = parse_settings(PlotConfig, sys.argv[1:] if argv is None else argv, presets=False, files=True)
    if parsed.help:
        about = "Draw the loss curves of one run or several from their metrics.jsonl."
        print(help_text(PlotConfig, "python -m train.plot", about, positional="[OUT_DIR ...]"))
        return
    config = PlotConfig(**parsed.settings)
    check_values(config)
    folders = [Path(name) for name in parsed.files or [config.out_dir]]
    runs: dict[str, list[Record]] = {}
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        try:
            runs[name] = read_metrics(folder / METRICS)
        except OSError as error:
            raise UserError(f"out_dir: cannot read {folder / METRICS}: {error.strerror}") from error
    beside = folders[0] if len(folders) == 1 else Path()
    path = Path(config.out) if config.out else beside / default_name()
    try:
        write_picture(path, runs)
    except OSError as error:
        raise UserError(f"out: cannot write {path}: {error.strerror}") from error
    print(f"loss curve: {path}")


if __name__ == "__main__":
    run(main)
