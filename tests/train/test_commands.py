"""The command `nanofuse`, as its console script runs it, in a folder like nanoGPT's."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from train.commands import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nanofuse(tmp_path):
    """Run it in a folder with a train.py, a bench.py and a train/prepare.py that are somebody else's."""
    folder = tmp_path / "nanoGPT"
    (folder / "data").mkdir(parents=True)
    for name in ("train.py", "bench.py", "sample.py"):
        (folder / name).write_text("raise SystemExit('the wrong program')")
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "nanofuse"
    ].partition(":")
    script = tmp_path / "bin" / "nanofuse"
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")

    def nanofuse(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    return nanofuse


def test_without_a_command_it_lists_them(nanofuse):
    ended = nanofuse()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [line.split()[0] for line in ended.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_ours(nanofuse, command):
    ended = nanofuse(command, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "[--key=value ...]" in ended.stdout


def test_arguments_and_status_go_through(nanofuse, tmp_path):
    (tmp_path / "nanoGPT" / "x.txt").write_text("To be, or not to be\n" * 10)
    ended = nanofuse("prepare", "x.txt", "--dataset=be")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "nanoGPT" / "data" / "be" / "train.bin").is_file()
    for arguments, line in (
        (["prepare", "y.txt"], "error: 'y.txt': no such file\n"),
        (["rehearse", "h200", "--rehearse=h10"], "error: rehearse: got 'h10', expected auto | a100 | h100"),
        (["trian"], "error: unknown command 'trian' (did you mean train?); nanofuse --help lists them all\n"),
    ):
        ended = nanofuse(*arguments)
        assert ended.returncode == 2
        assert ended.stderr.startswith(line)
        assert ended.stderr.count("\n") == 1
