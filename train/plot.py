"""Draw the loss curves of runs: python -m train.plot out other_out --out=loss.svg

Every picture of the project has the colours below and is saved by `picture`. An SVG is light or dark as its reader's
screen is. PNG, PDF and the other formats are light. matplotlib is imported where it draws: importing it takes a while.
"""

import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.errors import UserError, one_line, run
from train.files import replacing
from train.log import METRICS, Record, read_metrics
from train.settings import command_line, setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEME = {  # what a colour is for: on light paper, on a dark screen
    "paper": ("#fdfdfc", "#14171c"),
    "ink": ("#1f2937", "#e6e8ec"),
    "quiet": ("#6b7280", "#9aa3b0"),
    "grid": ("#e5e7eb", "#2b3039"),
    "ours": ("#2563eb", "#6ea0ff"),
    "reference": ("#8d96a5", "#7d8797"),
    "rung": ("#7ba3ee", "#4468ad"),
    "better": ("#15924b", "#4cc38a"),
    "worse": ("#d9541e", "#f0875a"),
    "floor": ("#b4232c", "#f0747c"),
}
LIGHT = {role: light for role, (light, _) in SCHEME.items()}
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
COLOURS = (LIGHT["ours"], "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#db2777")

LARGEST = 1e30  # of a value drawn
MOST = 1500  # points of a training curve, about: a picture has no more columns


def svg_style() -> str:
    """CSS for SVG by matplotlib, which writes colours as style="fill: #..."; a dark screen gets the dark ones."""
    dark = [
        f'[style*="{what}: {day}"]{{{what}:{night}!important}}'
        for day, night in SCHEME.values()
        for what in ("fill", "stroke")
    ]
    words = f"svg text{{font-family:{FONT}!important}}"
    return f"{words}@media screen and (prefers-color-scheme:dark){{{''.join(dark)}}}"


def new_figure(width: float, height: float) -> "Figure":
    """A sheet of paper; its lengths, and all sizes of letters and lines on it, are in points."""
    from matplotlib.figure import Figure  # not pyplot: it would choose a window system

    return Figure(figsize=(width / 72, height / 72), facecolor=LIGHT["paper"])


def picture(figure: "Figure", suffix: str, title: str) -> bytes:
    """The figure as a file of the format that the suffix names. ValueError for a format that matplotlib lacks."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    if suffix != ".svg":
        figure.savefig(buffer, format=suffix[1:], dpi=144)
        return buffer.getvalue()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # equal pictures are equal files
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Title": title, **unsaid})
    svg = buffer.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>", f"<style>{svg_style()}</style>", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z][a-z0-9.]*_\d+"', "", svg)  # a page of several pictures would have them twice
    return (re.sub(r"\s*\n\s*", " ", svg).strip() + "\n").encode()


@dataclass(frozen=True)
class PlotConfig:
    out_dir: str = setting("out", "folder of the run, where none is named before the settings", path=True)
    out: str = setting("", "picture to write; empty: loss.png beside the run", path=True)


def plot_run(out_dir: str | os.PathLike) -> Path | None:
    """Draw a run's metrics.jsonl as loss.png beside it. None if that fails, since the run itself is done."""
    try:
        records = read_metrics(Path(out_dir) / METRICS)
        return write_picture(Path(out_dir) / "loss.png", {Path(out_dir).resolve().name: records})
    except Exception:  # whatever matplotlib, or a log that something else wrote, makes of it
        return None


def write_picture(path: Path, runs: dict[str, list[Record]]) -> Path:
    """Draw runs (name -> records) into the file `path`, whole or not at all.

    UserError if there is no loss. ValueError for a format that matplotlib lacks. OSError.
    """
    figure, title = new_figure(648, 389), one_line(_title(runs))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(facecolor=LIGHT["paper"])
    for i, (name, records) in enumerate(runs.items()):
        _draw(axes, records, COLOURS[i % len(COLOURS)], one_line(name) if len(runs) > 1 else "")
    if not axes.lines:
        raise UserError(f"{METRICS}: no losses yet in {', '.join(runs)}")
    axes.set_title(title, loc="left", color=LIGHT["ink"], parse_math=False)
    axes.set_xlabel("iteration", color=LIGHT["quiet"])
    axes.set_ylabel("loss, nats a token", color=LIGHT["quiet"])
    axes.tick_params(colors=LIGHT["quiet"], length=0)
    axes.grid(color=LIGHT["grid"])
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    legend = axes.legend(frameon=False, labelcolor=LIGHT["ink"], loc="upper right")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder may have a $ in its name
    content = picture(figure, path.suffix, title)
    with replacing(path) as file:
        file.write(content)
    return path


def _draw(axes: "Axes", records: list[Record], colour: str, name: str) -> None:
    """A run. name: if it is one of several. Then all is in its colour, and the training losses are faint."""
    x, y = _points(records, "iter", "loss")
    evaluated, means = _points(records, "eval", "train_loss")
    judged, losses = _points(records, "eval", "val_loss")
    every = math.ceil(len(x) / MOST)
    if len(x) and not name:
        axes.plot(x[::every], y[::every], color=colour, linewidth=0.8, alpha=0.2)
    if len(x):
        label = "training" if not name else None if len(judged) else name
        axes.plot(x[::every], _smooth(y)[::every], color=colour, alpha=0.5 if name else 1.0, label=label)
    if len(evaluated) and not name:
        axes.plot(evaluated, means, "o", color=colour, markerfacecolor="none", label="training, evaluated")
    if len(judged):
        best, colour = int(np.argmin(losses)), colour if name else COLOURS[1]
        label = f"{name or 'validation'}, best {losses[best]:.4f} at {judged[best]}"
        axes.plot(judged, losses, "o-", color=colour, linewidth=2, label=label)
        axes.plot(judged[best], losses[best], "o", color=colour, markersize=12, markerfacecolor="none")


def _points(records: list[Record], kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The iterations and values of one field, without those that no axis and no loss has."""
    points = [(record["iter"], record.get(name)) for record in records if record["kind"] == kind]
    numbers = ((x, y) for x, y in points if isinstance(x, int) and isinstance(y, int | float))
    known = [(x, y) for x, y in numbers if 0 <= x < 2**53 and abs(y) < LARGEST]
    return np.array([x for x, _ in known]), np.array([y for _, y in known], dtype=float)


def _smooth(y: np.ndarray) -> np.ndarray:
    """The mean over a centred window, a thirtieth of the points; narrower at the start, where losses fall."""
    i, sums = np.arange(len(y)), np.concatenate([[0.0], np.cumsum(y)])
    half = np.minimum(len(y) // 60, i)
    end = np.minimum(len(y), i + half + 1)
    return (sums[end] - sums[i - half]) / (end - i + half)


def _title(runs: dict[str, list[Record]]) -> str:
    if len(runs) > 1:
        return "validation loss, with the training loss behind it"
    ((name, records),) = runs.items()
    facts = next((record for record in reversed(records) if record["kind"] == "run"), {})
    if not (isinstance(facts.get("parameters"), int) and facts["parameters"] < 2**63):
        return name
    return f"{name}: {facts['parameters'] / 1e6:.2f}M parameters, {str(facts.get('device'))[:80]}"


def main(argv: list[str] | None = None) -> None:
    about = "Draw the loss curves of one run or several from their metrics.jsonl."
    config, named = command_line(PlotConfig, argv, "python -m train.plot", about, positional="[OUT_DIR ...]")
    folders = named or [config.out_dir]
    runs: dict[str, list[Record]] = {}
    for folder in folders:
        try:
            runs[folder] = read_metrics(Path(folder) / METRICS)
        except OSError as error:
            raise UserError(f"out_dir: cannot read {Path(folder) / METRICS}: {error.strerror}") from error
    beside = Path(folders[0] if len(folders) == 1 else "")
    path = Path(config.out) if config.out else beside / "loss.png"
    try:
        write_picture(path, runs)
    except (OSError, ValueError) as error:
        raise UserError(f"out: cannot write {path}: {getattr(error, 'strerror', error)}") from error
    print(one_line(f"loss curve: {path}"))


if __name__ == "__main__":
    run(main)
