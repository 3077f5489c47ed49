"""The smoke set of GPU tests that a measurement runs: few enough to end, yet every kernel, a step and a resume."""

import subprocess
import sys

import pytest

from bench.smoke import COMMAND, ROOT
from kernels.cases import CASES


@pytest.mark.slow
def test_the_smoke_set_is_small_and_whole() -> None:
    argv = [sys.executable, *COMMAND, "--collect-only", "-vv"]  # a line a test
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    ids = [line for line in done.stdout.splitlines() if "<Function" in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(ids) < 40
    for name in [*(f"test_one_regime[{case.name}]" for case in CASES), "test_resume", "test_a_batch_of_one[fused]"]:
        assert any(name in test for test in ids), name
