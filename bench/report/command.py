"""Report results files: python -m bench.report FILES… --out=DIR. MFU across devices, as Markdown, HTML, SVG and PNG.

With --compare, two commits of one device instead: python -m bench.report --compare A.json B.json
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import schema
from bench.report import compare, figures, tables
from bench.report.digest import Run, in_order, labels
from bench.report.estimates import Estimate, estimates
from bench.report.figures import Figure, slug
from bench.report.layout import WIDE
from bench.report.page import Section, html, markdown
from bench.report.scene import framed, png_file, svg_file
from train.errors import UserError
from train.files import making_folder, replacing
from train.settings import check_values, help_text, parse_settings, setting

ABOUT = "Report results files of `python -m bench`: MFU across devices; or two commits of one device, compared."


@dataclass(frozen=True)
class ReportConfig:
    out: str = setting("report", "folder to write: report.md, report.html, and the pictures as SVG and PNG")
    compare: bool = setting(False, "compare two files, or the files of two commits, and print the verdicts instead")


def read_all(names: Sequence[str]) -> tuple[list[Run], int]:
    """The runs of the files that can be read, and how many cannot: those are named on stderr."""
    runs, bad = [], 0
    for path in map(Path, names):
        try:
            runs.append(Run(path, sound(schema.read(path))))
        except (OSError, ValueError) as error:
            bad += 1
            reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else error
            print(f"{path}: {reason}; skipped", file=sys.stderr)
    return runs, bad


def sound(results: schema.Results) -> schema.Results:
    """The results, if they can be reckoned with. ValueError, naming the field, for a time or rate that is not positive,
    or a turn that is not whole."""
    found = [
        (f"{part}[{i}].seconds", x.seconds)
        for part in ("kernels", "steps")
        for i, x in enumerate(getattr(results, part))
    ]
    for i, ceiling in enumerate(results.ceilings):
        if not ceiling.rates:
            raise ValueError(f"ceilings[{i}].rates: got none, expected one at least")
        found.append((f"ceilings[{i}].rates", ceiling.rates))
    for where, samples in found:
        if samples and min(samples) <= 0:
            raise ValueError(f"{where}: got {min(samples)}, expected more than 0")
    for i, step in enumerate(results.steps):
        if step.turn < 1 or len(step.seconds) % step.turn:
            raise ValueError(f"steps[{i}].turn: got {step.turn}, expected a divisor of its {len(step.seconds)} samples")
    if results.peak and results.peak.flops <= 0:
        raise ValueError(f"peak.flops: got {results.peak.flops}, expected more than 0")
    return results


def sections(runs: Sequence[Run], guesses: Sequence[Estimate]) -> list[Section]:
    """All that the report says, in its order."""
    called = labels(runs)
    suffixes = _suffixes(runs)
    names = dict.fromkeys([*(w.name for r in runs for w in r.workloads), *(one.workload for one in guesses)])
    found = {name: [(called[r.path], r, w) for r in runs if (w := r.workload(name))] for name in names}
    measured = {name: rows for name, rows in found.items() if rows}
    best = tables.best([(called[r.path], r, w) for rows in measured.values() for _, r, w in rows])
    made = [
        Section("In short", tables=[best] if best.rows else []),
        Section(
            "MFU",
            "The share of a device's dense peak that a training step turns into the model's own FLOPs.",
            [figures.mfu(name, found[name], [e for e in guesses if e.workload == name]) for name in names],
        ),
        Section(
            "Training steps",
            figures=[figures.time(name, rows) for name, rows in measured.items()],
            tables=[tables.steps(r, w, label) for rows in measured.values() for label, r, w in rows],
        ),
        Section(
            "From the reference's step to ours",
            figures=_some(
                figures.waterfall(label, r, w, suffixes[r.path]) for rows in measured.values() for label, r, w in rows
            ),
        ),
        Section("Memory", figures=_some(figures.memory(name, rows) for name, rows in measured.items())),
        Section(
            "Kernels",
            figures=_some(figures.kernels(called[r.path], r, suffixes[r.path]) for r in runs),
            tables=[tables.kernels(r, called[r.path]) for r in runs if r.kernels],
        ),
        Section("Estimates", tables=[tables.estimated(guesses)] if guesses else []),
    ]
    lacking = [(r.path.name, tables.missing(r)) for r in runs]
    made.append(Section("Where the numbers come from", tables=[tables.files(runs)]))
    made.append(Section("What is missing", lists=[(name, lines) for name, lines in lacking if lines]))
    return [section for section in made if section.figures or section.tables or section.lists]


def summary(runs: Sequence[Run], guesses: Sequence[Estimate]) -> list[str]:
    """What the report is about, in a few words."""
    devices, partial = len({r.device for r in runs}), sum(not r.results.complete for r in runs)
    line = f"{_count(len(runs), 'results file')} of {_count(devices, 'device')}"
    line += f", {partial} of them partial." if partial else "."
    unmeasured = dict.fromkeys(one.device for one in guesses)
    line += f" {', '.join(unmeasured)}: estimates where nobody measured, marked as such." if unmeasured else ""
    return [line]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _some(found) -> list[Figure]:
    return [figure for figure in found if figure]


def _suffixes(runs: Sequence[Run]) -> dict[Path, str]:
    """A part of a file's name for each run, no two alike."""
    taken: dict[str, Path] = {}
    for r in runs:
        stem = slug(r.path.stem)
        name, count = stem, 2
        while name in taken:
            name, count = f"{stem}-{count}", count + 1
        taken[name] = r.path
    return {path: name for name, path in taken.items()}


def write(folder: Path, runs: Sequence[Run]) -> str:
    """Write the report. Returns a line that says what was left out, or nothing. UserError where `folder` refuses."""
    runs = in_order({run.path.resolve(): run for run in runs}.values())  # each file once
    measured = {(r.results.device.name, w.name) for r in runs for w in r.workloads if any(row.timing for row in w.rows)}
    guesses = estimates(measured)
    parts, about = sections(runs, guesses), summary(runs, guesses)
    note = ""
    with making_folder(folder):
        for figure in (figure for section in parts for figure in section.figures):
            scene = framed(figure.draw(WIDE), figure.caption)
            _put(folder / f"{figure.name}.svg", svg_file(scene))
            try:
                _put(folder / f"{figure.name}.png", png_file(scene))
            except ImportError:
                note = "PNG pictures left out: they need matplotlib (pip install 'nanofuse[plot]')"
        _put(folder / "report.md", markdown(about, parts).encode())
        _put(folder / "report.html", html(about, parts).encode())
    return note


def _put(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def main(argv: list[str] | None = None) -> int:
    parsed = parse_settings(ReportConfig, sys.argv[1:] if argv is None else argv, presets=False, files=True)
    if parsed.help:
        print(help_text(ReportConfig, "python -m bench.report", ABOUT, positional="FILE ..."))
        return 0
    config = ReportConfig(**parsed.settings)
    check_values(config)
    runs, bad = read_all(parsed.files)
    if not runs:
        what = "none of them can be read" if bad else "none was named"
        raise UserError(f"FILES: {what}; expected results files of `python -m bench`")
    if config.compare:
        print(compare.report(runs))
        return min(bad, 1)
    if note := write(Path(config.out), runs):
        print(note)
    print(f"{_count(len(runs), 'results file')}: {Path(config.out, 'report.html')}, report.md beside it")
    return min(bad, 1)
