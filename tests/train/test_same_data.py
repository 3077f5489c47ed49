"""Weights and data are paired by their tokenizer, never by size; losses are compared if they are of the same data."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from model.pretrained import export_gpt2
from tests.train.jobs import CHARS, make_data
from tests.train.runs import CONSTANT, iterations, last, logged, refusal, resume, run
from train.checkpoint import held
from train.data import Dataset, checkpoint_tokenizer, difference, unnamed_tokenizer
from train.export import main as export
from train.metapickle import read_meta_pickle
from train.text import checked_meta

BYTES = {"vocab_size": 256, "tokenizer": "byte"}
GPT2 = {"vocab_size": 50257, "tokenizer": "gpt2"}
ABC = {"vocab_size": 3, "tokenizer": "char", "chars": list("abc")}


def table(itos: dict) -> dict:
    """The meta of nanoGPT's folder with this table."""
    return checked_meta(read_meta_pickle(pickle.dumps({"vocab_size": 3, "itos": itos})))


def words(*tokens: str | None) -> dict:
    return table(dict(enumerate(tokens)))


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (ABC, ABC, ""),
        (ABC, ABC | {"vocab_size": 64, "sha256": "0"}, ""),  # a padded size and another text
        (ABC, ABC | {"chars": list("abd")}, "token 2 is 'c' there, 'd' here"),
        (ABC, ABC | {"chars": list("ab")}, "3 characters there, 2 here"),
        (ABC, ABC | {"chars": list("acb")}, "token 1 is 'b' there, 'c' here"),
        (
            BYTES,
            {"vocab_size": 256, "tokenizer": "char", "chars": list(map(chr, range(256)))},
            "is 'byte' there, 'char'",
        ),
        (GPT2, BYTES, "is 'gpt2' there, 'byte' here"),
        (unnamed_tokenizer(51200), GPT2, ""),
        (unnamed_tokenizer(50304), ABC, "is 'gpt2' there, 'char' here"),
        (unnamed_tokenizer(65), ABC, "65 different tokens there, 3 here"),  # nanoGPT's, whose table is unknown
        (ABC, {"vocab_size": 3}, ""),
        (ABC, {"vocab_size": 2}, "3 different tokens there, 2 here"),
        ({"vocab_size": 200}, {"vocab_size": 90}, ""),
        (words("to", "be", "or"), words("to", "be", "or"), ""),
        (words("to", "be", "or"), words("be", "to", "or"), "the tables of tokens are two different ones"),
        (ABC, words("to", "be", "or"), "the tables of tokens are two different ones"),
        (words("to", "be", "or"), {"vocab_size": 3}, ""),
        (words("a", None), words(None, "a"), "the tables of tokens are two different ones"),
        (table({1: "a", 2: "b"}), table({1: "b", 2: "a"}), "the tables of tokens are two different ones"),
    ],
)
def test_the_difference_of_two_tokenizers(there, here, says):
    assert says in difference(there, here)
    assert bool(difference(there, here)) == bool(says)


def pickled(folder: Path, **meta) -> Path:
    """A dataset as nanoGPT leaves it, with this meta.pkl."""
    (make_data(folder) / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_a_run_goes_on_only_with_its_own_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    run(out, max_iters=2)
    before = (out / "ckpt.pt").read_bytes()
    shifted = make_data(tmp_path / "shifted", chars="A" + CHARS[:-1])
    message = refusal(resume, out, dataset=shifted, max_iters=4)
    for word in (f"dataset={shifted}", "init_from=resume", "token 0 is 'a' there, 'A' here"):
        assert word in message
    assert "token 0 is 'a'" in refusal(run, tmp_path / "new", init_from=out, dataset=shifted)
    assert "token 0 is" in refusal(resume, out, dataset=shifted, rehearse="a100", kernels="reference")
    fewer = make_data(tmp_path / "fewer", chars=CHARS[1:])
    assert "token 0 is 'a' there, 'b' here" in refusal(resume, out, dataset=fewer, eval_only=True)
    as_bytes = make_data(tmp_path / "bytes")
    (as_bytes / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 32}))
    assert "the tokenizer is 'char' there, 'byte' here" in refusal(resume, out, dataset=as_bytes)
    poem = pickled(tmp_path / "poem", itos=[f"word{i}" for i in range(32)])
    assert "the tables of tokens are two different ones" in refusal(resume, out, dataset=poem)
    assert (out / "ckpt.pt").read_bytes() == before
    resume(out, dataset=pickled(tmp_path / "bare", vocab_size=32), max_iters=3)
    theirs = last(out)
    assert theirs["nanofuse"].pop("tokenizer")["chars"] == list(CHARS)  # a table that the data lacks is kept
    # nanoGPT's checkpoint holds no table. That of its dataset, if it lies here, tells more than the size.
    torch.save(theirs | {"config": theirs["config"] | {"dataset": "letters"}, "nanofuse": {}}, out / "ckpt.pt")
    assert "32 different tokens there, 31 here" in refusal(resume, out, dataset=fewer)
    (tmp_path / "data" / "letters").mkdir()
    shutil.copy(tmp_path / "data" / "meta.json", tmp_path / "data" / "letters")
    assert "token 0 is 'a' there, 'A' here" in refusal(resume, out, dataset=shifted)
    assert resume(out, dataset=tmp_path / "data", max_iters=4) == 0
    nanogpts = {"nanofuse": {}, "config": {"dataset": "letters"}}
    for size, known in ((32, "char"), (64, "char"), (33, None)):  # of the model: as many, padded, another data's
        assert checkpoint_tokenizer(nanogpts | {"model_args": {"vocab_size": size}}).get("tokenizer") == known


def test_words_are_told_apart_too(tmp_path):
    words = [f"word{i}" for i in range(32)]
    run(tmp_path / "out", dataset=pickled(tmp_path / "words", itos=words), max_iters=2)
    other = pickled(tmp_path / "other", itos=words[::-1])
    export([f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'folder'}"])
    for start in (dict(init_from="resume"), dict(init_from=tmp_path / "folder", bias=True)):
        out = tmp_path / ("out" if start["init_from"] == "resume" else "new")
        assert "the tables of tokens are two different ones" in refusal(resume, out, dataset=other, **start)
    assert resume(tmp_path / "out", max_iters=3) == 0


def test_weights_with_gpt2s_tokens_are_not_trained_on_characters(tmp_path):
    torch.manual_seed(0)
    export_gpt2(GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=32)), tmp_path / "weights")
    message = refusal(run, tmp_path / "out", init_from=tmp_path / "weights", bias=True)
    assert "the tokenizer is 'gpt2' there, 'char' here" in message
    assert not (tmp_path / "out").exists()


# The best loss


def other_text(folder: Path) -> Path:
    """Data with the same alphabet whose letters all have the same frequency: it cannot be learnt."""
    make_data(folder)
    rng = np.random.default_rng(1)
    for name in ("train", "val"):
        rng.integers(0, 32, 3000).astype("<u2").tofile(folder / f"{name}.bin")
    return folder


@pytest.mark.parametrize("change", ["another folder", "the same folder", "nanogpt", "block_size"])
def test_a_best_loss_of_other_data_is_forgotten(tmp_path, capsys, change):
    settings = dict(always_save_checkpoint=False, eval_interval=2, patience=3)
    run(tmp_path / "out", max_iters=6, learning_rate=0.01, warmup_iters=0, **settings)
    best = last(tmp_path / "out")
    assert best["iter_num"] == 6
    changes = {"dataset": other_text(tmp_path / "other")}
    if change == "the same folder":
        shutil.rmtree(tmp_path / "data")
        changes["dataset"].rename(tmp_path / "data")
        changes = {}
    elif change == "nanogpt":
        torch.save({key: value for key, value in best.items() if key != "nanofuse"}, tmp_path / "out" / "ckpt.pt")
    elif change == "block_size":
        changes = {"block_size": 1}
    capsys.readouterr()
    assert resume(tmp_path / "out", max_iters=10, **changes, **CONSTANT) == 0
    said = capsys.readouterr().out
    what = "block_size" if change == "block_size" else "dataset"
    assert f"iteration 6; best validation loss starts again: {what} changed" in said
    evaluations = [record["val_loss"] for record in logged(tmp_path / "out", "eval").values()]
    now = last(tmp_path / "out")
    assert now["best_val_loss"] == evaluations[-1] > best["best_val_loss"]
    assert iterations(tmp_path / "out", "eval")[-3:] == [6, 8, 10]
    assert now["iter_num"] == 6  # the first evaluation is the best until a better one
    (kept,) = (tmp_path / "out").glob("earlier-*/ckpt-best.pt")
    assert held(kept) == (6, best["best_val_loss"])
    assert f"checkpoint: {tmp_path / 'out' / 'ckpt.pt'}, iteration 6\n" in said


def test_the_same_data_in_another_place_is_the_same(tmp_path, capsys):
    run(tmp_path / "out", max_iters=4, learning_rate=0.1)
    before = last(tmp_path / "out")["best_val_loss"]
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    resume(tmp_path / "out", dataset=tmp_path / "moved", max_iters=6, **CONSTANT)
    assert last(tmp_path / "out")["best_val_loss"] == before
    assert Dataset(tmp_path / "moved").fingerprint() == Dataset(tmp_path / "data").fingerprint()
