"""Fixtures for the tests of runs."""

from pathlib import Path

import pytest

from tests.train.jobs import make_data


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds data/letters."""
    make_data(tmp_path / "data" / "letters")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.__main__.plot_run", lambda out_dir: None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
