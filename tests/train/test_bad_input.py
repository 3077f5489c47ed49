"""Bad input gives one line and exit status 2, and writes nothing."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from model.pretrained import export_gpt2
from tests.train.jobs import CHARS, arguments, make_data
from train import checkpoint
from train.__main__ import main
from train.errors import run

SHORT = dict(max_iters=2, eval_interval=2, eval_iters=1)


def tree(folder: Path) -> dict[str, tuple]:
    """Every name below `folder`, with data that change if it is written, replaced or touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_mode)
    return found


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds data/letters."""
    make_data(tmp_path / "data" / "letters", train=2000, val=200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.__main__.plot_run", lambda out_dir: None)  # slower than all the rest
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def start(here, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run `python -m train` on a short job with changes. Returns (exit status, stdout, stderr)."""

    def start(*argv: str, **settings) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train", *argv, *arguments(**SHORT | settings)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return ended.value.code, *capsys.readouterr()

    return start


@pytest.fixture
def refusal(here, start) -> Callable[..., str]:
    """The error line of a refused command. Nothing else may be printed, and nothing written."""

    def refusal(*argv: str, **settings) -> str:
        before = tree(here)
        status, out, err = start(*argv, **settings)
        assert status == 2
        assert out == ""
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert err[:-1].isprintable()
        assert len(err) < 1100
        assert tree(here) == before
        return err

    return refusal


def test_the_job_is_good_but_for_what_the_tests_change(here, start):
    status, out, err = start()
    assert (status, err) == (0, "")
    assert "step 2: train loss " in out
    assert (here / "out" / "ckpt.pt").is_file()


SETTINGS = [
    ("--n_embd=30 --n_head=4", ["n_embd", "got 30", "multiple of n_head (4)"]),
    ("--device=cuda:7", ["device", "'cuda:7'", "expected one of: auto, cpu"]),
    ("--dtype=float16", ["dtype", "'float16'", "expected one of", "float32", "on cpu"]),
    ("shakespear_char", ["shakespear_char", "did you mean shakespeare_char?"]),
    ("--block_size=200", ["block_size=200", "val.bin", "200 tokens", "at least 201"]),
    ("--block_size=2000", ["block_size=2000", "train.bin", "2,000 tokens", "at least 2,001"]),
    ("--dataset=data/numbers", ["data/numbers: no such dataset"]),
    ("--dataset=numbers", ["data/numbers", "no such dataset", "python -m train.prepare FILE ... --dataset=numbers"]),
    ("--init_from=resume", ["init_from=resume", "there is no", "ckpt.pt"]),
    ("--init_from=resume --out_dir=data/letters/train.bin", ["data/letters/train.bin/ckpt.pt"]),
    ("--init_from=gpt3", ["init_from=gpt3", "no such file", "gpt2-xl"]),
    ("--init_from=data/letters/train.bin", ["init_from=data/letters/train.bin", "not a whole safetensors file"]),
    ("--out_dir=data/letters/train.bin", ["out_dir", "data/letters/train.bin is no folder"]),
    ("--out_dir=data/letters/train.bin/deeper", ["out_dir", "data/letters/train.bin is no folder"]),
    (f"--dataset={'x' * 300}", ["no such dataset"]),
    (f"--init_from={'x' * 300}", ["no such file or folder"]),
    (f"--init_from=resume --out_dir={'x' * 300}", ["File name too long"]),
    (f"--out_dir={'x' * 300}", ["out_dir", "File name too long"]),
    (f"--out_dir={'x/' * 3000}", ["File name too long"]),
    (f"{'x' * 300}.py", ["neither a config file nor a preset"]),
    ("--dataset=a\x1b[31m", [r"data/a\x1b[31m: no such dataset"]),
    ("--tensorboard_log", ["tensorboard_log", "not installed", "pip install 'nanofuse[tensorboard]'"]),
]


def test_the_default_job_makes_no_corpus_for_a_run_that_cannot_be(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["train", "--out_dir=file"])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: out_dir: got 'file', expected a folder that can be written; file is no folder\n"
    )
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("changes", "words"), SETTINGS, ids=[changes for changes, _ in SETTINGS])
def test_a_setting_that_cannot_be(refusal, monkeypatch, changes, words):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    message = refusal(**settings_of(changes)) if changes.startswith("--") else refusal(changes)
    for word in words:
        assert word in message


def settings_of(text: str) -> dict[str, str]:
    """{"a": "1"} for "--a=1". These replace the short job's settings."""
    return {
        name.removeprefix("--"): value if equals else "True"
        for name, equals, value in (word.partition("=") for word in text.split())
    }


def test_the_shape_is_checked_before_memory_is_taken_for_it(refusal, monkeypatch):
    def none(*args):
        raise AssertionError("a model was built")

    monkeypatch.setattr("train.state.GPT", none)
    assert "block_size=3000" in refusal(block_size=3000)


# Data


def test_a_token_outside_the_vocabulary(refusal, here):
    path = here / "data" / "letters" / "val.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[150] = 32
    tokens.tofile(path)
    message = refusal()
    for word in ("data/letters/val.bin", "token 32 at position 150", "vocab_size=32"):
        assert word in message


# Checkpoints and weights


@pytest.fixture
def trained(here, start) -> Path:
    """out/, with a checkpoint after 2 iterations."""
    status, _, _ = start()
    assert status == 0
    return here / "out"


def test_a_checkpoint_of_another_shape(refusal, here, trained):
    make_data(here / "data" / "more", chars=CHARS + "0")
    for changes, words in (
        (dict(block_size=17), ["block_size: got 17", "at most 16", "init_from=resume"]),
        (dict(n_layer=2), ["n_layer: got 2, expected 1", "init_from=resume"]),
        (dict(n_head=4), ["n_head: got 4, expected 2"]),
        (dict(n_embd=64), ["n_embd: got 64, expected 32"]),
        (dict(bias=True), ["bias: got True, expected False"]),
        (dict(gelu="tanh"), ["gelu: got tanh, expected erf"]),
        (dict(dataset="more"), ["dataset=more", "33 different tokens", "the model 32"]),
    ):
        message = refusal(init_from="resume", **changes)
        for word in words:
            assert word in message


def test_a_checkpoint_whose_parts_disagree(refusal, trained):
    path = trained / "ckpt.pt"
    good = checkpoint.load(path)
    torch.save(good | {"model_args": good["model_args"] | {"n_layer": 2}}, path)
    message = refusal(init_from="resume", n_layer=2)
    assert "init_from=resume" in message
    assert "transformer.h.1" in message
    state = {i: {k: torch.zeros(3) for k in ("step", "exp_avg", "exp_avg_sq")} for i in good["optimizer"]["state"]}
    for moments in state.values():
        moments["step"] = torch.tensor(1.0)
    torch.save(good | {"optimizer": good["optimizer"] | {"state": state}}, path)
    message = refusal(init_from="resume")
    assert "optimizer" in message
    assert "shape [3]" in message


def test_gpt2_without_a_way_to_get_it(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal(init_from="gpt2", block_size=16)
    assert "init_from=gpt2" in message
    assert "path of a model.safetensors" in message


def test_weights_that_know_less_than_is_asked(refusal, here):
    torch.manual_seed(0)
    export_gpt2(GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32)), here / "weights")
    assert "dataset=letters: it has 32 different tokens, the model 31" in refusal(init_from="weights", bias=True)
    assert "block_size: got 17, expected at most 16" in refusal(init_from="weights", bias=True, block_size=17)
    assert "n_head: got 4, expected 2" in refusal(init_from="weights", bias=True, n_head=4)
