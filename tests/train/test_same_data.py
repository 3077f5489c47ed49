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
from train.data import Dataset, difference, unnamed_tokenizer
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
        (unnamed_tokenizer(50304), GPT2, ""),
        (unnamed_tokenizer(50257), ABC, "is 'gpt2' there, 'char' here"),
        (unnamed_tokenizer(65), ABC, "65 different tokens there, 3 here"),  # nanoGPT's, whose table is unknown
        (ABC, {"vocab_size": 3}, ""),
        (ABC, {"vocab_size": 2}, "3 different tokens there, 2 here"),
        ({"vocab_size": 128}, {"vocab_size": 100}, ""),
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


def retitle(folder: Path, **meta) -> Path:
    """Change what the meta.json of a dataset says."""
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | meta))
    return folder


def test_a_run_is_not_resumed_on_another_alphabet_of_the_same_size(tmp_path):
    run(tmp_path / "out", max_iters=2)
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    shifted = make_data(tmp_path / "shifted", chars="A" + CHARS[:-1])
    message = refusal(resume, tmp_path / "out", dataset=shifted, max_iters=4)
    for word in (f"dataset={shifted}", "init_from=resume", "token 0 is 'a' there, 'A' here"):
        assert word in message
    new = dict(init_from=tmp_path / "out", dataset=shifted)
    assert "token 0 is 'a' there, 'A' here" in refusal(run, tmp_path / "new", **new)
    fewer = make_data(tmp_path / "fewer", chars=CHARS[1:])
    assert "token 0 is 'a' there, 'b' here" in refusal(resume, tmp_path / "out", dataset=fewer, eval_only=True)
    as_bytes = retitle(make_data(tmp_path / "bytes"), tokenizer="byte", vocab_size=32)
    assert "the tokenizer is 'char' there, 'byte' here" in refusal(resume, tmp_path / "out", dataset=as_bytes)
    assert "token 0 is" in refusal(resume, tmp_path / "out", dataset=shifted, rehearse="a100", kernels="reference")
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_nanogpts_run_is_not_resumed_on_data_of_another_size(tmp_path, monkeypatch):
    """Its checkpoint holds no table. That of its dataset, if it lies here, tells more than the size."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "out", max_iters=2)
    theirs = last(tmp_path / "out") | {"config": last(tmp_path / "out")["config"] | {"dataset": "letters"}}
    del theirs["nanofuse"]
    torch.save(theirs, tmp_path / "out" / "ckpt.pt")
    fewer = make_data(tmp_path / "fewer", chars=CHARS[:-1])
    assert "32 different tokens there, 31 here" in refusal(resume, tmp_path / "out", dataset=fewer)
    letters = make_data(tmp_path / "data" / "letters" if not (tmp_path / "data").exists() else tmp_path / "data2")
    shutil.copytree(letters, tmp_path / "data" / "letters", dirs_exist_ok=True)
    shifted = make_data(tmp_path / "shifted", chars="A" + CHARS[:-1])
    assert "token 0 is 'a' there, 'A' here" in refusal(resume, tmp_path / "out", dataset=shifted)
    assert resume(tmp_path / "out", dataset=tmp_path / "data", max_iters=3) == 0


def test_weights_with_gpt2s_tokens_are_not_trained_on_characters(tmp_path):
    torch.manual_seed(0)
    export_gpt2(GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=32)), tmp_path / "weights")
    message = refusal(run, tmp_path / "out", init_from=tmp_path / "weights", bias=True)
    assert "the tokenizer is 'gpt2' there, 'char' here" in message
    assert not (tmp_path / "out").exists()


def test_a_table_that_the_data_lacks_is_kept(tmp_path):
    run(tmp_path / "out", max_iters=2)
    bare = make_data(tmp_path / "bare")
    (bare / "meta.json").unlink()
    (bare / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 32}))
    resume(tmp_path / "out", dataset=bare, max_iters=3)
    assert last(tmp_path / "out")["nanofuse"]["tokenizer"]["chars"] == list(CHARS)


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
    assert f"iteration 6; best validation loss counted anew: {what} changed" in said
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
