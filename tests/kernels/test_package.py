"""`import kernels`: what it offers, with Triton and without, and the example in its docstring."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import kernels
import kernels.cases  # imports every file of kernels/fused, whose names must not take the functions' place


def test_the_example_runs() -> None:
    example = doctest.DocTestFinder(recurse=False).find(kernels, "kernels")[0]
    assert len(example.examples) > 9
    assert doctest.DocTestRunner().run(example).failed == 0


def test_without_triton_only_the_kernels_are_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import kernels
assert kernels.select("auto", kernels.available.torch.device("cpu")) is kernels.REFERENCE
for name in kernels.__all__:
    try:
        getattr(kernels, name)
    except ImportError as error:
        print(name, error.name)
"""
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} triton" for name in kernels._TRITON]


def test_without_triton_the_bench_and_the_tests_leave_out_what_needs_it(tmp_path: Path) -> None:
    """As on a Mac, for which there is none. One that is there, but broken, is an error."""

    def run(*argv: str, status: int = 0) -> str:
        options = {"cwd": Path(__file__).parents[2], "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
        done = subprocess.run([sys.executable, "-m", *argv], **options, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    bench = ["bench", "--parts=kernels", "--device=cpu", f"--out={tmp_path / 'results.json'}"]
    (tmp_path / "triton.py").write_text("")
    assert "kernels: No module named 'triton.language'" in run(*bench, status=1)
    run("pytest", "--collect-only", "-p", "no:cacheprovider", "tests/kernels/test_refused.py", status=2)
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)")
    measured = run(*bench)
    assert "kernels: they need Triton, which is not installed (No module named 'triton')" in measured
    there = [f"tests/{name}.py" for name in ("kernels/test_refused", "kernels/test_timing", "train/test_flat")]
    collected = run("pytest", "--collect-only", "-rs", "-p", "no:cacheprovider", *there)
    assert all(f"{path}: Triton is not installed" in collected for path in (there[0], there[2]))
