"""The commands as a user starts them: `nanofuse`, in a folder like nanoGPT's, and the default job in an empty one."""

import json
import os
import re
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
    for words, status, said in (
        ("prepare x.txt --dataset=be", 0, ""),
        ("rehearse h200 --rehearse=h10", 2, r"error: rehearse: got 'h10', expected auto \| a100 \| h100.*\n"),
        ("train --dataset=shakespeare_char", 2, "error: .*; make it with: nanofuse prepare shakespeare_char\n"),
        ("trian", 2, r"error: unknown command 'trian' \(did you mean train\?\); nanofuse --help lists them all\n"),
    ):
        argv, env = [sys.executable, str(script), *words.split()], os.environ | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert ended.returncode == status, ended.stderr
        assert re.fullmatch(said, ended.stderr)
        assert "python -m train" not in ended.stdout + ended.stderr  # it would run nanoGPT's
    assert (folder / "data" / "be" / "train.bin").is_file()


# The default job: the first run of a new user

# Every Python process imports this first. A connection to another machine ends the process.
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = refuse
socket.socket.connect = refuse
"""


@pytest.mark.slow
def test_from_nothing_to_a_sample(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def said(*words: str) -> str:
        argv = [sys.executable, "-m", *words]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = said("train", "--device=cpu", "--max_iters=20", "--eval_interval=10", "--eval_iters=2")
    meta = json.loads((tmp_path / "data" / "docs" / "meta.json").read_text())
    assert 1_500_000 < meta["train_tokens"] + meta["val_tokens"] < 2_200_000
    assert set(meta["chars"]) == {"\n", *map(chr, range(32, 127))}  # plain text
    losses = {n: re.search(rf"^step {n}: train loss (\S+), val loss (\S+)$", first, re.M) for n in (0, 10, 20)}
    assert float(losses[20][2]) < float(losses[0][2])
    for line in (
        rf"docs: [\d,]+ characters of Python's own documentation, sha256 {meta['sha256']}",
        "preset docs_cpu: no preset was named, and the device is a CPU; .*",
        "number of parameters: 0.8.*",
        rf"final losses: train {losses[20][1]}, val {losses[20][2]} \(best .*",
        r"a sample:\n[\s\S]{250,}\n---------------",
        *("checkpoint: out/ckpt.pt, iteration 20", "metrics:    out/metrics.jsonl", "loss curve: out/loss.png"),
    ):
        assert re.search(f"^{line}$", first, re.M), line
    assert (tmp_path / "out" / "loss.png").stat().st_size > 0

    # The other commands find the run without a path.
    assert "import" in said("train.sample", "--num_samples=1", "--max_new_tokens=50", "--start=import")
    assert "loss curve: out/loss." in said("train.plot")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "site"]
