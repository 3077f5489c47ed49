"""What a command says when it fails: one line, escaped, shortened. A console that fails ends no run."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.jobs import CHARS, ROOT
from tests.train.runs import run
from train import errors
from train.errors import MAX_LINE, UserError, ending, first_line, safe, shown
from train.export import main as export
from train.plot import main as plot
from train.prepare import main as prepare
from train.sample import main as sample

EVIL = "a\nb\r\x1b[31m\x9b\u202e\udc80"


def test_a_message_is_one_short_line_that_does_nothing_to_a_terminal():
    assert str(UserError(EVIL)) == shown(EVIL)[1:-1] == r"a\nb\r\x1b[31m\x9b\u202e\udc80"
    assert first_line(f"\n{EVIL}") == "a"
    assert first_line(OSError()) == "OSError"
    assert safe("a\tb\n\x1b[31m\r\x9b") == "a\tb\n\\x1b[31m\\r\\x9b"
    long = str(UserError("start" + "\x1b" * 5000 + ": do this"))
    assert (long[:5], long[-9:]) == ("start", ": do this")
    assert len(long) <= MAX_LINE + 5
    assert shown(["x" * 5000]) == "['" + "x" * 75 + "..."
    assert shown(1 << 100_000) == "a int, too large to be shown"


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda: os.stat("x\x1b" * 300), f": {os.strerror(errno.ENAMETOOLONG)}\n"),
        (lambda: os.fstat(10**6), "error: [Errno 9] Bad file descriptor\n"),  # no error of the output
    ],
)
def test_an_error_of_the_system_ends_a_command_in_one_line(fail, said, capsys):
    with pytest.raises(SystemExit, match="2"), ending():
        fail()
    line = capsys.readouterr().err
    assert line.endswith(said)
    assert line[:-1].isprintable()


def test_commands_escape_the_names_that_they_repeat(tmp_path, monkeypatch, capsys):
    """A folder's name could move a terminal's cursor, or look like another line."""
    monkeypatch.chdir(tmp_path)
    Path("play.txt").write_text(CHARS * 30)
    evil, escaped = "a\x1b[31m\nb", r"a\x1b[31m\nb"
    prepare([f"--dataset={evil}", "play.txt"])
    prepare([f"--check={evil}"])
    assert run(tmp_path / evil, dataset=tmp_path / "data" / evil, max_iters=2) == 0
    assert "\x1b" not in capsys.readouterr().out
    sample([f"--out_dir={evil}", "--num_samples=1", "--max_new_tokens=1"])
    plot([evil])
    export([f"--out_dir={evil}", f"--to={evil}/to"])
    streams = capsys.readouterr()
    assert [escaped in line for line in streams.err.splitlines()] == [True]
    assert [escaped in line for line in streams.out.splitlines()[-3:]] == [True] * 3


# The console

LOST = "error: the output cannot be written: No space left on device\n"
DELETED = "error: the current folder was deleted; cd to one that exists\n"
GOES_ON = "console: cannot be written ({}); the run goes on without it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("errors.run(lambda: [print('text'), print('text')] and 0)", 1, LOST),
        ("errors.run(lambda: [log.say('1'), log.say('2')] and 0)", 0, GOES_ON.format("No space left on device")),
        ("sys.stdout.close(); log.say('text')", 0, GOES_ON.format("I/O operation on closed file.")),
        ("os.rmdir(os.getcwd()); from train.commands import main; main()", 2, DELETED),
    ],
    ids=["a full disk", "a full disk under a run", "closed by the run", "a deleted folder"],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_streams_and_the_folder_of_a_real_process(tmp_path, script, status, said, unbuffered):
    """The end of the interpreter could fail too."""
    argv = [sys.executable, "-c", f"import os, sys; from train import errors, log; {script}", "train"]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, cwd=tmp_path, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_streams_closed_before_the_start():
    script = f"{sys.executable} -c 'from train import errors; errors.run(lambda: print(1))' >&- 2>&-"
    assert subprocess.run(script, shell=True, cwd=ROOT).returncode == 0


def test_a_console_takes_characters_that_its_encoding_lacks(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit, match="0"):
        errors.run(lambda: print("Ω-\udcff"))
    assert console.buffer.getvalue() == b"\\u03a9-\\udcff\n"
