"""A process with the device guard and the tests' imports loaded. It forks a process for every test.

`python -m tests.rehearsal.server` reads one pytest node id per line. It answers each with a line of JSON: {"reports":
[...], "output": the text that the test's process wrote}. conftest.py starts it, with the environment of build.py.
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

for name in (
    "torch._dynamo",
    "kernels.cases",
    "train.compile",
    "train.graph",
):  # once, for all tests; kernels.cases imports all kernels
    importlib.import_module(name)

# no logging: pytest would print every line that torch.compile logs for tools
OPTIONS = ["-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging"]


class Reports:
    """A pytest plugin that collects a run's reports as plain data."""

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
                os._exit(0)  # without the parent's clean-up
        os.waitpid(pid, 0)
        reports.seek(0)
        output.seek(0)
        return {"reports": json.loads(reports.read() or "[]"), "output": output.read()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(line.rstrip("\n"))), flush=True)
