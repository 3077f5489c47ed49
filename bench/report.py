"""Report results files: python -m bench.report FILES… --out=DIR. MFU across devices, as Markdown, HTML, SVG and PNG.

With --compare it compares two commits on one device: python -m bench.report --compare A.json B.json

`digest.py` computes the numbers, `tables.py` and `pictures.py` show them, `compare.py` compares two commits.
`page.html` is the page's template. The page is one file that needs no other.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import compare, pictures, results, tables
from bench.digest import Run, Steps, estimates, in_order
from bench.pictures import NARROW, WIDE, Picture
from bench.tables import NONE, Table, counted
from train import errors
from train.errors import UserError, one_line
from train.files import holds, making_folder, replacing
from train.plot import FONT, SCHEME, picture, svg_style
from train.settings import command_line, setting

ABOUT = "Report results files of `python -m bench`: MFU across devices; or two commits of one device, compared."
TITLE = "Model FLOPs utilisation, device by device"


@dataclass(frozen=True)
class ReportConfig:
    out: str = setting("report", "folder to write: report.md, report.html, and the pictures as SVG and PNG", path=True)
    compare: bool = setting(False, "compare two files, or the files of two commits, and print the verdicts instead")


@dataclass(frozen=True)
class Section:
    title: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    lists: Sequence[tuple[str, list[str]]] = ()  # heading, items


def sections(runs: Sequence[Run], guesses: Sequence[Steps]) -> list[Section]:
    """The report's sections that have contents, in order."""
    measured = [steps for run in runs for steps in run.steps]
    workloads: dict[str, list[Steps]] = {}
    for steps in (*measured, *guesses):
        workloads.setdefault(steps.name, []).append(steps)
    made = [
        Section("In short", tables=_present([tables.devices([*measured, *guesses])])),
        Section("MFU", [pictures.mfu(name, found) for name, found in workloads.items()]),
        Section("From the reference's step to ours", _present(map(pictures.waterfall, measured))),
        Section("Training steps", tables=list(map(tables.steps, measured))),
        Section("Kernels", _present(map(pictures.kernels, runs)), _present(map(tables.kernels, runs))),
        Section("Where the numbers come from", tables=[tables.files(runs)]),
        Section("What is missing", lists=[(r.file, lines) for r in runs if (lines := tables.missing(r))]),
    ]
    return [section for section in made if section.pictures or section.tables or section.lists]


def summary(runs: Sequence[Run], guesses: Sequence[Steps]) -> str:
    partial = sum(not run.results.complete for run in runs)
    line = f"{counted(len(runs), 'results file')} of {counted(len({run.device for run in runs}), 'device')}"
    line += f", {partial} of them partial." if partial else "."
    unmeasured = ", ".join(dict.fromkeys(guess.label for guess in guesses))
    return f"{line} What nobody measured is an estimate and marked as one: {unmeasured}." if unmeasured else line


def html(summary: str, sections: Sequence[Section]) -> str:
    import jinja2

    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(autoescape=True, **options)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    known = {"title": TITLE, "font": FONT, "scheme": SCHEME, "NONE": NONE, "inline": _inline, "svg_style": svg_style()}
    return template.render(summary=summary, sections=sections, widths=(WIDE, NARROW), **known)


def _inline(drawn: Picture, width: int) -> str:
    """The picture as an element of the page. Each width has its own name, because ids inside are derived from it."""
    import markupsafe

    svg = picture(drawn.draw(width), ".svg", f"{drawn.title}, {width} points").decode()
    return markupsafe.Markup(re.sub("<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL))


def markdown(summary: str, sections: Sequence[Section]) -> str:
    blocks = [f"# {TITLE}", _escaped(summary)]
    for section in sections:
        blocks.append(f"## {_escaped(section.title)}")
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


def _present(found: Iterable) -> list:
    return [each for each in found if each]


def write(folder: Path, runs: Sequence[Run]) -> None:
    """Write the report. UserError if `folder` cannot be written, or holds a file of that name that is no report."""
    for name in ("report.md", "report.html"):
        if os.path.lexists(folder / name) and not holds(folder / name, TITLE):
            raise UserError(f"out: {folder / name} is there, and is no report; name another folder")
    runs = in_order(runs)
    guesses = estimates(runs)
    about, parts = summary(runs, guesses), sections(runs, guesses)
    contents = {"report.md": markdown(about, parts).encode(), "report.html": html(about, parts).encode()}
    for each in (each for section in parts for each in section.pictures):
        for suffix in (".svg", ".png"):
            contents[each.name + suffix] = picture(each.draw(WIDE, alone=True), suffix, each.title)
    with making_folder(folder):
        for name, content in contents.items():
            with replacing(folder / name) as file:
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
    print(f"{counted(len(runs), 'results file')}: {one_line(Path(config.out, 'report.html'))}, report.md beside it")
    return bad


if __name__ == "__main__":
    errors.run(main)
