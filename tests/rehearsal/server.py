"""A process that holds the device guard and has imported what tests need; for every test it forks one that runs it.

`python -m tests.rehearsal.server` reads a pytest node id a line, and answers each with a line of JSON: {"reports":
[...], "output": what the test's process wrote}. conftest.py starts it, with the environment that build.py makes.
"""

import ctypes
import importlib
import json
import os
import sys
import tempfile

import pytest

if os.environ["NANOFUSE_TORCH"] == "cuda":  # the last guard counts: after the one of a CUDA build
    importlib.import_module("torch")
GUARD = ctypes.CDLL(os.environ["NANOFUSE_GUARD"])  # before a CPU build, which looks for its CUDA library once

for name in (
    "torch._dynamo",
    "kernels.cases",
    "train.compile",
    "train.graph",
):  # once, for all tests; the cases: kernels
    importlib.import_module(name)

# no logging: pytest would print every line that torch.compile traces for tools
OPTIONS = ["-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging"]


class Reports:
    """A pytest plugin: what a run reports, as plain data."""

    def __init__(self) -> None:
        self.made: list[dict] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.made.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def run(nodeid: str) -> dict:
    """The test's reports and output, from a process of its own. A process that dies makes no reports."""
    with tempfile.TemporaryFile("w+") as reports, tempfile.TemporaryFile("w+", errors="replace") as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            plugin = Reports()
            try:
                pytest.main([*OPTIONS, nodeid], plugins=[plugin])
                json.dump(plugin.made, reports)
            finally:
                for stream in (reports, sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(0)  # nothing of the parent's is cleaned up here
        os.waitpid(pid, 0)
        reports.seek(0)
        output.seek(0)
        return {"reports": json.loads(reports.read() or "[]"), "output": output.read()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(line.rstrip("\n"))), flush=True)
