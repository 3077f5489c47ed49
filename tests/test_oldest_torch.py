"""The other end of the supported range of torch: the tests of CUDA's path, with the oldest that pyproject.toml names.

The folder .venv-oldest is made once, by pip; it takes some gigabytes. NANOFUSE_OLDEST_PYTHON: an interpreter that has
them already.
"""

import fcntl
import os
import re
import shutil
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
    given = os.environ.get("NANOFUSE_OLDEST_PYTHON")
    if given:
        return given
    wanted = [f"{package}=={oldest(package)}" for package in ("torch", "triton")]
    made_for = "\n".join([*wanted, (ROOT / "pyproject.toml").read_text()])
    FOLDER.mkdir(exist_ok=True)
    python, done = FOLDER / "bin/python", FOLDER / "installed"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not (done.exists() and done.read_text() == made_for):
            venv.create(FOLDER, with_pip=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--retries=1", *wanted, "-e", ".[dev]"]
            installed = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True)
            if installed.returncode:
                reason = next((line for line in installed.stderr.splitlines() if "ERROR" in line), "no reason given")
                shutil.rmtree(FOLDER / "lib", ignore_errors=True)  # gigabytes, of no use
                pytest.skip(f"pip cannot install {' '.join(wanted)}: {reason.strip()}")
            done.write_text(made_for)
    return str(python)


@pytest.mark.slow
def test_with_the_oldest_torch() -> None:
    try:
        build.environment()
    except build.CannotBuild as error:
        pytest.skip(str(error))
    python = interpreter()
    ours = ("PYTEST_", "NANOFUSE_", "TRITON_")  # set for this process, not for that one
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    version = [python, "-c", "import torch; print(torch.__version__)"]
    found = subprocess.run(version, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert found.startswith(oldest("torch"))
    # the sizes are Triton's work, and take minutes; beside rehearsals, gradients of a compiled model
    which = "(rehears and not all_sizes) or in_parts_two_blocks"
    tests = [python, "-m", "pytest", "tests", "-n", "2", "-k", which, "-m", "", "-rp"]
    done = subprocess.run(tests, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert "PASSED tests/rehearsal/" in done.stdout
