"""What pytest-benchmark is shown, and what `pytest bench/` prints and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.bounds import Bound, bound

from bench.results import Kernel, median
from bench.tables import kernels_table, rate, steps_table
from tests.bench.made import cpu

ROOT = Path(__file__).parents[2]


def test_rates_and_ratios() -> None:
    def row(variant: str, **fields: Any) -> Kernel:
        return Kernel("toy", [8, 16], "float32", "forward", variant, **fields)

    ours, theirs = row("fused", seconds=[2e-3, 1e-3, 1e-3], bytes=10**9), row("compiled", seconds=[3e-3], bytes=10**9)
    assert bound(ours, matmul=1e12, copy=2e12) == Bound("copy", 1e12, 0.5)
    assert rate(bound(ours, matmul=None, copy=None)) == "1,000 GB/s"
    product = row("fused", seconds=[1e-3], flops=10**9, bytes=10**6)
    assert bound(product, matmul=4e12, copy=2e12) == Bound("matmul", 1e12, 0.25)
    assert bound(product, matmul=4e12, copy=1e9) == Bound("copy", 1e9, 1.0)  # its bytes take longer
    assert bound(product, matmul=None, copy=None) == Bound("matmul", 1e12, None)
    assert rate(bound(product, None, None)) == "1.000 TFLOP/s"
    assert bound(row("fused", seconds=[1.0]), matmul=4e12, copy=2e12) is None
    table = kernels_table([ours, theirs, row("liger", skipped="not there")], 1e12, 2e12).splitlines()
    assert [line.split() for line in table[2:]] == [
        ["toy", "8x16", "forward", "fused", "1000.0", "1,000", "GB/s", "50%", "3.00x"],
        ["toy", "8x16", "forward", "compiled", "3000.0", "333.3", "GB/s", "17%", "1.00x"],
    ]


def test_speed_ups_are_over_what_compares() -> None:
    """Not over plain torch in bfloat16, a rung, which nanoGPT does not do on a CPU."""
    rows = cpu().steps
    lines = {line.split("  ")[0]: line.split()[-1] for line in steps_table(rows, 1e12).splitlines()[2:]}
    at = {row.variant: median(row.seconds) for row in rows}
    assert lines["ours compiled"] == f"{at['nanoGPT compiled'] / at['ours compiled']:.2f}x"
    assert lines["nanoGPT compiled"] == "1.00x"


def pytest_bench(*arguments: str) -> subprocess.CompletedProcess:
    # as a user's shell: neither the interpreter, nor a worker of xdist's, where pytest-benchmark would not measure
    ours = ("TRITON_INTERPRET", "PYTEST_XDIST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_pytest_benchmark_is_shown_the_samples_to_the_last_bit(tmp_path: Path) -> None:
    samples = [0.1, 0.3, 1e-7, 0.7, 1.0 / 3.0]
    (tmp_path / "bench_samples.py").write_text(
        "import pytest\n"
        "from bench.session import CLOCK\n"
        "@pytest.mark.benchmark(timer=CLOCK)\n"
        f"def test_it(show): show({samples})\n"
    )
    out = tmp_path / "out.json"
    done = pytest_bench("-p", "bench.conftest", str(tmp_path / "bench_samples.py"), f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["benchmarks"]
    assert found["stats"]["data"] == samples


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "bench_wrong.py").write_text(
        "import torch\n"
        "from dataclasses import replace\n"
        "from functools import partial\n"
        "from bench import bench_kernels, entrants\n"
        "from bench.bench_kernels import groups, pytest_generate_tests, test_kernel\n"
        "from tests.bench.toys import TOY, scaled\n"
        "entrants.why_not_fused = lambda device: ''\n"
        "torch.compile = partial(torch.compile, backend='eager')\n"
        "shapes = {'cpu_shapes': ((8, 16),), 'gpt_shapes': ((8, 16),), 'backward_bytes': None}\n"
        "wrong = replace(TOY, name='off', fused=lambda x, weight: scaled(x, weight) * 1.5, **shapes)\n"
        "bench_kernels.TIMED = (replace(TOY, **shapes), wrong)\n"
    )
    done = pytest_bench("-p", "bench.conftest", str(tmp_path / "bench_wrong.py"), "-rfs", "--benchmark-max-time=0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 passed, 2 skipped" in done.stdout
    assert "1 failed" in done.stdout
    assert "wrong: output 0: " in done.stdout
    assert "not timed, since fused is wrong" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_pytest_bench_end_to_end(tmp_path: Path) -> None:
    out, options = tmp_path / "out.json", ("--benchmark-max-time=0.1", "--benchmark-storage", str(tmp_path))
    chosen = ("bench/", "-k", "kernel and embedding and not both", "-rs", *options)
    done = pytest_bench(*chosen, f"--benchmark-json={out}", "--benchmark-only", "--benchmark-save=first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton's kernels need a CUDA device" in done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    groups = {(b["group"], b["params"]["variant"]) for b in found}
    names = [f"embedding 16x256x384x512 {found[0]['extra_info']['dtype']} {d}" for d in ("forward", "backward")]
    assert {group for group, _ in groups} == set(names)
    assert {variant for _, variant in groups} >= {"reference"}
    for one in found:
        assert one["stats"]["rounds"] == len(one["stats"]["data"]) >= 5
        info = one["extra_info"]
        assert info["bytes_per_second"] == pytest.approx(info["bytes"] / one["stats"]["median"])
        assert info["share_of_ceiling"] > 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("embedding") and "reference" in line)
    stats = next(b["stats"] for b in found if b["group"] == names[0] and b["params"]["variant"] == "reference")
    assert f"{1e6 * stats['median']:.1f}" in line.split()
    again = pytest_bench(*chosen, "--benchmark-compare=0001")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "(0001_first)" in again.stdout


@pytest.mark.slow
def test_plain_pytest_does_not_measure() -> None:
    done = pytest_bench("--collect-only", "-qq", "-k", "test_kernel or bench_kernels")
    assert "bench/bench_kernels.py" not in done.stdout
