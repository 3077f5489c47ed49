"""A process with the device guard and the tests' imports loaded. It forks a process for every test.

`python -m tests.rehearsal.server` reads one pytest node id per line. It answers each with a line of JSON: [exit status,
the text that the test's process wrote]. conftest.py starts it, with the environment of build.py.
"""

import ctypes
import importlib
import json
import os
import sys
import tempfile

import pytest

if os.environ["NANOFUSE_TORCH"] == "cuda":  # the last guard counts: a CUDA build must load its own first
    importlib.import_module("torch")
GUARD = ctypes.CDLL(os.environ["NANOFUSE_GUARD"])  # before a CPU build, which looks for its CUDA library only once

for name in ("torch._dynamo", "kernels.cases", "train.compile", "train.graph"):  # once, for all tests
    importlib.import_module(name)

# no logging: pytest would print every line that torch.compile logs for tools
OPTIONS = ["-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging"]


def run(nodeid: str) -> tuple[int, str]:
    """The exit status and output of a test in a process of its own; a signal's number is negative."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        pid = os.fork()
        if pid == 0:
            status = 1
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                status = int(pytest.main([*OPTIONS, nodeid]))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)  # without the parent's clean-up
        _, ended = os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended), output.read()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(line.rstrip("\n"))), flush=True)
