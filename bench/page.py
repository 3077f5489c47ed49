"""The report as one HTML page that needs nothing but itself (page.html is its template), and as Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.pictures import Picture
from train.plot import FONT, SCHEME, picture, printable, svg_style

TITLE = "Model FLOPs utilisation, device by device"
NONE = "–"

Cells = dict[str, str]  # by heading: "name", or "name, unit"


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    rows: Sequence[tuple[str, Cells]]  # kind ("ours", "computed", "missing" or none) and cells

    @property
    def headings(self) -> list[str]:
        return list(self.rows[0][1])

    @property
    def numbers(self) -> list[str]:
        """Headings of the columns that are set to the right."""
        return [heading for heading in self.headings if ", " in heading or heading in ("rate", "samples")]


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    lists: Sequence[tuple[str, list[str]]] = ()  # heading, items


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
    """The picture as an element of the page. Its name is another at each width: names inside are made of it."""
    import markupsafe

    svg = picture(drawn.draw(width), ".svg", f"{drawn.title}, {width} points").decode()
    return markupsafe.Markup(re.sub("<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL))


def markdown(summary: str, sections: Sequence[Section]) -> str:
    blocks = [f"# {TITLE}", _plain(summary)]
    for section in sections:
        blocks.append(f"## {_plain(section.title)}")
        blocks += [_plain(section.text)] if section.text else []
        for each in section.pictures:
            title = _plain(each.title)
            blocks += [f"### {title}", f"![{title}]({each.name}.svg)", _plain(each.caption)]
        for table in section.tables:
            rule = ["---:" if heading in table.numbers else "---" for heading in table.headings]
            rows = [[_plain(cell) for cell in cells.values()] for _, cells in table.rows]
            lines = [f"| {' | '.join(row)} |" for row in (table.headings, rule, *rows)]
            blocks += [f"### {_plain(table.title)}", "\n".join(lines), _plain(table.caption)]
        for heading, items in section.lists:
            blocks += [f"### {_plain(heading)}", "\n".join(f"- {_plain(item)}" for item in items)]
    return "\n\n".join(blocks) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    return re.sub(r"[\\`*|<\[]|\b_|_\b", r"\\\g<0>", text)  # a _ within a word is only that
