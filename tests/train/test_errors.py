"""What users and files said, in messages: one line, escaped, shortened."""

import errno
import os
import subprocess
import sys

import pytest

from tests.train.jobs import ROOT
from train.errors import MAX_LINE, UserError, ending, first_line, safe, shown

EVIL = "a\nb\r\x1b[31m\x9b\u202e\udc80"
ESCAPED = r"a\nb\r\x1b[31m\x9b\u202e\udc80"


@pytest.mark.parametrize("say", [lambda text: str(UserError(text)), first_line, lambda text: shown(text)[1:-1]])
def test_a_message_is_one_line_that_does_nothing_to_a_terminal(say):
    assert say(EVIL) == (ESCAPED if say is not first_line else "a")
    for long in ("x" * 5000, "\x1b" * 5000):
        assert say(long).isprintable()
        assert len(say(long)) <= MAX_LINE + 5
    assert "start" in say("start" + "x" * 5000)


def test_a_long_message_keeps_its_end():
    assert str(UserError("x" * 5000 + ": do this")).endswith(": do this")


def test_what_cannot_be_shown_is_described():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a list, nested too deeply to be shown"
    assert shown(1 << 100_000) == "an integer of 100001 bits"
    assert shown(["x" * 5000]) == "['" + "x" * 75 + "..."


def test_a_text_keeps_its_lines():
    assert safe("a\tb\n\x1b[31m\r\x9b") == "a\tb\n\\x1b[31m\\r\\x9b"


def test_a_command_says_that_its_folder_was_deleted(tmp_path):
    (tmp_path / "gone").mkdir()
    start = "import os; from train.commands import main; os.rmdir(os.getcwd()); main()"
    argv, env = [sys.executable, "-c", start, "train"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=tmp_path / "gone", env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the current folder was deleted; cd to one that exists\n")


def test_an_error_of_the_system_ends_a_command_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended, ending():
        os.stat("x\x1b" * 300)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith(f": {os.strerror(errno.ENAMETOOLONG)}\n")
    assert said[:-1].isprintable()
