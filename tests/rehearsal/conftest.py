"""Rehearsals: the code path for CUDA, on a device that is not there.

Every test in this folder runs in its own process, with the device guard (guard.cpp) loaded and Triton's interpreter
off. A test file only asks for the fixture `gpu` of device.py; it runs like all others. server.py forks the processes.
The tests are skipped if there is no C++ compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.build import CannotBuild, environment
from tests.rehearsal.device import gpu  # noqa: F401

HERE = Path(__file__).parent
INSIDE = "NANOFUSE_GUARD" in os.environ
SERVER = pytest.StashKey[subprocess.Popen]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if INSIDE or HERE not in item.path.parents:
        return None  # pytest's own way
    try:
        server = _server(item.config)
    except CannotBuild as error:
        item.add_marker(pytest.mark.skip(reason=str(error)))
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(server, item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.session._setupstate.teardown_exact(nextitem)  # tears down what an earlier test set up
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _server(config: pytest.Config) -> subprocess.Popen:
    if SERVER not in config.stash:
        env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        env |= {"TRITON_INTERPRET": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | environment()
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.rehearsal.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=config.rootpath,
        )
        config.stash[SERVER] = server
        config.add_cleanup(lambda: server.communicate(timeout=60))  # the server ends when its input ends
    return config.stash[SERVER]


def _reports(server: subprocess.Popen, item: pytest.Item) -> list[pytest.TestReport]:
    try:
        print(item.nodeid, file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
    except (OSError, ValueError):
        answer = {"reports": [], "output": f"the rehearsal's server ended with {server.wait()}"}
    if answer["reports"]:
        hook = item.config.hook
        return [hook.pytest_report_from_serializable(config=item.config, data=data) for data in answer["reports"]]
    why = f"the test's process made no report:\n{answer['output']}"
    return [pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")]
