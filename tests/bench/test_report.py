"""The report: what it shows is what the files hold, what is missing is said, and a bad file is refused in one line."""

import contextlib
import html
import io
import re
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from bench import report, results
from bench.digest import Run, in_order
from bench.results import Ceiling, Kernel, Results, Step
from bench.rules import NO_TIME
from bench.tables import missing, summary
from tests.bench.made import all_devices, cpu, h100
from train.errors import UserError
from train.plot import LIGHT

SVG = "{http://www.w3.org/2000/svg}"
WATERFALL = "waterfall-gpt2-h100-2026-11-22.svg"

Tables = dict[str, list[dict[str, str]]]  # by title: rows, by heading


def files(folder: Path, made: dict[str, Results]) -> list[str]:
    for name, each in made.items():
        results.write(folder / name, each)
    return [str(folder / name) for name in made]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of three devices, and what was said of two files that are none: drawn once."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "foreign.json").write_text('{"a": 1}')
    named = [str(folder / "foreign.json"), *files(folder, all_devices()), str(folder / "absent.json")]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert report.main([*named, f"--out={folder}"]) == 1
    (folder / "said.txt").write_text(said.getvalue())
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return (written / "report.html").read_text()


@pytest.fixture(scope="module")
def tables(written: Path) -> Tables:
    return tables_of(written)


def tables_of(folder: Path) -> Tables:
    """The report's, out of its Markdown."""
    tables, title, heads = {}, "", None
    for line in (folder / "report.md").read_text().splitlines():
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


def words_of(page: str) -> str:
    return html.unescape(re.sub(r"<.*?>", "\n", page, flags=re.DOTALL))


def close(cell: str, value: float) -> bool:
    """Whether the cell is the value to the digits that it shows."""
    shown = float(cell.replace(",", "").split()[0])
    places = len(cell.split()[0].partition(".")[2])
    return abs(shown - value) <= 0.5001 * 10.0**-places


def words(path: Path) -> list[str]:
    """Of a picture: the axis, names of bars from the top down, then the words beside them from the top down."""
    return [text.text for text in ElementTree.parse(path).getroot().iter(f"{SVG}text")]


def bars(path: Path) -> list[tuple[str, float]]:
    """A picture's bars, from the top down: what paints them, and their width in points."""
    found = []
    for element in ElementTree.parse(path).getroot().iter(f"{SVG}path"):
        corners = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", element.get("d", ""))]
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        fill = re.search(r"fill: (\S+?)(;|$)", element.get("style", ""))
        if len(corners) == 4 and 10 < max(ys) - min(ys) < 18 and fill[1] not in ("none", LIGHT["paper"]):
            found.append((fill[1], max(xs) - min(xs)))
    return found


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("h100-2026-11-22.json", "gpt2 on H100 80GB HBM3"),
        ("a100-2026-11-20.json", "gpt2 on A100-SXM4-80GB"),
        ("cpu-2026-11-22.json", "cpu on AMD EPYC 9B14, 2 threads"),
    ],
)
def test_every_number_of_a_step_is_the_files(tables: Tables, name: str, title: str) -> None:
    file, (*rows, floor) = all_devices()[name], tables[title]
    assert floor["step"] == "floor"
    theirs = [s for s in file.steps if s.compares and s.variant.startswith(("reference", "nanoGPT"))]
    fastest = min(median(step.seconds) for step in theirs)
    for step, row in zip(file.steps, rows, strict=True):
        assert (row["step"], row["dtype"], row["samples"]) == (step.variant, step.dtype, str(len(step.seconds)))
        if not step.seconds:
            assert row["note"] == f"not measured: {step.skipped}"
            assert {row[k] for k in ("median, ms", "MFU, %", "MFU 6N, %", "memory, GB", "speed-up, ×")} == {"–"}
            continue
        seconds, ordered = median(step.seconds), sorted(step.seconds)
        assert close(row["median, ms"], 1e3 * seconds)
        assert close(row["p10, ms"], 1e3 * ordered[4])  # of 40
        assert close(row["p90, ms"], 1e3 * ordered[35])
        assert close(row["tokens, 1/s"], step.tokens / seconds)
        assert close(row["MFU, %"], 100 * step.flops["nanogpt"] / seconds / file.peak.flops)
        assert close(row["MFU 6N, %"], 100 * step.flops["6n"] / seconds / file.peak.flops)
        assert close(row["speed-up, ×"], fastest / seconds)
        if step.peak_memory:
            assert close(row["memory, GB"], step.peak_memory / 1e9)
            assert close(row["host, %"], 100 * median(step.host_seconds) / seconds)


def test_every_number_of_a_kernel_is_the_files(tables: Tables) -> None:
    file = h100()
    copy, matmul = max(file.ceilings[1].rates), max(file.ceilings[0].rates)
    compiled = {(k.case, k.direction): median(k.seconds) for k in file.kernels if k.variant == "compiled"}
    for kernel, row in zip(file.kernels, tables["Kernels on H100 80GB HBM3"], strict=True):
        seconds = median(kernel.seconds)
        assert (row["kernel"], row["direction"], row["variant"]) == (kernel.case, kernel.direction, kernel.variant)
        assert close(row["median, µs"], 1e6 * seconds)
        if kernel.flops:  # the matmul rate bounds it, the copy rate the others
            assert row["rate"].endswith(" TFLOP/s")
            assert close(row["rate"], kernel.flops / seconds / 1e12)
            assert close(row["share, %"], 100 * kernel.flops / matmul / seconds)
        else:
            assert row["rate"].endswith(" GB/s")
            assert close(row["rate"], kernel.bytes / seconds / 1e9)
            assert close(row["share, %"], 100 * kernel.bytes / copy / seconds)
        assert close(row["speed-up, ×"], compiled[kernel.case, kernel.direction] / seconds)


def test_the_page_and_the_markdown_show_the_same(written: Path, page: str, tables: Tables) -> None:
    cells = re.findall(r'<td class="[^"]*" data-label="([^"]*)">(.*?)</td>', page, re.DOTALL)
    shown = [cell for rows in tables.values() for row in rows for cell in row.items()]
    assert [(html.unescape(name), html.unescape(cell)) for name, cell in cells] == shown
    named = re.findall(r"!\[.*?\]\((.*?)\)", (written / "report.md").read_text())
    assert named == [f"{name}.svg" for name in re.findall(r'<figure id="(.*?)">', page)]
    assert sorted(named) == sorted(path.name for path in written.glob("*.svg"))
    assert {name.partition("-")[0] for name in named} == {"mfu", "waterfall", "kernels"}
    assert all((written / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG") for name in named)


def test_what_is_missing_is_said(written: Path, page: str, tables: Tables) -> None:
    said = words_of(page)
    for line in (
        "kernels failed: CUDA error: an illegal memory access was encountered",
        "2 of its tests failed: tests/train/test_gpu.py::test_one, <b>::test_two.",
        "gpt2, ours graphed: not measured: its losses are off by 3.1e-01, expected 2e-02 at most",
        "4 kernel rows of fused not measured: Triton's interpreter is no benchmark",
        "There is no kernel row.",
        "The run is partial",
    ):
        assert line in said
    assert {row["file"]: (row["state"], row["commit"]) for row in tables["The files"]} == {
        "h100-2026-11-22.json": ("complete", "0123456789ab"),
        "a100-2026-11-20.json": ("partial", "fedcba987654 (changed)"),
        "cpu-2026-11-22.json": ("complete", "0123456789ab"),
    }
    assert (written / "said.txt").read_text().splitlines() == [
        f"{written}/foreign.json: is no results file of nanofuse-bench, version 1: got format '', version 0; skipped",
        f"{written}/absent.json: cannot be read: No such file or directory; skipped",
    ]


def test_estimates_are_of_what_nobody_measured_marked_and_hatched(written: Path, tables: Tables) -> None:
    best = tables["Our best step on each device"]
    guesses = [row for row in best if row["our best step"] == "an estimate"]
    devices = [row["device"] for row in guesses if row["workload"] == "gpt2"]
    assert "H200" in devices
    assert not {"H100 80GB HBM3", "A100-SXM4-80GB"} & set(devices)  # they ran it
    assert ("shakespeare_char", "A100-SXM4-80GB") in [(row["workload"], row["device"]) for row in guesses]
    for row in guesses:
        assert float(row["floor, ms"].replace(",", "")) < float(row["median, ms"].replace(",", ""))
        assert 0 < float(row["MFU, %"]) < float(row["floor's MFU, %"])
    picture = words(written / "mfu-gpt2.svg")
    floors = [row["floor's MFU, %"] for row in best if row not in guesses and row["workload"] == "gpt2"]
    assert [said for said in picture if "floor" in said] == [f"floor {floor} %, computed" for floor in floors]
    assert [name for name in picture if name in devices] == devices
    shown = [f"{row['MFU, %']} %, {row['median, ms']} ms, estimate" for row in guesses if row["workload"] == "gpt2"]
    assert [said for said in picture if "estimate" in said and "%" in said] == shown


def test_bars_are_as_long_as_their_numbers(written: Path) -> None:
    values = [re.match(r"(\d+\.\d+) %, ", text) for text in words(written / "mfu-gpt2.svg")]
    shares = [float(value[1]) for value in values if value]
    paints, lengths = zip(*bars(written / "mfu-gpt2.svg"), strict=True)
    assert lengths == pytest.approx([share * lengths[0] / shares[0] for share in shares], rel=0.01)
    measured = ["reference", "ours"] + ["reference"] * 2 + ["ours"] * 4  # of two devices
    assert list(paints[:8]) == [LIGHT[role] for role in measured]
    assert [paint.startswith("url(#") for paint in paints[8:]] == [True] * 4  # hatched: the estimates


def test_our_fastest_step_stands_out(page: str) -> None:
    found = re.findall(r'<tr class="ours">\s*<td[^>]*data-label="step">(.*?)</td>', page)
    assert found == ["ours eager", "ours compiled + graphed", "ours compiled"]


def test_the_page_needs_nothing_but_itself_and_its_figures_name_their_sources(page: str) -> None:
    addresses = re.findall(r'\b(?:src|href|srcset|data|action)="(.*?)"', page)
    assert [address for address in addresses if not address.startswith("#")] == ["data:,"]
    assert not re.search(r"url\((?!#)|@import|<script|https?://(?!www\.w3\.org/(2000/svg|1999/xlink))", page)
    names = re.findall(r'\bid="(.+?)"', page)
    assert len(names) == len(set(names))  # or one picture would be painted with what another defines
    assert set(re.findall(r"(?:url\(|href=\")#(\w+)", page)) <= set(names)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    sources = [re.search(r"\.json \(.+, commit \w+.*, 2026-11-2\d", caption) for caption in captions]
    assert sources.count(None) == 1  # the workload that nobody measured


def test_the_waterfall_goes_from_the_reference_to_ours(written: Path) -> None:
    at = {step.variant: 1e3 * median(step.seconds) for step in h100().steps}
    ladder = [
        *("reference eager", "reference compiled", "flat state, no casts", "cross-entropy"),
        *("ours compiled", "ours compiled + graphed"),
    ]
    shown = words(written / WATERFALL)
    names = shown[shown.index("reference eager") :]
    assert names[:7] == [ladder[0], *(f"+ {name}" for name in ladder[1:]), f"{ladder[-1]}, in all"]
    first, *changes, last = names[7:14]
    assert (first, last) == (f"{at[ladder[0]]:.2f} ms", f"{at[ladder[-1]]:.2f} ms")
    for (before, after), change in zip(pairwise(ladder), changes, strict=True):
        assert change[0] == ("+" if at[after] > at[before] else "−")
        assert close(change[1:], abs(at[after] - at[before]))
    changed = [abs(at[after] - at[before]) for before, after in pairwise(ladder)]
    whole, *lengths = (length for _, length in bars(written / WATERFALL))
    expected = [whole * size / at[ladder[0]] for size in (*changed, at[ladder[-1]])]
    assert lengths == pytest.approx(expected, abs=1.0)  # points


def test_plain_torch_is_shown_as_the_references_are_though_it_is_a_rung(written: Path) -> None:
    assert "reference autocast compiled" in words(written / "mfu-cpu.svg")
    assert "cross-entropy" not in words(written / "mfu-gpt2.svg")


def test_without_a_good_file_there_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "foreign.json").write_text("[]")
    for names in ([str(tmp_path / "foreign.json")], []):
        with pytest.raises(UserError, match=r"FILES: none .*expected results files") as raised:
            report.main([*names, f"--out={tmp_path / 'out'}"])
        assert raised.value.status == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_report_goes_over_another_report_only(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "sections", lambda *given: [])  # pictures take long
    named = [*files(tmp_path, {"x.json": cpu()}), f"--out={tmp_path}"]
    (tmp_path / name).write_text("my own")
    with pytest.raises(UserError, match=f"out: .*{name} is there, and is no report; name another folder"):
        report.main(named)
    assert (tmp_path / name).read_text() == "my own"
    (tmp_path / name).unlink()
    assert [report.main(named) for _ in range(2)] == [0, 0]


def test_runs_of_one_device_are_told_apart() -> None:
    a, b, other = Run(Path("a.json"), h100()), Run(Path("b.json"), h100()), Run(Path("x/a.json"), h100())
    assert [run.label for run in in_order([b, a, b])] == ["H100 80GB HBM3, a.json", "H100 80GB HBM3, b.json"]
    assert [run.label for run in in_order([a, a])] == ["H100 80GB HBM3"]
    twice = in_order([a, other])
    assert [run.label for run in twice] == ["H100 80GB HBM3, a.json", "H100 80GB HBM3, x/a.json"]
    assert len({run.suffix for run in twice}) == 2


def test_names_that_are_markup_or_paths_stay_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "estimates", lambda runs: [])  # their pictures take long
    base = cpu()
    evil = "../<script>alert(1)</script>|`*$x$\x1b[31m"
    steps = [replace(step, workload=evil) for step in base.steps[-2:]]
    named = replace(base, steps=steps, kernels=[], device=replace(base.device, name=evil))
    assert report.main([*files(tmp_path, {"x.json": named}), f"--out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    assert r"<script>alert(1)</script>|`*$x$\x1b[31m" in words_of(text)
    row = tables_of(tmp_path / "out")["Our best step on each device"][0]
    assert row["workload"] == r"../<script>alert(1)</script>|`*$x$\x1b[31m"
    assert {path.parent for path in tmp_path.rglob("*.svg")} == {tmp_path / "out"}
    assert all(words(path) for path in (tmp_path / "out").glob("*.svg"))


def test_a_speed_up_is_over_the_reference_of_the_same_rounds() -> None:
    """In the second group of variants the machine was half as fast."""

    def row(variant: str, seconds: list[float], first_round: int = 0, turn: int = 1) -> Step:
        return replace(cpu().steps[0], variant=variant, seconds=seconds, turn=turn, first_round=first_round)

    control = row("reference compiled", [1.0] * 20 + [2.0] * 20, turn=2)
    ours = row("ours eager", [0.5] * 10), row("ours compiled", [0.5] * 30, first_round=10, turn=3)
    (found,) = Run(Path("a.json"), replace(cpu(), steps=[control, *ours])).steps
    assert [found.speedup(row) for row in found.rows] == [1.0, 2.0, 4.0]


def test_a_kernel_is_bounded_by_what_it_meets_first() -> None:
    def bound(matmul: float | None, copy: float | None, **fields: Any) -> tuple:
        kernel = Kernel("toy", [8, 16], "float32", "forward", "fused", [2e-3, 1e-3, 1e-3], **fields)
        rates = [("matmul", "float32", matmul), ("copy", "float32", copy)]
        ceilings = [Ceiling(what, dtype, [rate]) for what, dtype, rate in rates if rate]
        (found,) = Run(Path(), replace(cpu(), ceilings=ceilings, kernels=[kernel])).kernels
        return found.bounded, found.rate, found.share

    assert bound(1e12, 2e12, bytes=10**9) == ("copy", 1e12, 0.5)
    assert bound(4e12, 2e12, flops=10**9, bytes=10**6) == ("matmul", 1e12, 0.25)
    assert bound(4e12, 1e9, flops=10**9, bytes=10**6) == ("copy", 1e9, 1.0)  # its bytes take longer
    assert bound(None, None, flops=10**9, bytes=10**6) == ("matmul", 1e12, None)
    assert bound(4e12, 2e12) == ("", None, None)


def test_the_terminal_is_shown_what_was_measured_and_what_was_not() -> None:
    late = [replace(row, seconds=[], skipped=NO_TIME) for row in h100().kernels if row.variant == "compiled"]
    steps = [replace(step, seconds=[]) if step.variant == "reference eager" else step for step in cpu().steps]
    made = replace(cpu(), kernels=[*cpu().kernels, *late], steps=steps)
    said = summary(made)
    assert not any(line.startswith("reference eager") for line in said.splitlines())
    ours = next(step for step in made.steps if step.variant == "ours compiled")
    theirs = next(step for step in made.steps if step.variant == "nanoGPT compiled")
    (line,) = (line for line in said.splitlines() if line.startswith("ours compiled"))
    assert close(line.split()[3], 1e3 * median(ours.seconds))
    # not over plain torch in bfloat16, a rung, which nanoGPT does not do on a CPU
    assert f"{median(theirs.seconds) / median(ours.seconds):.2f}" in line.split()
    assert said.endswith(
        "4 kernel rows of fused not measured: Triton's interpreter is no benchmark\n"
        f"4 kernel rows not measured: {NO_TIME}"
    )
    assert "There is no training step." in missing(Run(Path(), replace(made, steps=[])))
