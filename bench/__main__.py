"""python -m bench: measure this machine, and write one results file.

The parts are ceilings, GPU tests, kernels and training steps. Each has its share of `--minutes`, compiling included.
The next part may use the time that is left. Work that does not fit is left out, and its rows say so. The file is
written again after every part, so an error or Ctrl-C loses no measurement.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from bench import results, steps
from bench.results import WRONG, Failure, Session, Tests
from bench.rules import TimeBudget
from bench.tables import summary
from bench.variants import DEFAULTS, WORKLOADS, chosen, variants
from train.errors import UserError, first_line, one_line, run
from train.files import check_output, holds, unused
from train.hardware import resolve_device, resolve_dtype, use_device
from train.settings import command_line, setting

PARTS = ("ceilings", "tests", "kernels", "steps")
SHARES = {"ceilings": 0.05, "tests": 0.3, "kernels": 0.35, "steps": 1.0}  # of the time left when a part begins
ABOUT = "Measure this machine: its ceilings, GPU tests, kernels and training steps, into one results file."
HIDDEN = ("nanogpt_dir", "out")  # settings that name the user's folders: the file does not tell them
ROOT = Path(__file__).parents[1]
# there are hundreds of GPU tests, and compiling them takes too long for a measurement: `pytest -m gpu` runs all of them
SMOKE = ("-m", "pytest", "-m", "gpu and smoke", "-q", "-p", "no:cacheprovider", "tests")


@dataclass(frozen=True)
class BenchConfig:
    minutes: float = setting(8.0, "how long all of it may take", low=0.1, below=10**6)
    parts: str = setting(",".join(PARTS), "which parts, separated by commas")
    workloads: str = setting("", f"which steps, separated by commas: {', '.join(WORKLOADS)}; empty: by device")
    nanogpt_dir: str = setting("", "folder of a nanoGPT checkout (its model.py), to be measured beside ours", path=True)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "of our matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    out: str = setting("", "the results file; empty: bench/results/<device>-<date>.json", path=True)


class Bench(Session):
    """A run in progress: also the file that its results go to, and the time left."""

    def __init__(self, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> None:
        """UserError for an unknown workload, and for a folder that is no nanoGPT checkout."""
        self.workloads = chosen("workloads", config.workloads or DEFAULTS.get(device.type, "cpu"), WORKLOADS)
        self.variants = variants(device, dtype, config.nanogpt_dir)
        self.budget = TimeBudget(60 * config.minutes)
        given = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in HIDDEN}
        words = [f"--{name}={value}" for name, value in given.items() if value != getattr(BenchConfig(), name)]
        super().__init__(device, dtype, " ".join(["python -m bench", *words]))
        name = "-".join(self.results.device.name.lower().split()).replace("/", "-")
        stem = f"{name}-{self.results.date[:10]}"  # an earlier file of the day stays
        self.path = Path(config.out) if config.out else unused(Path("bench", "results"), stem, ".json")
        self.stored = True  # whether the file has the results
        bar = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
        self.bar = tqdm(total=60 * config.minutes, bar_format=bar, leave=False, disable=None)  # on a terminal only

    def tell(self, text: str) -> None:
        """Print a line that stays above the progress bar."""
        tqdm.write(one_line(text), file=sys.stderr)

    def at(self, what: str) -> None:
        """Show on the progress bar what is measured now."""
        self.bar.n = self.bar.total - self.budget.left
        self.bar.set_postfix_str(what)

    def check_writable(self) -> None:
        """UserError if results cannot be written, or would replace a file of something else. It makes the folder."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            check_output(self.path)
            if self.path.exists() and self.path.stat().st_size and not holds(self.path, f'"{results.FORMAT}"'):
                raise UserError(f"out: {self.path} is there, and is no results file; name another file")
        except OSError as error:
            raise UserError(f"out: {self.path} cannot be written: {error.strerror}") from None

    def write(self) -> None:
        """Write the results. If that is impossible, say why, and go on."""
        try:
            results.write(self.path, self.results)
            self.stored = True
        except OSError as error:
            self.tell(f"out: {self.path} cannot be written: {error.strerror or error}")
            self.stored = False

    def measure(self, parts: Iterable[str]) -> int:
        """Run the parts in order; returns the exit status. A part that fails is recorded, and the others go on."""
        status = 0
        for name in (part for part in PARTS if part in parts):
            self.tell(f"{name} ({self.budget.left / 60:.1f} minutes left)")
            self.bar.set_description_str(name)
            try:
                getattr(self, name)(SHARES[name] * self.budget.left)
            except KeyboardInterrupt:
                self.results.failures.append(Failure(name, "interrupted"))
                status = 130
                break
            except Exception as error:  # a driver, a compiler or a test's process can raise anything
                self.results.failures.append(Failure(name, first_line(error)))
                self.tell(f"{name}: {first_line(error)}")
                status = 1
            self.write()
        if any(row.skipped.startswith(WRONG) for row in (*self.results.kernels, *self.results.steps)):
            status = status or 1
        self.add(clocks_after=self.clocks(), complete=status == 0)
        self.write()
        return status

    def tests(self, seconds: float) -> None:
        if self.device.type != "cuda":
            self.tell("tests: they need a CUDA device; the CPU's are `pytest`")
            return
        self.add(tests=run_tests(seconds))
        if self.results.tests.failed:
            raise RuntimeError(f"{self.results.tests.failed} GPU tests failed: {self.results.tests.failures[0]}, …")

    def kernels(self, seconds: float) -> None:
        try:
            from bench import kernels  # imported here: Triton need not be installed
        except ModuleNotFoundError as error:
            if error.name != "triton":  # it is there, but broken
                raise
            return self.tell(f"kernels: they need Triton, which is not installed ({error})")
        for row in kernels.rows(self.device, seconds):
            self.results.kernels.append(row)
            self.at(f"{row.case} {'x'.join(map(str, row.shape))} {row.direction}")

    def steps(self, seconds: float) -> None:
        for i, name in enumerate(self.workloads):
            share = self.budget.left / (len(self.workloads) - i)
            options = {"seconds": share, "budget": self.budget.part(share), "tell": self.at}
            # the rows are there even if an interruption ends this
            steps.measure(WORKLOADS[name], self.variants, self.device, self.dtype, into=self.results.steps, **options)


def run_tests(seconds: float, command: tuple[str, ...] = SMOKE) -> Tests:
    """Run the smoke set of GPU tests in its own process, for at most `seconds`. RuntimeError if it has no result."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        line = [sys.executable, *command, f"--junitxml={report}"]
        try:
            ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the tests did not end within {seconds:.0f} s") from error
        if not report.exists():
            last = ((ran.stdout + ran.stderr).strip().splitlines() or ["nothing was printed"])[-1]
            raise RuntimeError(f"pytest ended with status {ran.returncode}: {last}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if {child.tag for child in case} & {"failure", "error"}]
    skipped = sum(case not in failed and case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return Tests(len(cases) - len(failed) - skipped, len(failed), skipped, names)


def main() -> int:
    config, _ = command_line(BenchConfig, None, "python -m bench", ABOUT)
    parts, device = chosen("parts", config.parts, PARTS), use_device(resolve_device(config.device))
    bench = Bench(config, device, resolve_dtype(config.dtype, device))
    bench.check_writable()
    status = bench.measure(parts)
    bench.bar.close()
    print(summary(bench.results))
    if not bench.stored:  # nothing that was measured is lost
        print(results.encoded(bench.results).decode())
        return status or 1
    print(one_line(f"written to {bench.path}") + ("" if bench.results.complete else ", which is not complete"))
    return status


if __name__ == "__main__":
    run(main)
