"""PyPI has another package called `kernels`. Where it is imported instead of ours, the user is told what to do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_somebody_elses_kernels(tmp_path: Path) -> None:
    foreign = tmp_path / "kernels"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("def get_kernel(): ...\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "train", "--max_iters=0"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert str(foreign / "__init__.py") in last
    assert "pip uninstall kernels" in last
