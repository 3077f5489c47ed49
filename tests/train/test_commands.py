"""The command `nanofuse`, run as by its console script, in a folder like nanoGPT's."""

import os
import subprocess
import sys
import tomllib

import pytest

from tests.train.jobs import ROOT
from train.commands import COMMANDS, main


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # a new process would not warn
def test_it_lists_its_commands_and_each_has_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanofuse"])
    main()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if line.startswith("  ")] == list(COMMANDS)
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", ["nanofuse", command, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        usage = capsys.readouterr().out.partition("\n")[0]
        assert usage.startswith("usage: python -m ")
        assert usage.split()[3].endswith("train" if command == "rehearse" else command)


def test_in_a_folder_of_nanogpts_ours_runs_and_arguments_and_status_go_through(tmp_path):
    folder, script = tmp_path / "nanoGPT", tmp_path / "nanofuse"
    (folder / "data").mkdir(parents=True)
    for name in ("train.py", "bench.py", "sample.py"):
        (folder / name).write_text("raise SystemExit('the wrong program')")
    (folder / "x.txt").write_text("To be, or not to be\n" * 10)
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["nanofuse"]
    module, _, function = entry.partition(":")
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    for arguments, status, line in (
        (["prepare", "x.txt", "--dataset=be"], 0, ""),
        (["rehearse", "h200", "--rehearse=h10"], 2, "error: rehearse: got 'h10', expected auto | a100 | h100"),
        (["trian"], 2, "error: unknown command 'trian' (did you mean train?); nanofuse --help lists them all\n"),
    ):
        argv, env = [sys.executable, str(script), *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert ended.returncode == status, ended.stderr
        assert ended.stderr.startswith(line)
        assert ended.stderr.count("\n") == line.startswith("error")
    assert (folder / "data" / "be" / "train.bin").is_file()
