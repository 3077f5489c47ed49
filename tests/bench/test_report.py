"""The report: what it shows is what the files hold, what is missing is said, and a bad file is refused in one line."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import report
from bench.results import Ceiling, Commit, Results, median
from tests.bench.made import all_devices, cpu, h100
from train.errors import UserError
from train.plot import LIGHT

VOID = {"meta", "link", "br", "img"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of three devices."""
    folder = tmp_path_factory.mktemp("report")
    assert report.main([*files(folder, all_devices()), f"--out={folder}"]) == 0
    return folder


def files(folder: Path, results: dict[str, Results]) -> list[str]:
    for name, each in results.items():
        results.write(folder / name, each)
    return [str(folder / name) for name in results]


class Page(HTMLParser):
    """What a page holds; AssertionError for tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[dict[str, str]] = []
        self.tables: dict[str, list[dict[str, str]]] = {}  # by title: rows, by heading
        self.addresses: list[str] = []
        self.title, self.label, self.texts = "", "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self.figures.append({"id": names["id"], "svg": ""})
        if tag == "h3":
            self.title = ""
        if tag == "table":
            self.tables[self.title] = []
        if tag == "tr" and "thead" not in self.open:
            self.tables[self.title].append({})
        if tag == "td":
            self.label = names["data-label"]
            self.tables[self.title][-1][self.label] = ""

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """<path/>, within a picture."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open:
            self.tables[self.title][-1][self.label] += data
        if "h3" in self.open:
            self.title += data
        if "figure" in self.open:
            part = next(tag for tag in reversed(self.open) if tag in ("h3", "svg", "figcaption", "figure"))
            self.figures[-1][part] = self.figures[-1].get(part, "") + data


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text())


def markdown_tables(text: str) -> dict[str, list[dict[str, str]]]:
    tables, title, heads = {}, "", None
    for line in text.splitlines():
        if line.startswith("### "):
            title, heads = unescaped(line[4:]), None
        elif line.startswith("| "):
            cells = [unescaped(cell) for cell in re.split(r"(?<!\\) ?\| ?", line)[1:-1]]
            if heads is None:
                heads, tables[title] = cells, []
            elif not set(cells[0]) <= set("-:"):
                tables[title].append(dict(zip(heads, cells, strict=True)))
    return tables


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def close(cell: str, value: float) -> bool:
    """Whether the cell is the value to the digits that it shows."""
    shown = float(cell.replace(",", "").split()[0])
    places = len(cell.split()[0].partition(".")[2])
    return abs(shown - value) <= 0.5001 * 10.0**-places


def words(path: Path) -> list[str]:
    """Of a picture, from the top down as they were drawn."""
    return [text.text for text in ElementTree.parse(path).getroot().iter(f"{SVG}text")]


def grid(path: Path) -> list[float]:
    """Where the rules of a picture's axis stand, in points."""
    paths = ElementTree.parse(path).getroot().iter(f"{SVG}path")
    rules = [element.get("d") for element in paths if f"stroke: {LIGHT['grid']}" in element.get("style", "")]
    return sorted(float(re.match(r"M (\S+)", rule)[1]) for rule in rules)


def bars(path: Path) -> list[tuple[str, float]]:
    """A picture's bars, from the top down: what paints them, and their width in points."""
    found = []
    for element in ElementTree.parse(path).getroot().iter(f"{SVG}path"):
        corners = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", element.get("d", ""))]
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        if corners and max(ys) - min(ys) == pytest.approx(14, abs=0.01) and element.get("d").count("L") == 3:
            fill = re.search(r"fill: (\S+?)(;|$)", element.get("style"))[1]
            found.append((fill, max(xs) - min(xs)))
    return found


def test_every_number_of_a_step_is_the_files(page: Page) -> None:
    checked = 0
    for results in all_devices().values():
        device = results.device.name.removeprefix("NVIDIA ") + (", 2 threads" if results.device.threads else "")
        for workload in dict.fromkeys(step.workload for step in results.steps):
            rows = page.tables[f"{workload} on {device}"]
            steps = [step for step in results.steps if step.workload == workload]
            assert [row["step"] for row in rows] == [*(step.variant for step in steps), "floor"]
            theirs = [s for s in steps if s.compares and s.variant.startswith(("reference", "nanoGPT"))]
            fastest = min(median(step.seconds) for step in theirs)
            for step, row in zip(steps, rows[:-1], strict=True):
                if not step.seconds:
                    assert row["note"] == f"not measured: {step.skipped}"
                    assert {row[k] for k in ("median, ms", "MFU, %", "MFU 6N, %", "memory, GB", "speed-up, ×")} == {"–"}
                    continue
                seconds, ordered = median(step.seconds), sorted(step.seconds)
                assert close(row["median, ms"], 1e3 * seconds)
                assert close(row["p10, ms"], 1e3 * ordered[4])  # of 40
                assert close(row["p90, ms"], 1e3 * ordered[35])
                assert close(row["tokens, 1/s"], step.tokens / seconds)
                assert close(row["MFU, %"], 100 * step.flops["nanogpt"] / seconds / results.peak.flops)
                assert close(row["MFU 6N, %"], 100 * step.flops["6n"] / seconds / results.peak.flops)
                assert close(row["speed-up, ×"], fastest / seconds)
                assert (row["samples"], row["dtype"]) == (str(len(step.seconds)), step.dtype)
                if step.peak_memory:
                    assert close(row["memory, GB"], step.peak_memory / 1e9)
                    assert close(row["host, %"], 100 * median(step.host_seconds) / seconds)
                checked += 1
    assert checked > 30


def test_every_number_of_a_kernel_is_the_files(page: Page) -> None:
    results = h100()
    rows = page.tables["Kernels on H100 80GB HBM3"]
    copy, matmul = max(results.ceilings[1].rates), max(results.ceilings[0].rates)
    compiled = {(k.case, k.direction): median(k.seconds) for k in results.kernels if k.variant == "compiled"}
    bounds = set()
    for kernel, row in zip(results.kernels, rows, strict=True):
        seconds = median(kernel.seconds)
        least = max(kernel.bytes / copy, (kernel.flops or 0) / matmul)
        by_flops = least > kernel.bytes / copy
        bounds.add(by_flops)
        assert (row["kernel"], row["direction"], row["variant"]) == (kernel.case, kernel.direction, kernel.variant)
        assert close(row["median, µs"], 1e6 * seconds)
        assert close(row["share, %"], 100 * least / seconds)
        assert close(row["rate"], kernel.flops / seconds / 1e12 if by_flops else kernel.bytes / seconds / 1e9)
        assert row["rate"].endswith("TFLOP/s" if by_flops else "GB/s")
        assert close(row["speed-up, ×"], compiled[kernel.case, kernel.direction] / seconds)
    assert bounds == {True, False}


def test_markdown_says_what_the_page_says(written: Path, page: Page) -> None:
    text = (written / "report.md").read_text()
    assert markdown_tables(text) == page.tables
    named = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(named) == sorted(path.name for path in written.glob("*.svg"))
    assert all((written / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG") for name in named)


def test_the_best_steps_are_in_short(page: Page) -> None:
    rows = {(row["workload"], row["device"]): row for row in page.tables["Our best step on each device"]}
    assert len(rows) == 4
    row = rows["gpt2", "A100-SXM4-80GB"]
    assert (row["our best step"], row["file"]) == ("ours compiled + graphed", "a100-2026-11-20.json (partial)")


def test_what_is_missing_is_said(page: Page) -> None:
    said = "\n".join(page.texts)
    for line in (
        "kernels failed: CUDA error: an illegal memory access was encountered",
        "2 of its tests failed: tests/train/test_gpu.py::test_one, <b>::test_two.",
        "gpt2, ours graphed: not measured: its losses are off by 3.1e-01, expected 2e-02 at most",
        "6 kernel rows of fused not measured: Triton's interpreter is no benchmark",
        "The run is partial",
    ):
        assert line in said
    assert {row["file"]: (row["state"], row["commit"]) for row in page.tables["The files"]} == {
        "h100-2026-11-22.json": ("complete", "0123456789ab"),
        "a100-2026-11-20.json": ("partial", "fedcba987654 (changed)"),
        "cpu-2026-11-22.json": ("complete", "0123456789ab"),
    }


def test_estimates_are_of_what_nobody_measured_marked_and_hatched(written: Path, page: Page) -> None:
    rows = page.tables["Devices that nobody measured"]
    found = {(row["workload"], row["device"]): row for row in rows}
    # the H100 ran both workloads, the A100 only gpt2
    assert ("gpt2", "H100 80GB HBM3") not in found
    assert ("gpt2", "A100-SXM4-80GB") not in found
    assert ("shakespeare_char", "A100-SXM4-80GB") in found
    assert ("gpt2", "H200") in found
    for row in rows:
        assert row["what it is"] == "estimate"
        assert float(row["floor, ms"].replace(",", "")) < float(row["attainable, ms"].replace(",", ""))
        assert 0 < float(row["MFU, %"]) < float(row["MFU at the floor, %"])
    picture = words(written / "mfu-gpt2.svg")
    start = picture.index("Not measured: attainable by the roofline, an estimate")
    names, values = (picture[start + offset :: 2][:4] for offset in (1, 2))
    assert names == [device for workload, device in found if workload == "gpt2"]
    assert values == [f"{found['gpt2', device]['MFU, %']} %, estimate" for device in names]
    # hatched are the estimates and nothing else: 5 and 6 steps were measured, on two devices
    painted = [fill for fill, _ in bars(written / "mfu-gpt2.svg")]
    assert [fill.startswith("url(#") for fill in painted] == [False] * 11 + [True] * 4


def test_bars_are_as_long_as_their_numbers(written: Path) -> None:
    values = [re.match(r"(\d+\.\d+) %", text) for text in words(written / "mfu-gpt2.svg")]
    shares = [float(value[1]) for value in values if value]
    lengths = [length for _, length in bars(written / "mfu-gpt2.svg")]
    assert len(lengths) == 15
    zero, ten, *_ = grid(written / "mfu-gpt2.svg")
    assert lengths == pytest.approx([share / 10 * (ten - zero) for share in shares], rel=0.01)
    colours = [fill for fill, _ in bars(written / "time-gpt2.svg")]
    expected = ["reference", "reference", "ours", *["rung"] * 5, "ours", "ours"]  # "ours graphed" has no bar
    assert colours[:10] == [LIGHT[role] for role in expected]


def test_figures_name_their_sources(written: Path, page: Page) -> None:
    kinds = {figure["id"].partition("-")[0] for figure in page.figures}
    assert kinds == {"mfu", "time", "waterfall", "memory", "kernels"}
    for figure in page.figures:
        assert figure["h3"].strip()
        assert re.search(r"\.json \(.+, commit \w+.*, 2026-11-2\d", figure["figcaption"])
        assert any(figure["h3"].startswith(text) for text in words(written / f"{figure['id']}.svg"))


def test_the_page_needs_nothing_but_itself(written: Path, page: Page) -> None:
    text = (written / "report.html").read_text()
    assert [address for address in page.addresses if not address.startswith("#")] == ["data:,"]
    assert not re.search(r"url\((?!#)|@import|<script|https?://(?!www\.w3\.org/(2000/svg|1999/xlink))", text)
    names = re.findall(r'\bid="(.+?)"', text)
    assert len(names) == len(set(names))  # or one picture would be painted with what another defines
    assert set(re.findall(r"(?:url\(|href=\")#(\w+)", text)) <= set(names)


def test_the_waterfall_goes_from_the_reference_to_ours(written: Path) -> None:
    at = {step.variant: 1e3 * median(step.seconds) for step in h100().steps if step.workload == "gpt2"}
    text = "\n".join(words(written / "waterfall-gpt2-h100-2026-11-22.svg"))
    ladder = [
        *("reference eager", "reference compiled", "flat state, no casts", "attention", "LayerNorm", "cross-entropy"),
        *("GELU", "ours compiled", "ours compiled + graphed"),
    ]
    assert f"reference eager\n{at['reference eager']:.2f} ms" in text
    assert f"ours compiled + graphed, in all\n{at[ladder[-1]]:.2f} ms" in text
    for before, after in pairwise(ladder):
        change = at[after] - at[before]
        found = re.search(rf"\+ {re.escape(after)}\n([+−])([\d.]+) ms", text)
        assert found[1] == ("+" if change > 0 else "−")
        assert close(found[2], abs(change))
    assert "+ ours eager" not in text


def test_plain_torch_is_shown_as_the_references_are_though_it_is_a_rung(written: Path) -> None:
    assert "reference autocast compiled" in words(written / "mfu-cpu.svg")
    assert "cross-entropy" not in words(written / "mfu-gpt2.svg")
    assert LIGHT["rung"] not in [fill for fill, _ in bars(written / "time-cpu.svg")]


def test_bad_files_are_named_and_the_others_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    still = replace(cpu(), ceilings=[Ceiling("copy", "float32", [])])
    still_too = replace(cpu(), steps=[replace(cpu().steps[0], seconds=[0.1, 0.0])])
    torn = replace(cpu(), steps=[replace(cpu().steps[0], seconds=[0.1, 0.1, 0.1], turn=2)])
    made = {"cpu.json": replace(cpu(), steps=[]), "still.json": still, "still2.json": still_too, "torn.json": torn}
    good, *bad = files(tmp_path, made)
    names = [str(tmp_path / "foreign.json"), good, *bad, str(tmp_path / "absent.json")]
    assert report.main([*names, f"--out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{tmp_path}/foreign.json: is not a results file: it has no format 'nanofuse-bench'; skipped",
        f"{tmp_path}/still.json: ceilings[0].rates: got none, expected one at least; skipped",
        f"{tmp_path}/still2.json: steps[0].seconds: got 0.0, expected more than 0; skipped",
        f"{tmp_path}/torn.json: steps[0].turn: got 2, expected a divisor of its 3 samples; skipped",
        f"{tmp_path}/absent.json: cannot be read: No such file or directory; skipped",
    ]
    assert "AMD EPYC 9B14" in (tmp_path / "out" / "report.md").read_text()


def test_without_a_good_file_there_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "foreign.json").write_text("[]")
    for names in ([str(tmp_path / "foreign.json")], []):
        with pytest.raises(UserError, match=r"FILES: none .*expected results files") as raised:
            report.main([*names, f"--out={tmp_path / 'out'}"])
        assert raised.value.status == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ["a.json", "b.json"]),
        ({"date": "2026-11-23T10:00:00+00:00"}, ["2026-11-22", "2026-11-23"]),
        ({"commit": Commit("feedbeefcafe", clean=True)}, ["0123456789ab", "feedbeefcafe"]),
    ],
)
def test_runs_of_one_device_are_told_apart(tmp_path: Path, change: dict[str, Any], told: list[str]) -> None:
    small = {"kernels": [], "steps": [step for step in h100().steps if step.workload == "gpt2"][:2]}
    names = files(tmp_path, {"a.json": replace(h100(), **small), "b.json": replace(h100(), **small, **change)})
    assert report.main([*names, names[0], f"--out={tmp_path}"]) == 0  # one is named twice
    page = Page((tmp_path / "report.html").read_text())
    assert [row["file"] for row in page.tables["The files"]] == ["a.json", "b.json"]
    assert [title for title in page.tables if title.startswith("gpt2 on H100")] == [
        f"gpt2 on H100 80GB HBM3, {word}" for word in told
    ]


def test_names_that_are_markup_or_paths_stay_words(tmp_path: Path) -> None:
    base = cpu()
    evil = "../<script>alert(1)</script>|`*$x$\x1b[31m"
    steps = [replace(step, workload=evil) for step in base.steps]
    named = replace(base, steps=steps, kernels=[], device=replace(base.device, name=evil))
    assert report.main([*files(tmp_path, {"x.json": named}), f"--out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    assert "<script>alert(1)</script>|`*$x$[31m" in "\n".join(Page(text).texts)
    assert {path.parent for path in tmp_path.rglob("*.svg")} == {tmp_path / "out"}
    assert all(words(path) for path in (tmp_path / "out").glob("*.svg"))


def test_an_empty_run_is_reported_as_such(tmp_path: Path) -> None:
    bare = replace(cpu(), peak=None, ceilings=[], kernels=[], steps=[], complete=False)
    assert report.main([*files(tmp_path, {"bare.json": bare}), f"--out={tmp_path}"]) == 0
    said = "\n".join(Page((tmp_path / "report.html").read_text()).texts)
    for line in ("There is no peak, so no MFU.", "There is no training step.", "There is no kernel row."):
        assert line in said


def test_a_step_without_peak_or_shape_still_has_its_times(tmp_path: Path) -> None:
    base = cpu()
    steps = [replace(step, shape={}, flops={}) for step in base.steps]
    bare = replace(base, peak=None, steps=steps, kernels=[])
    assert report.main([*files(tmp_path, {"x.json": bare}), f"--out={tmp_path}"]) == 0
    rows = Page((tmp_path / "report.html").read_text()).tables["cpu on AMD EPYC 9B14, 2 threads"]
    assert len(rows) == len(steps)  # no floor among them
    assert {row["MFU, %"] for row in rows} == {"–"}
    assert close(rows[0]["median, ms"], 1e3 * median(steps[0].seconds))
    assert words(tmp_path / "mfu-cpu.svg").count("no MFU: the file names no peak") == len(steps)
