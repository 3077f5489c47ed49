"""A console that fails ends no run. Where the output is what was asked for, a command says that it failed."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.jobs import CHARS, ROOT, arguments, make_data
from tests.train.runs import iterations, last, run
from train import errors
from train.export import main as export
from train.plot import main as plot
from train.prepare import main as prepare
from train.sample import main as sample


class Broken(io.StringIO):
    """A console that takes some text and then fails."""

    def __init__(self, takes: int, error: Exception) -> None:
        super().__init__()
        self.takes, self.error = takes, error

    def write(self, text: str) -> int:
        self.takes -= len(text)
        if self.takes < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("takes", "error"),
    [
        (0, OSError(errno.ENOSPC, "No space left")),
        (700, BrokenPipeError()),
        (700, OSError(errno.EIO, "gone")),
        (0, ValueError("closed")),
    ],
)
def test_a_console_that_fails_ends_no_run(tmp_path, monkeypatch, takes, error):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(takes, error))
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run(tmp_path / "out", max_iters=4) == 0
    assert iterations(tmp_path / "out", "save") == [2, 4]
    assert "console: cannot be written" in stderr.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_the_console_cannot_print_is_escaped(tmp_path, monkeypatch, encoding):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    out_dir = tmp_path / "Ω-\udcff"  # a folder's name may be any bytes
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: run(out_dir, max_iters=2))
    assert ended.value.code == 0
    assert last(out_dir)["iter_num"] == 2
    said = console.buffer.getvalue().decode(encoding)
    assert "saving checkpoint to " in said
    assert r"-\udcff" in said


def test_commands_escape_the_names_that_they_repeat(tmp_path, monkeypatch, capsys):
    """A folder's name could move a terminal's cursor, or look like another line."""
    monkeypatch.chdir(tmp_path)
    Path("play.txt").write_text(CHARS * 30)
    evil, shown = "a\x1b[31m\nb", r"a\x1b[31m\nb"
    prepare([f"--dataset={evil}", "play.txt"])
    prepare([f"--check={evil}"])
    assert run(tmp_path / evil, dataset=tmp_path / "data" / evil, max_iters=2) == 0
    assert "\x1b" not in capsys.readouterr().out
    sample([f"--out_dir={evil}", "--num_samples=1", "--max_new_tokens=1"])
    plot([evil])
    export([f"--out_dir={evil}", f"--to={evil}/to"])
    streams = capsys.readouterr()
    assert [shown in line for line in streams.err.splitlines()] == [True]
    assert [shown in line for line in streams.out.splitlines()[-3:]] == [True] * 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_console(tmp_path):
    """The streams of a real process, for which the end of the interpreter could fail too."""
    make_data(tmp_path / "data" / "letters")
    argv = [sys.executable, "-m", "train", *arguments(max_iters=2, eval_iters=1)]
    with open("/dev/full", "w") as full:
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
        done = subprocess.run(argv, cwd=tmp_path, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stderr == "console: cannot be written (No space left on device); the run goes on without it\n"
    assert (tmp_path / "out" / "ckpt.pt").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_output_is_lost_says_so(flush, unbuffered):
    script = f"from train import errors; errors.run(lambda: print('text', flush={flush}))"
    with open("/dev/full", "w") as full:
        argv, env = [sys.executable, "-c", script], os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


def test_closed_streams_are_no_error():
    script = "from train import errors; errors.run(lambda: print('text'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert done.returncode == 0
