"""A console that fails ends no run. Where the output is what was asked for, a command says that it failed."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.jobs import CHARS, ROOT
from tests.train.runs import iterations, last, run
from train import errors
from train.export import main as export
from train.plot import main as plot
from train.prepare import main as prepare
from train.sample import main as sample


class Broken(io.StringIO):
    """A console that takes some text and then fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.tell() + len(text) > 600:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("closed")])
def test_a_console_that_fails_ends_no_run(tmp_path, monkeypatch, error):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run(tmp_path / "out", max_iters=2) == 0
    assert iterations(tmp_path / "out", "save") == [2]
    assert "console: cannot be written" in stderr.getvalue()


def test_what_the_console_cannot_print_is_escaped(tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    out_dir = tmp_path / "Ω-\udcff"  # a folder's name may be any bytes
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: run(out_dir, max_iters=1))
    assert ended.value.code == 0
    assert last(out_dir)["iter_num"] == 1
    assert rf"{tmp_path}/\u03a9-\udcff" in console.buffer.getvalue().decode("ascii")


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


LOST = "error: the output cannot be written: No space left on device\n"
GOES_ON = "console: cannot be written (No space left on device); the run goes on without it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("script", "status", "said"), [("print('text')", 1, LOST), ("log.say('text')", 0, GOES_ON)])
def test_a_full_disk_under_the_console(script, status, said, unbuffered):
    """The streams of a real process, for which the end of the interpreter could fail too."""
    twice = f"from train import errors, log; errors.run(lambda: [{script}, {script}] and 0)"
    with open("/dev/full", "w") as full:
        argv, env = [sys.executable, "-c", twice], os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_closed_streams_are_no_error():
    script = "from train import errors; errors.run(lambda: print('text'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert done.returncode == 0
