"""The smoke set of GPU tests, as a part of a measurement: wrong results are not worth timing.

There are hundreds of GPU tests. Compiling them takes too long for a measurement. `pytest -m gpu` runs all of them.
"""

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench.results import Tests

ROOT = Path(__file__).parents[1]
COMMAND = ("-m", "pytest", "-m", "gpu and smoke", "-q", "-p", "no:cacheprovider", "tests")


def run(seconds: float, command: tuple[str, ...] = COMMAND) -> Tests:
    """Run the smoke set in its own process, for at most `seconds`. RuntimeError if it has no result."""
    begin = time.perf_counter()
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
    passed = len(cases) - len(failed) - skipped
    return Tests(" ".join(["python", *command]), passed, len(failed), skipped, time.perf_counter() - begin, names)
