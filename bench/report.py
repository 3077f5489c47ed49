"""Report results files: python -m bench.report FILES… --out=DIR. MFU across devices, as Markdown, HTML, SVG and PNG.

With --compare, two commits of one device instead: python -m bench.report --compare A.json B.json

`digest.py` computes what is shown, `pictures.py` draws, `page.py` writes, `compare.py` judges two commits.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import compare, page, pictures, tables
from bench.digest import ATTAINED, Estimate, KernelRow, Run, StepRow, Workload, estimates, in_order, labels, read
from bench.page import NONE, Cells, Section, Table
from bench.pictures import WIDE, slug, sources
from train import errors
from train.errors import UserError
from train.files import making_folder, replacing
from train.metrics import tokens_per_second
from train.plot import picture
from train.settings import command_line, setting

ABOUT = "Report results files of `python -m bench`: MFU across devices; or two commits of one device, compared."
Found = Sequence[tuple[str, Run, Workload]]  # what to call the run, the run, its workload


@dataclass(frozen=True)
class ReportConfig:
    out: str = setting("report", "folder to write: report.md, report.html, and the pictures as SVG and PNG")
    compare: bool = setting(False, "compare two files, or the files of two commits, and print the verdicts instead")


def shown(value: float | None, times: float = 1, form: str = "") -> str:
    """A cell with the value times `times`: in that format, or to four digits; a dash where there is none."""
    if value is None:
        return NONE
    return format(times * value, form) if form else tables.number(times * value)


def sections(runs: Sequence[Run], guesses: Sequence[Estimate]) -> list[Section]:
    """All of it, in its order."""
    called, suffixes = labels(runs), _suffixes(runs)
    every = [(called[run.path], run, workload) for run in runs for workload in run.workloads]
    names = dict.fromkeys([*(workload.name for _, _, workload in every), *(one.workload for one in guesses)])
    found = {name: [entry for entry in every if entry[2].name == name] for name in names}
    measured = {name: rows for name, rows in found.items() if rows}
    in_turn = [entry for rows in measured.values() for entry in rows]
    made = [
        Section("In short", tables=_some([best(in_turn)])),
        Section(
            "MFU",
            "The share of a device's dense peak that a training step turns into the model's own FLOPs.",
            [pictures.mfu(name, found[name], [one for one in guesses if one.workload == name]) for name in names],
        ),
        Section(
            "Training steps",
            pictures=[pictures.time(name, rows) for name, rows in measured.items()],
            tables=[steps(*entry) for entry in in_turn],
        ),
        Section(
            "From the reference's step to ours",
            pictures=_some(pictures.waterfall(label, r, w, suffixes[r.path]) for label, r, w in in_turn),
        ),
        Section("Memory", pictures=_some(pictures.memory(name, rows) for name, rows in measured.items())),
        Section(
            "Kernels",
            pictures=_some(pictures.kernels(called[r.path], r, suffixes[r.path]) for r in runs),
            tables=[kernels(called[r.path], r) for r in runs if r.kernels],
        ),
        Section("Estimates", tables=[estimated(guesses)] if guesses else []),
        Section("Where the numbers come from", tables=[files(runs)]),
        Section("What is missing", lists=[(r.path.name, lines) for r in runs if (lines := missing(r))]),
    ]
    return [section for section in made if section.pictures or section.tables or section.lists]


def summary(runs: Sequence[Run], guesses: Sequence[Estimate]) -> str:
    partial = sum(not run.results.complete for run in runs)
    line = f"{_count(len(runs), 'results file')} of {_count(len({run.device for run in runs}), 'device')}"
    line += f", {partial} of them partial." if partial else "."
    unmeasured = ", ".join(dict.fromkeys(one.device for one in guesses))
    return f"{line} What nobody measured is an estimate and marked as one: {unmeasured}." if unmeasured else line


def best(found: Found) -> Table | None:
    """Our fastest step of every workload of every run, beside the reference's and the floor."""
    rows, references = [], []
    for label, run, workload in found:
        ours, baseline = workload.best, workload.baseline
        if ours is None:
            continue
        references += [baseline.step.variant] if baseline else []
        cells = {
            "workload": workload.name,
            "device": label,
            "our best step": ours.step.variant,
            "median, ms": shown(ours.seconds, 1e3),
            **_mfu_cells(ours),
            "floor's MFU, %": shown(workload.floor_mfu(), 100, ".1f"),
            "reference, ms": shown(baseline and baseline.seconds, 1e3),
            "speed-up, ×": shown(ours.speedup, form=".2f"),
            "file": run.path.name + " (partial)" * (not run.results.complete),
        }
        rows.append(("", cells))
    caption = "MFU counts (6N + 12LHQT) FLOPs a token, MFU 6N counts 6N, over the device's dense peak. "
    if references:
        caption += f"The reference is the fastest of its modes ({', '.join(dict.fromkeys(references))}). "
    caption += f"The floor is computed. From {sources(found)}."
    return Table("Our best step on each device", caption, rows) if rows else None


def steps(label: str, run: Run, workload: Workload) -> Table:
    """One workload of one run, variant by variant."""
    kinds = ["missing" if not row.seconds else "ours" if row is workload.best else "" for row in workload.rows]
    rows = list(zip(kinds, map(_step_cells, workload.rows), strict=True))
    caption = f"Speed-up is over {workload.baseline.step.variant}. " if workload.baseline else ""
    if workload.floor:
        cells = dict.fromkeys(rows[0][1], NONE) | {
            "step": "floor",
            "median, ms": shown(workload.floor, 1e3),
            "tokens, 1/s": shown(workload.rows[0].step.tokens / workload.floor),
            "MFU, %": shown(workload.floor_mfu(), 100, ".1f"),
            "MFU 6N, %": shown(workload.floor_mfu("6n"), 100, ".1f"),
            "speed-up, ×": shown(workload.baseline and workload.baseline.seconds / workload.floor, form=".2f"),
            "note": "computed, not measured",
        }
        rows.append(("computed", cells))
        parts = "each part of the step at the matmul and copy rates of this run."
        flops = "the step's FLOPs at the matmul rate of this run; its bytes stay in the caches."
        caption += f"The floor is computed: {parts if run.results.device.type == 'cuda' else flops}"
    else:
        caption += "It has no floor, since the file lacks a measured rate or the shape."
    return Table(f"{workload.name} on {label}", f"{caption} From {run.source}.", rows)


def _step_cells(row: StepRow) -> Cells:
    step = row.step
    return {
        "step": step.variant,
        "dtype": step.dtype,
        "median, ms": shown(row.seconds, 1e3),
        "p10, ms": shown(row.quantile(0.1), 1e3),
        "p90, ms": shown(row.quantile(0.9), 1e3),
        "tokens, 1/s": shown(row.seconds and tokens_per_second(step.tokens, row.seconds)),
        **_mfu_cells(row),
        "speed-up, ×": shown(row.speedup, form=".2f"),
        "memory, GB": shown(step.peak_memory if row.seconds else None, 1e-9, ".2f"),
        "host, %": shown(row.host_share, 100, ".1f"),
        "samples": str(len(step.seconds)),
        "note": row.missing if not row.seconds else "" if step.compares else "rung",
    }


def _mfu_cells(row: StepRow) -> Cells:
    return {"MFU, %": shown(row.mfu(), 100, ".1f"), "MFU 6N, %": shown(row.mfu("6n"), 100, ".1f")}


def kernels(label: str, run: Run) -> Table:
    """Every kernel's case that has samples."""
    rows = [("ours" if row.kernel.variant == "fused" else "", _kernel_cells(row)) for row in run.kernels]
    caption = (
        "Share is of the ceiling that the operation meets first, copy or matmul, as measured in the same run. "
        f"Speed-up is over torch.compile of the reference. From {run.source}."
    )
    return Table(f"Kernels on {label}", caption, rows)


def _kernel_cells(row: KernelRow) -> Cells:
    kernel = row.kernel
    return {
        "kernel": kernel.case,
        "shape": row.shape,
        "dtype": kernel.dtype,
        "direction": kernel.direction,
        "variant": kernel.variant,
        "median, µs": shown(row.seconds, 1e6),
        "p10, µs": shown(tables.quantile(kernel.seconds, 0.1), 1e6),
        "p90, µs": shown(tables.quantile(kernel.seconds, 0.9), 1e6),
        "rate": tables.rate(row.bound) if row.bound else NONE,
        "share, %": shown(row.bound and row.bound.share, 100, ".1f"),
        "speed-up, ×": shown(row.compiled and row.compiled / row.seconds, form=".2f"),
    }


def estimated(guesses: Sequence[Estimate]) -> Table:
    rows = [
        {
            "workload": one.workload,
            "device": one.device,
            "peak, TFLOP/s": shown(one.peak, 1e-12),
            "memory, GB/s": shown(one.bandwidth, 1e-9),
            "floor, ms": shown(one.floor, 1e3),
            "MFU at the floor, %": shown(one.mfu(one.floor), 100, ".1f"),
            "attainable, ms": shown(one.attainable, 1e3),
            "tokens, 1/s": shown(one.tokens / one.attainable),
            "MFU, %": shown(one.mfu(one.attainable), 100, ".1f"),
            "MFU 6N, %": shown(one.mfu(one.attainable, "6n"), 100, ".1f"),
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
    """What each file is."""
    rows = []
    for each in runs:
        results, software, peak = each.results, each.results.software, each.results.peak
        cells = {
            "file": each.path.name,
            "device": each.device,
            "commit": each.commit,
            "date": each.day,
            "torch": software.torch,
            "Triton": software.triton or NONE,
            "CUDA": software.cuda or NONE,
            "driver": results.device.driver or NONE,
            "peak, TFLOP/s": shown(peak and peak.flops, 1e-12),
            "matmul, TFLOP/s": shown(results.ceiling("matmul"), 1e-12),
            "copy, GB/s": shown(results.ceiling("copy"), 1e-9),
            "state": "complete" if results.complete else "partial",
        }
        rows.append(("" if results.complete else "missing", cells))
    peaks = dict.fromkeys(f"{each.device}: {each.results.peak.source}" for each in runs if each.results.peak)
    caption = "Peak is what MFU is a share of. Matmul and copy are the best that the device did in the same run."
    return Table("The files", caption + (f" Peaks: {'; '.join(peaks)}." if peaks else ""), rows)


def missing(run: Run) -> list[str]:
    """What a run lacks, a line each: parts that failed, tests that failed, rows that were skipped."""
    results, tests = run.results, run.results.tests
    lines = [] if results.complete else ["The run is partial: it was stopped, ran out of time, or a part failed."]
    lines += [f"{failure.part} failed: {failure.error}" for failure in results.failures]
    if tests is None:
        lines.append("It ran no tests.")
    elif tests.failed:
        names = ", ".join(tests.failures)
        lines.append(f"{tests.failed} of its tests failed{': ' if names else ''}{names}.")
    present = {
        "peak, so no MFU": results.peak,
        "matmul ceiling": results.ceiling("matmul"),
        "copy ceiling": results.ceiling("copy"),
        "kernel row": results.kernels,
        "training step": results.steps,
    }
    lines += [f"There is no {what}." for what, value in present.items() if not value]
    lines += [
        f"{w.name}, {row.step.variant}: {row.missing}" for w in run.workloads for row in w.rows if not row.seconds
    ]
    skipped = Counter((k.variant, k.skipped or "no reason given") for k in results.kernels if not k.seconds)
    return lines + [f"{count} kernel rows of {name} not measured: {why}" for (name, why), count in skipped.items()]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _some(found: Iterable) -> list:
    return [each for each in found if each]


def _suffixes(runs: Sequence[Run]) -> dict[Path, str]:
    """A part of a file's name for each run, no two alike."""
    taken: dict[str, Path] = {}
    for each in runs:
        stem, count = slug(each.path.stem), 2
        name = stem
        while name in taken:
            name, count = f"{stem}-{count}", count + 1
        taken[name] = each.path
    return {path: name for name, path in taken.items()}


def write(folder: Path, runs: Sequence[Run]) -> None:
    """Write the report. UserError where `folder` refuses."""
    runs = in_order({each.path.resolve(): each for each in runs}.values())  # each file once
    guesses = estimates(runs)
    about, parts = summary(runs, guesses), sections(runs, guesses)
    with making_folder(folder):
        for each in (each for section in parts for each in section.pictures):
            figure = each.draw(WIDE, alone=True)
            for suffix in (".svg", ".png"):
                _put(folder / f"{each.name}{suffix}", picture(figure, suffix, each.title))
        _put(folder / "report.md", page.markdown(about, parts).encode())
        _put(folder / "report.html", page.html(about, parts).encode())


def _put(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def main(argv: list[str] | None = None) -> int:
    config, named = command_line(ReportConfig, argv, "python -m bench.report", ABOUT, positional="FILE ...")
    runs, bad = [], 0
    for path in map(Path, named):
        try:
            runs.append(read(path))
        except (OSError, ValueError) as error:
            bad = 1
            reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else error
            print(f"{path}: {reason}; skipped", file=sys.stderr)
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
