"""Rehearsals: the code path for CUDA, on a device that is not there.

Every test in this folder runs in its own process, with the device guard (guard.cpp) loaded and Triton's interpreter
off. A test file only asks for the fixture `gpu` of device.py; it runs like all others. server.py forks the processes.
The tests are skipped if there is no C++ compiler. In its process no test may skip.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.rehearsal.build import CannotBuild, environment
from tests.rehearsal.device import gpu  # noqa: F401

INSIDE = "NANOFUSE_GUARD" in os.environ
SERVER = pytest.StashKey[subprocess.Popen]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not INSIDE:
        item.fixturenames.clear()  # the test's own process sets them up


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INSIDE:
        return None  # pytest's own way
    server = _server(pyfuncitem.config)
    try:
        print(pyfuncitem.nodeid, file=server.stdin, flush=True)
        status, output = json.loads(server.stdout.readline())
    except (OSError, ValueError):
        pytest.fail(f"the rehearsal's server ended with {server.wait()}", pytrace=False)
    if status or "1 passed" not in output:
        pytest.fail(f"the test's process ended with {status}:\n{output}", pytrace=False)
    return True


def _server(config: pytest.Config) -> subprocess.Popen:
    if SERVER not in config.stash:
        try:
            guard = environment()
        except CannotBuild as error:
            pytest.skip(str(error))
        env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        env |= {"TRITON_INTERPRET": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | guard
        command = [sys.executable, "-m", "tests.rehearsal.server"]
        pipe = subprocess.PIPE
        server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, cwd=config.rootpath)
        config.stash[SERVER] = server
        config.add_cleanup(lambda: server.communicate(timeout=60))  # the server ends when its input ends
    return config.stash[SERVER]
