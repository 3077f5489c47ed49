"""python -m bench: everything that this machine can measure, in one results file.

Ceilings, GPU tests, kernels, training steps: each part has its share of `--minutes`, compiling included, and what one
part leaves the next may use. What does not fit is left out, and its rows say so. The file is written anew after every
part, so that whatever ends the run, what was measured is kept.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import kernels, provenance, schema, steps, tests
from bench.budget import Budget
from bench.progress import Progress
from bench.schema import Ceiling, Failure, Results
from bench.tables import summary
from bench.variants import variants
from bench.workloads import DEFAULTS, WORKLOADS
from train.errors import UserError, run
from train.hardware import (
    lookup,
    measure_bandwidth,
    measure_flops,
    peak_flops,
    resolve_device,
    resolve_dtype,
    use_device,
)
from train.settings import command_line, setting

PARTS = ("ceilings", "tests", "kernels", "steps")
SHARES = {"ceilings": 0.05, "tests": 0.3, "kernels": 0.35, "steps": 1.0}  # of the time that is left when a part begins
ABOUT = "Measure this machine: its ceilings, GPU tests, kernels and training steps, into one results file."


@dataclass(frozen=True)
class BenchConfig:
    minutes: float = setting(8.0, "how long all of it may take", low=0.1)
    parts: str = setting(",".join(PARTS), "which parts, separated by commas")
    workloads: str = setting("", f"which steps, separated by commas: {', '.join(WORKLOADS)}; empty: by device")
    nanogpt_dir: str = setting("", "folder of a nanoGPT checkout (its model.py), to be measured beside ours")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "of our matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    out: str = setting("", "the results file; empty: bench/results/<device>-<date>.json")


class Bench:
    """A run in progress: what was found so far, and the time that is left."""

    def __init__(self, config: BenchConfig, device: torch.device, dtype: torch.dtype, progress: Progress) -> None:
        self.config, self.device, self.dtype, self.progress = config, device, dtype, progress
        self.budget = Budget(60 * config.minutes)
        self.results = Results(
            device=provenance.device(device),
            software=provenance.software(),
            commit=provenance.commit(),
            date=provenance.now(),
            command=provenance.command("bench", hidden=("nanogpt_dir", "out")),
            peak=schema.Peak(**dataclasses.asdict(peak_flops(device, dtype))),
            clocks_before=provenance.clocks(device),
        )

    def add(self, **found: object) -> None:
        self.results = replace(self.results, **found)

    def ceilings(self, seconds: float) -> None:
        each = max(0.1, min(0.5, seconds / 6))
        name = str(self.dtype).removeprefix("torch.")
        matmuls = [measure_flops(self.device, self.dtype, each) for _ in range(3)]
        copies = [measure_bandwidth(self.device, each) for _ in range(3)]
        self.add(ceilings=[Ceiling("matmul", name, matmuls), Ceiling("copy", "float32", copies)])
        if lookup(self.results.device.name) is None:  # its peak is a measured one too: the best matmul that was seen
            peak = self.results.peak
            self.add(peak=replace(peak, flops=max(peak.flops, *matmuls)))

    def tests(self, seconds: float) -> None:
        if self.device.type != "cuda":
            self.progress.tell("tests: they need a CUDA device; the CPU's are `pytest`")
            return
        self.add(tests=tests.run(seconds))
        if self.results.tests.failed:
            raise RuntimeError(f"{self.results.tests.failed} GPU tests failed: {self.results.tests.failures[0]}, …")

    def kernels(self, seconds: float) -> None:
        for row in kernels.rows(self.device, seconds):
            self.add(kernels=[*self.results.kernels, row])
            self.progress.at(f"{row.case} {'x'.join(map(str, row.shape))} {row.direction}")

    def steps(self, seconds: float) -> None:
        names = workloads_of(self.config, self.device)
        for i, name in enumerate(names):
            every = variants(self.device, self.dtype, self.config.nanogpt_dir)
            share = self.budget.left / (len(names) - i)
            rows: list[schema.Step] = []
            options = {"seconds": share, "budget": self.budget.part(share), "tell": self.progress.at, "into": rows}
            try:
                steps.measure(WORKLOADS[name], every, self.device, self.dtype, **options)
            finally:
                self.add(steps=[*self.results.steps, *rows])


def workloads_of(config: BenchConfig, device: torch.device) -> tuple[str, ...]:
    names = tuple(config.workloads.split(",")) if config.workloads else DEFAULTS.get(device.type, ("cpu",))
    for name in names:
        if name not in WORKLOADS:
            raise UserError(f"workloads: got {name!r}, expected some of: {', '.join(WORKLOADS)}")
    return names


def parts_of(config: BenchConfig) -> list[str]:
    named = config.parts.split(",")
    for name in named:
        if name not in PARTS:
            raise UserError(f"parts: got {name!r}, expected some of: {', '.join(PARTS)}")
    return [name for name in PARTS if name in named]


def measure(bench: Bench, parts: list[str], write: Callable[[Results], None]) -> int:
    """Run the parts in their order; a part that fails is recorded, and the others go on. The exit status."""
    status = 0
    for name in parts:
        bench.progress.part(name, bench.budget.left)
        try:
            getattr(bench, name)(SHARES[name] * bench.budget.left)
        except KeyboardInterrupt:
            bench.add(failures=[*bench.results.failures, Failure(name, "interrupted")])
            status = 130
            break
        except Exception as error:  # whatever a driver, a compiler or a test's process comes up with
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            bench.add(failures=[*bench.results.failures, Failure(name, line)])
            bench.progress.tell(f"{name}: {line}")
            status = 1
        write(bench.results)
    wrong = [row for row in (*bench.results.kernels, *bench.results.steps) if row.skipped.startswith(schema.WRONG)]
    status = status or int(bool(wrong))
    bench.add(clocks_after=provenance.clocks(bench.device), complete=status == 0)
    write(bench.results)
    return status


def main() -> int:
    config, _ = command_line(BenchConfig, None, "python -m bench", ABOUT)
    parts, device = parts_of(config), use_device(resolve_device(config.device))
    workloads_of(config, device)
    dtype = resolve_dtype(config.dtype, device)
    variants(device, dtype, config.nanogpt_dir)  # a folder that is none is refused before anything runs
    bench = Bench(config, device, dtype, Progress(60 * config.minutes, sys.stderr))
    name = "-".join(bench.results.device.name.lower().split()).replace("/", "-")
    path = Path(config.out or Path("bench", "results", f"{name}-{bench.results.date[:10]}.json"))
    status = measure(bench, parts, lambda results: schema.write(path, results))
    bench.progress.end()
    print(summary(bench.results))
    print(f"written to {path}" + ("" if bench.results.complete else ", which is not complete"))
    return status


if __name__ == "__main__":
    run(main)
