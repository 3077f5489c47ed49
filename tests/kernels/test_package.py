"""`import kernels`: what it offers, with Triton and without, and the example in its docstring."""

import doctest
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
