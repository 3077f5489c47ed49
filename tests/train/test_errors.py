"""What a command says when it fails: one line, escaped, shortened. A console that fails ends no run."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.jobs import ROOT
from train import errors
from train.errors import MAX_LINE, UserError, ending, first_line, safe, shown

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
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_a_console_takes_characters_that_its_encoding_lacks(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit, match="0"):
        errors.run(lambda: print("Ω-\udcff"))
    assert console.buffer.getvalue() == b"\\u03a9-\\udcff\n"
