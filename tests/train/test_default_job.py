"""The default job in an empty folder, without a network: the first run of a new user."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train.__main__ as command
from tests.train.jobs import ROOT
from train import checkpoint
from train.plot import main as plot_main
from train.sample import main as sample_main

SHORT = ("--max_iters=20", "--eval_interval=10", "--eval_iters=2")
# Every Python process imports this first. A connection to another machine ends the process.
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = refuse
socket.socket.connect = refuse
"""


@pytest.mark.slow
def test_from_nothing_to_a_sample(tmp_path, monkeypatch, capsys):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "train", *SHORT]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first = done.stdout
    # 1. the choices, the reasons, the text
    assert "preset docs_cpu: no preset was named, and the device is a CPU" in first
    meta = json.loads((tmp_path / "data" / "docs" / "meta.json").read_text())
    assert re.search(rf"docs: [\d,]+ characters of Python's own documentation, sha256 {meta['sha256']}\n", first)
    assert "number of parameters: 0.8" in first
    # 2. the log lines, and the final losses
    found = {n: re.search(rf"^step {n}: train loss (\S+), val loss (\S+)$", first, re.M) for n in (0, 10, 20)}
    assert float(found[20][2]) < float(found[0][2])
    assert f"final losses: train {found[20][1]}, val {found[20][2]} (best" in first
    # 3. a sample
    sample = first.partition("a sample:\n")[2].partition("\n---------------\n")[0]
    assert len(sample) >= 250
    # 4. where the files are
    for name, path in {"checkpoint": "ckpt.pt", "metrics": "metrics.jsonl", "loss curve": "loss.png"}.items():
        said = re.search(rf"^{name}: +([^,\n]*)", first, re.M)[1]
        assert said == f"out/{path}"
        assert (tmp_path / said).stat().st_size > 0
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 20

    # The other commands find the run without a path.
    monkeypatch.chdir(tmp_path)
    before = Path("out", "ckpt.pt").read_bytes()
    sample_main(["--num_samples=1", "--max_new_tokens=50", "--start=import", "--device=cpu"])
    assert "import" in capsys.readouterr().out
    plot_main([])
    assert "loss curve: out/loss." in capsys.readouterr().out

    # Again: the corpus is there, the seed is the same, and nothing is overwritten.
    monkeypatch.setattr(sys, "argv", ["train", *SHORT, "--device=cpu"])
    assert command.main() == 0
    second = capsys.readouterr().out
    (aside,) = Path("out").glob("earlier-*")
    assert f"the earlier run in out was moved to {aside}" in second
    assert (aside / "ckpt.pt").read_bytes() == before
    assert re.findall("^step .*", second, re.M)[0] == re.findall("^step .*", first, re.M)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out", "site"]
