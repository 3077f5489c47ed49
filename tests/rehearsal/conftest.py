"""Rehearsals: the code path for CUDA, on a device that is not there.

Every test in this folder runs in its own process, with the device guard (guard.cpp) loaded and Triton's interpreter
off. A test file only asks for the fixture `gpu` of device.py; it runs like all others. The tests are skipped if there
is no C++ compiler. In its process no test may skip.
"""

import multiprocessing
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.rehearsal import inside
from tests.rehearsal.build import environment
from tests.rehearsal.device import gpu  # noqa: F401


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not inside.GUARD:
        item.fixturenames.clear()  # the test's own process sets them up


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if inside.GUARD:
        return None  # pytest's own way
    root = pyfuncitem.config.rootpath
    start_server(root)
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        given = root, pyfuncitem.nodeid, output.name
        process = multiprocessing.get_context("forkserver").Process(target=inside.run, args=given)
        process.start()
        process.join()
        text = output.read()
    if process.exitcode or "1 passed" not in text:
        pytest.fail(f"the test's process ended with {process.exitcode}:\n{text}", pytrace=False)
    return True


def start_server(root: Path) -> None:
    """Start multiprocessing's fork server, unless it runs: with the device guard, and what tests import."""
    env = {"TRITON_INTERPRET": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": str(root)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env | environment()).items():
            patch.setenv(name, value)
        multiprocessing.set_forkserver_preload([inside.__name__])
        forkserver.ensure_running()
