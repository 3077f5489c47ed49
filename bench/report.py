"""Report results files: python -m bench.report FILES… --out=DIR. MFU across devices, as Markdown, HTML, SVG and PNG.

With --compare it compares two commits on one device: python -m bench.report --compare A.json B.json

`digest.py` computes the numbers, `tables.py` and `pictures.py` show them, `compare.py` compares two commits.
`page.html` is the page's template. The page is one file that needs no other.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import compare, pictures, results, tables
from bench.digest import Estimate, Run, Steps, estimates, in_order
from bench.pictures import WIDE, Picture, sources
from bench.tables import NONE, Table, mfu_cells, shown
from model.work import ATTAINED, SHEET
from train import errors
from train.errors import UserError
from train.files import making_folder, replacing
from train.plot import FONT, SCHEME, picture, printable, svg_style
from train.settings import command_line, setting

ABOUT = "Report results files of `python -m bench`: MFU across devices; or two commits of one device, compared."
TITLE = "Model FLOPs utilisation, device by device"


@dataclass(frozen=True)
class ReportConfig:
    out: str = setting("report", "folder to write: report.md, report.html, and the pictures as SVG and PNG")
    compare: bool = setting(False, "compare two files, or the files of two commits, and print the verdicts instead")


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    lists: Sequence[tuple[str, list[str]]] = ()  # heading, items


def sections(runs: Sequence[Run], guesses: Sequence[Estimate]) -> list[Section]:
    """The report's sections that have contents, in order."""
    found: dict[str, list[Steps]] = {}  # by workload
    for each in (each for run in runs for each in run.steps):
        found.setdefault(each.name, []).append(each)
    measured = [each for same in found.values() for each in same]
    names = dict.fromkeys([*found, *(one.workload.name for one in guesses)])
    shares = "The share of a device's dense peak that a training step turns into the model's own FLOPs."
    made = [
        Section("In short", tables=_present([best(measured)])),
        Section("MFU", shares, [pictures.mfu(name, found.get(name, []), guesses) for name in names]),
        Section(
            "Training steps",
            pictures=list(map(pictures.time, found.values())),
            tables=list(map(tables.steps, measured)),
        ),
        Section("From the reference's step to ours", pictures=_present(map(pictures.waterfall, measured))),
        Section("Memory", pictures=_present(map(pictures.memory, found.values()))),
        Section("Kernels", pictures=_present(map(pictures.kernels, runs)), tables=_present(map(tables.kernels, runs))),
        Section("Estimates", tables=[estimated(guesses)] if guesses else []),
        Section("Where the numbers come from", tables=[files(runs)]),
        Section("What is missing", lists=[(r.path.name, lines) for r in runs if (lines := tables.missing(r))]),
    ]
    return [section for section in made if section.pictures or section.tables or section.lists]


def summary(runs: Sequence[Run], guesses: Sequence[Estimate]) -> str:
    partial = sum(not run.results.complete for run in runs)
    line = f"{_count(len(runs), 'results file')} of {_count(len({run.device for run in runs}), 'device')}"
    line += f", {partial} of them partial." if partial else "."
    unmeasured = ", ".join(dict.fromkeys(one.device for one in guesses))
    return f"{line} What nobody measured is an estimate and marked as one: {unmeasured}." if unmeasured else line


def best(found: Sequence[Steps]) -> Table | None:
    """Our fastest step of every workload of every run, beside the reference's and the floor."""
    rows, references = [], []
    for steps in found:
        ours, baseline = steps.best, steps.baseline
        if ours is None:
            continue
        references += [baseline.step.variant] if baseline else []
        cells = {
            "workload": steps.name,
            "device": steps.run.label,
            "our best step": ours.step.variant,
            "median, ms": shown(ours.seconds, 1e3),
            **mfu_cells(ours),
            "floor's MFU, %": shown(steps.floor and ours.mfu(seconds=steps.floor), 100, ".1f"),
            "reference, ms": shown(baseline and baseline.seconds, 1e3),
            "speed-up, ×": shown(ours.speedup, form=".2f"),
            "file": steps.run.path.name + " (partial)" * (not steps.run.results.complete),
        }
        rows.append(("", cells))
    caption = "MFU counts (6N + 12LHQT) FLOPs a token, MFU 6N counts 6N, over the device's dense peak. "
    if references:
        caption += f"The reference is the fastest of its modes ({', '.join(dict.fromkeys(references))}). "
    caption += f"The floor is computed. From {sources(found)}."
    return Table("Our best step on each device", caption, rows) if rows else None


def estimated(guesses: Sequence[Estimate]) -> Table:
    rows = [
        {
            "workload": one.workload.name,
            "device": one.device,
            "peak, TFLOP/s": shown(one.peak, 1e-12),
            "memory, GB/s": shown(one.bandwidth, 1e-9),
            "floor, ms": shown(one.seconds(SHEET), 1e3),
            "MFU at the floor, %": shown(one.mfu(SHEET), 100, ".1f"),
            "attainable, ms": shown(one.seconds(ATTAINED), 1e3),
            "tokens, 1/s": shown(one.workload.tokens / one.seconds(ATTAINED)),
            "MFU, %": shown(one.mfu(ATTAINED), 100, ".1f"),
            "MFU 6N, %": shown(one.mfu(ATTAINED, "6n"), 100, ".1f"),
            "what it is": "estimate",
        }
        for one in guesses
    ]
    caption = (
        "Estimates, not measurements: nobody has run these. The floor takes each part of the step at its data sheet's "
        "FLOP/s or bytes/s, whichever takes longer. Attainable assumes that every device reaches what good kernels "
        f"reach on an H100: {100 * ATTAINED.matmul:.0f} % of the sheet's FLOP/s in matmuls, "
        f"{100 * ATTAINED.attention:.0f} % in attention, {100 * ATTAINED.bandwidth:.0f} % of its bytes/s. "
        "Whether the step fits into the memory is not checked. "
        f"Data sheets: {'; '.join(dict.fromkeys(one.source for one in guesses))}."
    )
    return Table("Devices that nobody measured", caption, [("computed", cells) for cells in rows])


def files(runs: Sequence[Run]) -> Table:
    """A row for each file."""
    rows = []
    for run in runs:
        found, software = run.results, run.results.software
        cells = {
            "file": run.path.name,
            "device": run.device,
            "commit": run.commit,
            "date": run.day,
            "torch": software.torch,
            "Triton": software.triton or NONE,
            "CUDA": software.cuda or NONE,
            "driver": found.device.driver or NONE,
            "peak, TFLOP/s": shown(found.peak.flops, 1e-12),
            "matmul, TFLOP/s": shown(found.ceiling("matmul"), 1e-12),
            "copy, GB/s": shown(found.ceiling("copy"), 1e-9),
            "state": "complete" if found.complete else "partial",
        }
        rows.append(("" if found.complete else "missing", cells))
    peaks = dict.fromkeys(f"{run.device}: {run.results.peak.source}" for run in runs)
    caption = "Peak is what MFU is a share of. Matmul and copy are the best that the device did in the same run."
    return Table("The files", f"{caption} Peaks: {'; '.join(peaks)}.", rows)


def html(summary: str, sections: Sequence[Section]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    known = {"title": TITLE, "font": FONT, "scheme": SCHEME, "NONE": NONE, "inline": _inline, "svg_style": svg_style()}
    return template.render(summary=summary, sections=sections, **known)


def _inline(drawn: Picture, width: int) -> str:
    """The picture as an element of the page. Each width has its own name, because ids inside are derived from it."""
    import markupsafe

    svg = picture(drawn.draw(width), ".svg", f"{drawn.title}, {width} points").decode()
    return markupsafe.Markup(re.sub("<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL))


def markdown(summary: str, sections: Sequence[Section]) -> str:
    blocks = [f"# {TITLE}", _escaped(summary)]
    for section in sections:
        blocks.append(f"## {_escaped(section.title)}")
        blocks += [_escaped(section.text)] if section.text else []
        for each in section.pictures:
            title = _escaped(each.title)
            blocks += [f"### {title}", f"![{title}]({each.name}.svg)", _escaped(each.caption)]
        for table in section.tables:
            rule = ["---:" if heading in table.numbers else "---" for heading in table.headings]
            rows = [[_escaped(cell) for cell in cells.values()] for _, cells in table.rows]
            lines = [f"| {' | '.join(row)} |" for row in (table.headings, rule, *rows)]
            blocks += [f"### {_escaped(table.title)}", "\n".join(lines), _escaped(table.caption)]
        for heading, items in section.lists:
            blocks += [f"### {_escaped(heading)}", "\n".join(f"- {_escaped(item)}" for item in items)]
    return "\n\n".join(blocks) + "\n"


def _escaped(text: str) -> str:
    """Escape the text, so that Markdown shows it unchanged, on one line."""
    text = " ".join(text.split())
    return re.sub(r"[\\`*|<\[]|\b_|_\b", r"\\\g<0>", text)  # a _ within a word means nothing to Markdown


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _present(found: Iterable) -> list:
    return [each for each in found if each]


def write(folder: Path, runs: Sequence[Run]) -> None:
    """Write the report. UserError if `folder` cannot be written."""
    runs = in_order(runs)
    guesses = estimates(runs)
    about, parts = summary(runs, guesses), sections(runs, guesses)
    with making_folder(folder):
        for each in (each for section in parts for each in section.pictures):
            figure = each.draw(WIDE, alone=True)
            for suffix in (".svg", ".png"):
                _write_file(folder / f"{each.name}{suffix}", picture(figure, suffix, each.title))
        _write_file(folder / "report.md", markdown(about, parts).encode())
        _write_file(folder / "report.html", html(about, parts).encode())


def _write_file(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def main(argv: list[str] | None = None) -> int:
    config, named = command_line(ReportConfig, argv, "python -m bench.report", ABOUT, positional="FILE ...")
    runs, bad = [], 0
    for path in map(Path, named):
        try:
            runs.append(Run(path, results.read(path)))
        except ValueError as error:
            bad = 1
            print(f"{error}; skipped", file=sys.stderr)
    if not runs:
        what = "none of them can be read" if bad else "none was named"
        raise UserError(f"FILES: {what}; expected results files of `python -m bench`")
    if config.compare:
        print(compare.report(runs))
        return bad
    write(Path(config.out), runs)
    print(f"{_count(len(runs), 'results file')}: {Path(config.out, 'report.html')}, report.md beside it")
    return bad


if __name__ == "__main__":
    errors.run(main)
