"""A test's own process, with the device guard. multiprocessing's fork server imports this file once, and forks."""

import ctypes
import importlib
import os
import sys
from pathlib import Path

import pytest

GUARD = os.environ.get("NANOFUSE_GUARD")
if GUARD:
    if os.environ["NANOFUSE_TORCH"] == "cuda":  # the last guard counts: a CUDA build must load its own first
        importlib.import_module("torch")
    ctypes.CDLL(GUARD)  # before a CPU build, which looks for its CUDA library only once
    for name in ("torch._dynamo", "kernels.cases", "train.compile", "train.graph"):  # once, for all tests
        importlib.import_module(name)

# no logging: pytest would print every line that torch.compile logs for tools
OPTIONS = ["-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging"]


def run(root: Path, nodeid: str, output: str) -> None:
    """Run a test, its text into the file `output`; the process's exit status is pytest's."""
    assert GUARD, "the fork server was started without the device guard"
    os.chdir(root)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(int(pytest.main([*OPTIONS, nodeid])))
