"""`pytest bench/`: its option, and our own tables below pytest-benchmark's."""

from typing import Any

import pytest

from bench.results import Session
from bench.tables import summary

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nanogpt_dir", default="", help="folder of a nanoGPT checkout, timed beside our steps")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if session := config.stash.get(SESSION, None):
        terminalreporter.section("measured by turns")
        terminalreporter.line(summary(session.results))
