"""The report as one HTML page that needs nothing but itself, and as Markdown. Both say the same."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.figures import Figure
from bench.report.layout import NARROW, WIDE
from bench.report.scene import FONT, STYLE, escaped, inline_svg, schemes
from bench.report.tables import NONE, Table

TITLE = "Model FLOPs utilisation, device by device"


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    lists: Sequence[tuple[str, list[str]]] = ()  # heading, items


CSS = f"""
:root{{color-scheme:light dark}}
{schemes(":root")}
{STYLE}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 {FONT};text-size-adjust:100%}}
main{{max-width:1080px;margin:0 auto;padding:56px 40px 80px;overflow-wrap:break-word}}
h1{{font-size:30px;line-height:1.2;letter-spacing:-.015em;margin:0 0 12px}}
h2{{font-size:21px;letter-spacing:-.01em;margin:64px 0 8px;padding-top:20px;border-top:1px solid var(--grid)}}
figcaption,.source,li{{overflow-wrap:anywhere}}
h3{{font-size:16px;margin:36px 0 10px}}
p,li{{max-width:70ch}}
ul{{padding-left:1.2em;margin:8px 0}}
.lead{{font-size:18px;margin:0 0 6px}}
figure{{margin:32px 0 44px;break-inside:avoid}}
figure h3{{margin:0 0 12px}}
figure svg{{display:block;max-width:100%;height:auto}}
figcaption,.source{{color:var(--quiet);font-size:13px;line-height:1.5;margin:10px 0 0;max-width:90ch}}
.narrow{{display:none!important}}
table{{border-collapse:collapse;width:100%;font-size:13px;line-height:1.4;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;vertical-align:baseline;padding:5px 10px 5px 0;border-bottom:1px solid var(--grid)}}
td:not(.n){{overflow-wrap:anywhere;min-width:6.2em}}
td:first-child{{min-width:11em!important}}
th:last-child,td:last-child{{padding-right:0}}
th{{color:var(--quiet);font-weight:500;vertical-align:bottom}}
th span{{display:block;font-weight:400}}
.n{{text-align:right;white-space:nowrap}}
.ours td{{font-weight:600}}
.ours td:first-child{{color:var(--ours)}}
.computed td,.missing td{{color:var(--quiet)}}
.computed td{{font-style:italic}}
@media screen and (max-width:1080px){{
main{{padding:32px 24px 56px}}
h1{{font-size:25px}}
thead{{display:none}}
tr{{display:grid;grid-template-columns:1fr 1fr;gap:0 28px;padding:10px 0;border-bottom:1px solid var(--grid)}}
td{{display:flex;justify-content:space-between;gap:8px;border:0;padding:1px 0;text-align:right}}
td,td:not(.n),td:first-child{{min-width:0!important}}
td{{grid-column:1/-1;overflow-wrap:anywhere}}
td.n{{grid-column:auto}}
td::before{{content:attr(data-label);color:var(--quiet);font-weight:400;font-style:normal;text-align:left;white-space:normal;overflow-wrap:normal}}
td:first-child{{font-weight:600;justify-content:flex-start;text-align:left;white-space:normal}}
td:first-child::before,td.none{{display:none}}
}}
@media screen and (max-width:820px){{
.wide{{display:none!important}}
.narrow{{display:block!important;width:100%;max-width:520px}}
}}
@media print{{
@page{{margin:14mm}}
:root{{--paper:#fff}}
body{{font-size:10.5pt}}
main{{max-width:none;padding:0}}
table{{font-size:7.5pt}}
th,td{{padding:2px 6px 2px 0}}
tr,h2,h3{{break-inside:avoid}}
h2,h3{{break-after:avoid}}
thead{{display:table-header-group}}
}}
""".replace("\n", "")


def html(summary: Sequence[str], sections: Sequence[Section]) -> str:
    lead = "".join(f'<p class="lead">{escaped(line)}</p>' for line in summary)
    body = "".join(map(_section, sections))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{TITLE}</title><link rel="icon" href="data:,"><style>{CSS}</style></head>'
        f"<body><main><h1>{TITLE}</h1>{lead}{body}</main></body></html>\n"
    )


def _section(section: Section) -> str:
    text = f"<p>{escaped(section.text)}</p>" if section.text else ""
    lists = "".join(
        f"<h3>{escaped(heading)}</h3><ul>{''.join(f'<li>{escaped(item)}</li>' for item in items)}</ul>"
        for heading, items in section.lists
    )
    inner = "".join([*map(_figure, section.figures), *map(_table, section.tables)])
    return f"<section><h2>{escaped(section.title)}</h2>{text}{inner}{lists}</section>"


def _figure(figure: Figure) -> str:
    pictures = inline_svg(figure.draw(WIDE), "wide") + inline_svg(figure.draw(NARROW), "narrow")
    caption = f"<figcaption>{escaped(figure.caption)}</figcaption>"
    return f'<figure id="{escaped(figure.name)}"><h3>{escaped(figure.title)}</h3>{pictures}{caption}</figure>'


def _table(table: Table) -> str:
    heads = "".join(
        f"<th{' class=n' * c.right}>{escaped(c.name)}{f'<span>{escaped(c.unit)}</span>' if c.unit else ''}</th>"
        for c in table.columns
    )
    kinds = table.kinds or [""] * len(table.rows)
    rows = "".join(
        f"<tr{f' class={kind}' if kind else ''}>{_cells(table, row)}</tr>"
        for kind, row in zip(kinds, table.rows, strict=True)
    )
    caption = f'<p class="source">{escaped(table.caption)}</p>'
    return (
        f"<h3>{escaped(table.title)}</h3><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{caption}"
    )


def _cells(table: Table, row: list[str]) -> str:
    cells = []
    for column, cell in zip(table.columns, row, strict=True):
        classes = ["n"] * column.right + ["none"] * (cell in ("", NONE))
        shown = f' class="{" ".join(classes)}"' if classes else ""
        cells.append(f'<td{shown} data-label="{escaped(column.heading)}">{escaped(cell)}</td>')
    return "".join(cells)


def markdown(summary: Sequence[str], sections: Sequence[Section]) -> str:
    blocks = [f"# {TITLE}", *map(_plain, summary)]
    for section in sections:
        blocks.append(f"## {_plain(section.title)}")
        blocks += [_plain(section.text)] if section.text else []
        for figure in section.figures:
            title = _plain(figure.title)
            blocks += [f"### {title}", f"![{title}]({figure.name}.svg)", _plain(figure.caption)]
        for table in section.tables:
            blocks += [f"### {_plain(table.title)}", markdown_table(table), _plain(table.caption)]
        for heading, items in section.lists:
            blocks += [f"### {_plain(heading)}", "\n".join(f"- {_plain(item)}" for item in items)]
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: Table) -> str:
    heads = [[c.heading for c in table.columns], ["---:" if c.right else "---" for c in table.columns]]
    rows = [heads[0], heads[1], *table.rows]
    return "\n".join(f"| {' | '.join(cell if row is heads[1] else _plain(cell) for cell in row)} |" for row in rows)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    return re.sub(r"[\\`*|<\[]|\b_|_\b", r"\\\g<0>", text)  # a _ within a word is only that
