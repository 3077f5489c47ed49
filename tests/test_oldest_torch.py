"""The other end of the supported range of torch: the tests of CUDA's path, with the oldest that pyproject.toml names.

The folder .venv-oldest is made once, by pip; it takes some gigabytes. NANOFUSE_OLDEST_PYTHON: an interpreter that has
them already.
"""

import os
import re
import subprocess
import venv
from pathlib import Path

import pytest

from tests.rehearsal import build

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-oldest"


def oldest(package: str) -> str:
    """The version that pyproject.toml's lower bound names: 2.11 -> 2.11.0."""
    return re.search(rf'"{package}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1] + ".0"


def interpreter() -> str:
    """An interpreter with the oldest torch and Triton. Skips the test where pip cannot install them."""
    if given := os.environ.get("NANOFUSE_OLDEST_PYTHON"):
        return given
    wanted = [f"{package}=={oldest(package)}" for package in ("torch", "triton")]
    made_for = "\n".join([*wanted, (ROOT / "pyproject.toml").read_text()])
    python, done = str(FOLDER / "bin/python"), FOLDER / "installed"
    if not (done.exists() and done.read_text() == made_for):
        venv.create(FOLDER, clear=True, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--retries=1", *wanted, "-e", ".[dev]"]
        installed = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True)
        if installed.returncode:
            reason = next((line for line in installed.stderr.splitlines() if "ERROR" in line), "no reason given")
            pytest.skip(f"pip cannot install {' '.join(wanted)}: {reason.strip()}")
        done.write_text(made_for)
    return python


@pytest.mark.slow
def test_with_the_oldest_torch() -> None:
    build.environment()  # skips where the device guard cannot be built
    python = interpreter()
    ours = ("PYTEST_", "NANOFUSE_", "TRITON_")  # set for this process, not for that one
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    version = [python, "-c", "import torch; print(torch.__version__)"]
    found = subprocess.run(version, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert found.startswith(oldest("torch"))
    # of the sizes, which take minutes, one part; beside rehearsals, gradients of a compiled model
    which = "(rehears and not part1 and not part2 and not part3) or in_parts_two_blocks"
    tests = [python, "-m", "pytest", "tests", "-n", "2", "-k", which, "-m", "", "-rp"]
    done = subprocess.run(tests, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert "PASSED tests/rehearsal/" in done.stdout
