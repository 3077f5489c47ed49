"""What pytest-benchmark is shown, and what `pytest bench/` prints: in a process of its own, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = [0.1, 0.3, 1e-7, 0.7, 1.0 / 3.0]
BENCH = f"""
from dataclasses import replace
from functools import partial
import torch
from bench import bench_kernels, kernels
from bench.bench_kernels import contest, rows, test_kernel
from bench.results import Kernel
from tests.bench.toys import TOY, scaled

kernels.why_not_fused = lambda device: ""
real = torch.compile
torch.compile = lambda function, options=None: real(function, backend="eager")
shapes = dict(cpu_shapes=((8, 16),), gpt_shapes=((8, 16),), backward_bytes=None)
wrong = replace(TOY, name="off", fused=lambda x, weight: scaled(x, weight) * 1.5, **shapes)
bench_kernels.TIMED = (replace(TOY, **shapes), wrong)

def pytest_generate_tests(metafunc):
    if metafunc.function is test_kernel:
        bench_kernels.pytest_generate_tests(metafunc)

def test_samples(show):
    show(Kernel("a", [1], "float32", "forward", "fused", {SAMPLES}), "given", {{"fact": 1}})
"""


@pytest.mark.slow
def test_pytest_bench(tmp_path: Path) -> None:
    """Samples are shown to the last bit, rates beside them; a wrong kernel fails, and its case is not timed."""
    (tmp_path / "bench_toys.py").write_text(BENCH)
    # as a user's shell: neither the interpreter, nor a worker of xdist's, where pytest-benchmark would not measure
    ours = ("TRITON_INTERPRET", "PYTEST_XDIST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "bench.conftest"]
    command += [str(tmp_path / "bench_toys.py"), "-rfs", "--benchmark-max-time=0", f"--benchmark-json={tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 4 passed, 2 skipped" in done.stdout
    assert "wrong: output 0: " in done.stdout
    assert "not timed, since fused is wrong" in done.stdout
    found = {(one["group"], one["name"]): one for one in json.loads((tmp_path / "out").read_text())["benchmarks"]}
    assert found["given", "test_samples"]["stats"]["data"] == SAMPLES
    assert found["given", "test_samples"]["extra_info"] == {"fact": 1}
    dtype = next(one["extra_info"]["dtype"] for (group, _), one in found.items() if group != "given")
    one = found[f"toy 8x16 {dtype} forward", "test_kernel[toy-8x16-forward-fused]"]
    info, median = one["extra_info"], one["stats"]["median"]
    assert one["stats"]["rounds"] == len(one["stats"]["data"]) == 5
    assert info["bytes_per_second"] == pytest.approx(info["bytes"] / median)
    assert info["share_of_ceiling"] > 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("toy") and "fused" in line)
    assert f"{1e6 * median:.1f}"[:3] in line
