"""The report: what it shows is what the files hold, what is missing is said, and a bad file is refused in one line."""

import html
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex
from msgspec.structs import replace

from bench import bench_rows, report, results
from bench.digest import Run, estimates, in_order, slug
from bench.pictures import WIDE
from bench.results import Ceiling, Kernel, Step
from bench.rules import NO_TIME
from bench.tables import Table, missing, summary
from bench.variants import WORKLOADS
from tests.bench.made import MARKUP, all_devices, cpu, h100
from train.errors import UserError
from train.plot import LIGHT

COMMITTED = Path(__file__).parents[2] / "bench" / "results"
MADE = [Run(Path(name), each) for name, each in all_devices().items()]
RUNS = in_order(MADE)
SECTIONS = report.sections(RUNS, estimates(RUNS))
TABLES = {table.title: table for section in SECTIONS for table in section.tables}
PICTURES = {picture.name: picture for section in SECTIONS for picture in section.pictures}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of three devices, drawn once."""
    folder = tmp_path_factory.mktemp("report")
    report.write(folder, MADE)
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return (written / "report.html").read_text()


def close(cell: str, value: float) -> bool:
    """Whether the cell is the value to the digits that it shows."""
    shown = float(cell.replace(",", "").split()[0])
    places = len(cell.split()[0].partition(".")[2])
    return abs(shown - value) <= 0.5001 * 10.0**-places


def test_the_committed_report_says_what_the_code_makes_of_the_committed_files() -> None:
    """After a change that is meant: python -m bench.report bench/results/*.json --out=bench/results/report"""
    runs = in_order(Run(path, results.read(path)) for path in COMMITTED.glob("*.json"))
    guesses = estimates(runs)
    made = report.markdown(report.summary(runs, guesses), report.sections(runs, guesses))
    assert made == (COMMITTED / "report" / "report.md").read_text()


def test_every_number_of_a_step_is_the_files() -> None:
    file = h100()
    *rows, floor = (cells for _, cells in TABLES["gpt2 on H100 80GB HBM3"].rows)
    assert floor["step"] == "floor"
    fastest = min(median(step.seconds) for step in file.steps if step.variant.startswith("reference"))
    for step, row in zip(file.steps, rows, strict=True):
        assert (row["step"], row["dtype"], row["samples"]) == (step.variant, step.dtype, str(len(step.seconds)))
        seconds, ordered = median(step.seconds), sorted(step.seconds)
        assert close(row["median, ms"], 1e3 * seconds)
        assert close(row["p10, ms"], 1e3 * ordered[4])  # of 40
        assert close(row["p90, ms"], 1e3 * ordered[35])
        assert close(row["tokens, 1/s"], step.tokens / seconds)
        assert close(row["MFU, %"], 100 * step.flops["nanogpt"] / seconds / file.peak.flops)
        assert close(row["MFU 6N, %"], 100 * step.flops["6n"] / seconds / file.peak.flops)
        assert close(row["speed-up, ×"], fastest / seconds)
        assert close(row["memory, GB"], step.peak_memory / 1e9)
        assert close(row["host, %"], 100 * median(step.host_seconds) / seconds)
    failed = TABLES["gpt2 on A100-SXM4-80GB"].rows[2][1]
    assert failed["note"] == f"not measured: its losses are off by 3.1e-01 {MARKUP}"
    assert {failed[k] for k in ("median, ms", "MFU, %", "MFU 6N, %", "memory, GB", "speed-up, ×")} == {"–"}


def table_of(table: Table) -> list[list[str]]:
    return [table.headings, *(list(cells.values()) for _, cells in table.rows)]


def test_the_page_and_the_markdown_show_all_tables_and_pictures(written: Path, page: str) -> None:
    cells = [cell for table in TABLES.values() for _, cells in table.rows for cell in cells.items()]
    shown = re.findall(r'<td class="[^"]*" data-label="([^"]*)">(.*?)</td>', page, re.DOTALL)
    assert [(html.unescape(name), html.unescape(cell)) for name, cell in shown] == cells
    text = (written / "report.md").read_text()
    lines = [line for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE) if not set(line) <= set("-:| ")]
    shown = [re.sub(r"\\(.)", r"\1", cell) for line in lines for cell in re.split(r" (?<!\\)\| ", line)]
    assert shown == [cell for table in TABLES.values() for row in table_of(table) for cell in row]
    assert re.findall(r"!\[.*?\]\((.*?)\.svg\)", text) == re.findall(r'<figure id="(.*?)">', page) == list(PICTURES)
    assert sorted(PICTURES) == sorted(path.stem for path in written.glob("*.svg"))
    assert all((written / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    found = re.findall(r'<tr class="ours">\s*<td[^>]*data-label="step">(.*?)</td>', page)
    assert found == ["ours eager", "ours compiled + graphed", "ours compiled"]  # our fastest step stands out
    assert MARKUP not in page
    assert MARKUP not in text  # escaped
    assert slug("../<script>, x") == "..-script-x"


def test_what_is_missing_is_said(page: str) -> None:
    said = html.unescape(re.sub(r"<[a-z/].*?>", "\n", page, flags=re.DOTALL))
    for line in (
        "kernels failed: CUDA error: an illegal memory access was encountered",
        "2 of its tests failed: tests/train/test_gpu.py::test_one, test_two.",
        f"gpt2, ours graphed: not measured: its losses are off by 3.1e-01 {MARKUP}",
        "4 kernel rows of fused not measured: Triton's interpreter is no benchmark",
        "There is no kernel row.",
        "The run is partial",
        "It ran no tests.",
    ):
        assert line in said
    assert {row["file"]: (row["state"], row["commit"]) for _, row in TABLES["The files"].rows} == {
        "h100-2026-11-22.json": ("complete", "0123456789ab"),
        "a100-2026-11-20.json": ("partial", "fedcba987654 (changed)"),
        "cpu-2026-11-22.json": ("complete", "0123456789ab"),
    }


def test_estimates_are_of_what_nobody_measured() -> None:
    best = [row for _, row in TABLES["Our best step on each device"].rows]
    guesses = [row for row in best if row["our best step"] == "an estimate"]
    of_gpt2 = [row for row in guesses if row["workload"] == "gpt2"]
    devices = [row["device"] for row in of_gpt2]
    assert "H200" in devices
    assert not {"H100 80GB HBM3", "A100-SXM4-80GB"} & set(devices)  # they ran it
    assert ("shakespeare_char", "A100-SXM4-80GB") in [(row["workload"], row["device"]) for row in guesses]
    for row in guesses:
        assert float(row["floor, ms"].replace(",", "")) < float(row["median, ms"].replace(",", ""))
        assert 0 < float(row["MFU, %"]) < float(row["floor's MFU, %"])
    *measured, last = PICTURES["mfu-gpt2"].groups
    assert last.heading == "Not measured: attainable by the roofline, an estimate"
    assert [line.estimate for group in (*measured, last) for line in group.lines] == [False] * 9 + [True] * 4
    shown = [f"{row['MFU, %']} %, {row['median, ms']} ms, estimate" for row in of_gpt2]
    assert [(line.label, line.words) for line in last.lines] == list(zip(devices, shown, strict=True))
    floors = [row["floor's MFU, %"] for row in best if row["workload"] == "gpt2" and row not in guesses]
    assert [f"{group.floor:.1f}" for group in measured] == floors


@pytest.mark.parametrize("name", ["mfu-gpt2", "waterfall-gpt2-h100-2026-11-22"])
def test_bars_are_as_long_as_their_numbers(name: str, written: Path) -> None:
    every = [line for group in PICTURES[name].groups for line in group.lines]
    lines = [line for line in every if line.value is not None]
    axes = PICTURES[name].draw(WIDE).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([abs(x.value - x.start) for x in lines])
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([min(x.value, x.start) for x in lines])
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [line.estimate for line in lines]
    colours = [bar.get_edgecolor() if bar.get_hatch() else bar.get_facecolor() for bar in axes.patches]
    assert list(map(to_hex, colours)) == [LIGHT[line.role] for line in lines]
    words = [text.text for text in ElementTree.parse(written / f"{name}.svg").iter("{http://www.w3.org/2000/svg}text")]
    for found in ([line.label for line in every], [line.words for line in every]):
        assert [word for word in words if word in found] == found
    if name == "mfu-gpt2":
        assert {line.role for line in lines if line.label == "ours eager"} == {"ours"}
        floors = [group.floor for group in PICTURES[name].groups if group.floor]
        assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx(floors)


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


def test_the_waterfall_goes_from_the_reference_to_ours() -> None:
    at = {step.variant: 1e3 * median(step.seconds) for step in h100().steps}
    ladder = ["reference eager", "reference compiled", "flat state, no casts", "cross-entropy"]
    ladder += ["ours compiled", "ours compiled + graphed"]
    first, *changes, last = PICTURES["waterfall-gpt2-h100-2026-11-22"].groups[0].lines
    assert [line.label for line in changes] == [f"+ {name}" for name in ladder[1:]]
    assert (first.label, first.words) == (ladder[0], f"{at[ladder[0]]:.2f} ms")
    assert (last.label, last.words) == (f"{ladder[-1]}, in all", f"{at[ladder[-1]]:.2f} ms")
    for (before, after), change in zip(pairwise(ladder), changes, strict=True):
        assert (change.start, change.value) == pytest.approx((at[before], at[after]))
        assert change.words[0] == ("+" if at[after] > at[before] else "−")
        assert close(change.words[1:], abs(at[after] - at[before]))
    _, *changes, _ = PICTURES["waterfall-cpu-cpu-2026-11-22"].groups[0].lines
    modes = ["nanoGPT compiled", "reference autocast compiled", "ours compiled"]  # none takes back the one before it
    assert [line.label for line in changes] == [f"+ {mode}" for mode in modes]
    groups = PICTURES["mfu-cpu"].groups[0], PICTURES["mfu-gpt2"].groups[1]
    shown, others = ([line.label for line in group.lines] for group in groups)
    assert "reference autocast compiled" in shown  # plain torch is shown as the references are, though it is a rung
    assert "cross-entropy" not in others


def test_a_bad_file_is_named_and_skipped_and_a_report_goes_over_another_report_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    good, foreign, absent = (str(tmp_path / f"{name}.json") for name in ("good", "foreign", "absent"))
    results.write(Path(good), cpu())
    Path(foreign).write_text("[]")
    for names in ([foreign], []):
        with pytest.raises(UserError, match=r"FILES: none .*expected results files"):
            report.main([*names, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(report, "sections", lambda *given: [])  # pictures take long
    out = f"--out={tmp_path}"
    for mine in (tmp_path / "report.md", tmp_path / "report.html"):
        mine.write_text("my own")
        with pytest.raises(UserError, match=f"out: .*{mine.name} is there, and is no report; name another folder"):
            report.main([good, out])
        assert mine.read_text() == "my own"
        mine.unlink()
    capsys.readouterr()
    assert [report.main([good, out]), report.main([foreign, good, absent, out])] == [0, 1]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{foreign}: is no results file of nanofuse-bench, version 1: ")
    assert second == f"{absent}: cannot be read: No such file or directory; skipped"


def test_runs_of_one_device_are_told_apart() -> None:
    a, b, other = Run(Path("a.json"), h100()), Run(Path("b.json"), h100()), Run(Path("x/a.json"), h100())
    assert [run.label for run in in_order([b, a, b])] == ["H100 80GB HBM3, a.json", "H100 80GB HBM3, b.json"]
    assert [run.label for run in in_order([a, a])] == ["H100 80GB HBM3"]
    twice = in_order([a, other])
    assert len({run.suffix for run in twice}) == 2
    assert [run.label for run in twice] == ["H100 80GB HBM3, a.json", "H100 80GB HBM3, x/a.json"]


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


class Shown:
    """pytest-benchmark's fixture, as far as rows are given to it. samples: what its timer would show."""

    def __init__(self) -> None:
        self.extra_info, self.samples = {}, []

    def pedantic(self, target: Callable[[], object], setup: Callable[[], object], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            begin = bench_rows.timer()
            target()
            self.samples.append(bench_rows.timer() - begin)


def test_pytest_benchmark_shows_a_rows_samples_and_what_they_come_to() -> None:
    seconds = [0.06, 0.04, 0.05]
    step = WORKLOADS["gpt2"].row("ours graphed", seconds=seconds)
    step = replace(step, host_seconds=[3e-3, 1e-3, 2e-3], peak_memory=7)
    kernel = Kernel("toy", [8, 16], "bfloat16", "forward", "fused", seconds, flops=10**12)
    compiled = replace(kernel, variant="compiled", seconds=[0.1])
    ceilings = [Ceiling("matmul", "bfloat16", [80e12])]
    run = Run(Path(), replace(h100(), steps=[step], kernels=[kernel, compiled], ceilings=ceilings))
    shown = Shown()
    bench_rows.test_step(run.steps[0], step.variant, shown)
    assert (shown.samples, shown.group) == (seconds, "gpt2 step")
    n, tokens = 124_373_760 - 1024 * 768, 32 * 1024
    assert shown.extra_info == {
        "dtype": "bfloat16",
        "tokens_per_second": pytest.approx(tokens / 0.05),
        "mfu_nanogpt": pytest.approx((6 * n + 12 * 12 * 768 * 1024) * tokens / 0.05 / 989e12),
        "mfu_6n": pytest.approx(6 * n * tokens / 0.05 / 989e12),
        "peak_memory": 7,
        "host_seconds": 2e-3,
    }
    shown = Shown()
    bench_rows.test_kernel(run, "fused", shown)
    assert (shown.samples, shown.group) == (seconds, "toy 8x16 bfloat16 forward")
    assert shown.extra_info == {
        "shape": [8, 16],
        "dtype": "bfloat16",
        "bytes": None,
        "flops": 10**12,
        "bytes_per_second": None,
        "flops_per_second": pytest.approx(10**12 / 0.05),
        "share_of_ceiling": pytest.approx(10**12 / 0.05 / 80e12),
        "times_faster_than_compiled": pytest.approx(2.0),
    }


def test_the_terminal_is_shown_what_was_measured_and_what_was_not() -> None:
    late = [replace(row, seconds=[], skipped=NO_TIME) for row in h100().kernels if row.variant == "compiled"]
    steps = [replace(step, seconds=[]) if step.variant == "reference eager" else step for step in cpu().steps]
    made = replace(cpu(), kernels=[*cpu().kernels, *late], steps=steps)
    said = summary(made)
    assert not any(line.startswith("reference eager") for line in said.splitlines())
    at = {step.variant: median(step.seconds) for step in steps if step.seconds}
    (line,) = (line for line in said.splitlines() if line.startswith("ours compiled"))
    assert close(line.split()[3], 1e3 * at["ours compiled"])
    # not over plain torch in bfloat16, a rung, which nanoGPT does not do on a CPU
    assert f"{at['nanoGPT compiled'] / at['ours compiled']:.2f}" in line.split()
    assert said.endswith(
        "4 kernel rows of fused not measured: Triton's interpreter is no benchmark\n"
        f"4 kernel rows not measured: {NO_TIME}"
    )
    assert "linear_cross_entropy  32768×768×50304" in summary(h100())
    assert "There is no training step." in missing(Run(Path(), replace(made, steps=[])))
