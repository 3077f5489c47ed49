"""A few of the GPU tests, as a part of a measurement: what is not right is not worth timing.

All of them are hundreds, and compile for longer than a measurement may take: `pytest -m gpu` runs those.
"""

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench.schema import Tests

ROOT = Path(__file__).parents[1]
COMMAND = ("-m", "pytest", "-m", "gpu and smoke", "-q", "-p", "no:cacheprovider", "tests")


def run(seconds: float, command: tuple[str, ...] = COMMAND) -> Tests:
    """The smoke set in a process of its own, for so many seconds at most. RuntimeError where it has no result."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        try:
            ran = subprocess.run(
                [sys.executable, *command, f"--junitxml={report}"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the tests did not end within {seconds:.0f} s") from error
        if not report.exists():
            last = (ran.stdout.strip().splitlines() or ["nothing was printed"])[-1]
            raise RuntimeError(f"pytest ended with status {ran.returncode}: {last}")
        return parse(report.read_text(), " ".join(["python", *command]), time.perf_counter() - begin)


def parse(junit: str, command: str, seconds: float) -> Tests:
    """What a JUnit report says."""
    cases = list(ElementTree.fromstring(junit).iter("testcase"))
    kinds = [{child.tag for child in case} & {"failure", "error", "skipped"} for case in cases]
    failed = [case for case, kind in zip(cases, kinds, strict=True) if kind & {"failure", "error"}]
    skipped = sum(kind == {"skipped"} for kind in kinds)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return Tests(command, len(cases) - len(failed) - skipped, len(failed), skipped, seconds, names)
