"""Runs with what forks of nanoGPT have: their config files and their data."""

import pickle

import pytest

from tests.train.jobs import CHARS, JOB, make_data
from tests.train.runs import last, resume, run
from train.__main__ import main
from train.errors import UserError
from train.sample import main as sample


def test_tokens_that_are_not_understood_cost_the_sample_alone(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    (data / "meta.json").unlink()
    words = [f"word{i}" for i in range(len(CHARS))]
    table = {"vocab_size": len(words), "itos": words, "stoi": {word: i for i, word in enumerate(words)}}
    (data / "meta.pkl").write_bytes(pickle.dumps(table))
    assert run(tmp_path / "out", max_iters=2) == 0
    said = capsys.readouterr().out
    assert "no sample of text: tokenizer: the dataset's is not known (itos holds more than different single" in said
    assert last(tmp_path / "out")["iter_num"] == 2
    assert resume(tmp_path / "out", max_iters=4) == 0
    with pytest.raises(UserError, match="tokenizer: the dataset's is not known"):
        sample([f"--out_dir={tmp_path / 'out'}", "--device=cpu"])


def test_what_a_config_file_holds_without_effect_is_said_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "fork.py").write_text("lora_rank = 8\nsteps = 2e0\nmax_iters = steps\nwarmup_iters = 5000\n")
    data = make_data(tmp_path / "data")
    job = JOB | {"dataset": data, "out_dir": tmp_path / "out", "eval_iters": 1}
    argv = [f"--{name}={value}" for name, value in job.items() if name != "warmup_iters"]
    monkeypatch.setattr("sys.argv", ["train", *argv, str(tmp_path / "fork.py")])
    monkeypatch.setattr("train.__main__.plot_run", lambda out_dir: None)
    assert main() == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith(
        "fork.py: names that are no settings here, left out: lora_rank; only read by later lines: steps"
    )
    assert second.startswith("warmup_iters: 5000 is more than lr_decay_iters (20): the rate rises for 5000 steps")
    assert rest[0].startswith(f"{tmp_path / 'fork.py'} over the defaults; dataset ")
    assert "2 iterations done" in rest
