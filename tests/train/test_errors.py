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


def test_an_error_of_the_system_ends_a_command_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended, ending():
        os.stat("x\x1b" * 300)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith(f": {os.strerror(errno.ENAMETOOLONG)}\n")
    assert said[:-1].isprintable()


# The console


def test_commands_escape_the_names_that_they_repeat(tmp_path, monkeypatch, capsys):
    """A folder's name could move a terminal's cursor, look like another line, or lack in the terminal's encoding."""
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

    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit, match="0"):
        errors.run(lambda: print("Ω-\udcff"))
    assert console.buffer.getvalue() == b"\\u03a9-\\udcff\n"


LOST = "error: [Errno 28] No space left on device\n"
GOES_ON = "console: cannot be written ({}); the run goes on without it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("errors.run(lambda: [print('text'), print('text')] and 0)", 2, LOST),
        ("errors.run(lambda: [log.say('1'), log.say('2')] and 0)", 0, GOES_ON.format("No space left on device")),
        ("sys.stdout.close(); log.say('text')", 0, GOES_ON.format("I/O operation on closed file.")),
    ],
    ids=["a full disk", "a full disk under a run", "closed by the run"],
)
def test_the_streams_of_a_real_process(script, status, said):
    """The end of the interpreter could fail too."""
    argv = [sys.executable, "-c", f"import sys; from train import errors, log; {script}"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (status, said)
