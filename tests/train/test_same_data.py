"""Weights and data are paired by their tokenizer, never by size; losses are compared if they are of the same data."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.jobs import CHARS, make_data
from tests.train.runs import CONSTANT, iterations, last, logged, refusal, resume, run
from train.checkpoint import held
from train.data import checkpoint_tokenizer, difference, unnamed_tokenizer, weights_tokenizer
from train.errors import UserError
from train.export import main as export
from train.export import tokenizer_files
from train.metapickle import read_meta_pickle
from train.text import GPT2Tokenizer, from_meta

BYTES = {"vocab_size": 256, "tokenizer": "byte"}
ABC = {"vocab_size": 3, "tokenizer": "char", "chars": list("abc")}


GPT2 = {"vocab_size": 50257, "tokenizer": "gpt2"}
WORDS, OTHERS = (read_meta_pickle(pickle.dumps({"itos": words})) for words in (["to", "be", "or"], ["be", "to", "or"]))
TWO_TABLES = "the tables of tokens are two different ones"


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (ABC, ABC | {"vocab_size": 64, "sha256": "0"}, ""),  # a padded size and another text
        (ABC, ABC | {"chars": list("ab")}, "token 2 is 'c' there, None here"),
        (ABC, ABC | {"chars": list("acb")}, "token 1 is 'b' there, 'c' here"),
        (BYTES, ABC | {"vocab_size": 256}, "is 'byte' there, 'char' here"),
        (unnamed_tokenizer(51200), GPT2, ""),
        (unnamed_tokenizer(50304), ABC, "is 'gpt2' there, 'char' here"),
        (unnamed_tokenizer(65), ABC, "65 different tokens there, 3 here"),  # nanoGPT's, whose table is unknown
        (unnamed_tokenizer(64), ABC, ""),  # it may be padded
        (ABC, {"vocab_size": 3}, ""),
        (WORDS, WORDS, ""),
        (WORDS, OTHERS, TWO_TABLES),
        (ABC, WORDS, TWO_TABLES),
        (WORDS, {"vocab_size": 3}, ""),
        ({"vocab_size": 200}, {"vocab_size": 90}, ""),
    ],
)
def test_the_difference_of_two_tokenizers(there, here, says):
    assert says in difference(there, here)
    assert bool(difference(there, here)) == bool(says)


@pytest.mark.parametrize(
    ("name", "vocab"),
    [("vocab.json", {"olá": 0, "mundo": 1}), ("tokenizer.json", {"model": {"vocab": [["olá", -1.5]]}})],
)
def test_a_gpt2_of_another_language_has_as_many_tokens(tmp_path, name, vocab):
    (tmp_path / name).write_text(json.dumps(vocab))
    there = weights_tokenizer(str(tmp_path), 50257)
    assert difference(there, GPT2) == f"the tokenizer is {name!r} there, 'gpt2' here"
    with pytest.raises(UserError, match="cannot be shown"):
        from_meta(there)
    (tmp_path / name).write_text(json.dumps(tokenizer_files(GPT2Tokenizer(), 8)["tokenizer.json"]))
    (tmp_path / name).rename(tmp_path / "tokenizer.json")
    assert weights_tokenizer(str(tmp_path), 50304) == GPT2


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run of 4 iterations in out/ on data/letters. Its best state is that of iteration 4."""
    folder = tmp_path_factory.mktemp("trained")
    make_data(folder / "data" / "letters")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(Path("out"), dataset="letters", max_iters=4, warmup_iters=0, always_save_checkpoint=False)
    return folder


@pytest.fixture
def out(trained, tmp_path, monkeypatch) -> Path:
    """The run's out_dir, in a current folder that is a copy of `trained`."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("out")


def test_a_run_goes_on_only_with_its_own_tokens(out):
    before = (out / "ckpt.pt").read_bytes()
    make_data(Path("data/shifted"), chars="A" + CHARS[:-1])
    message = refusal(resume, out, dataset="shifted", max_iters=6)
    assert "dataset=shifted: expected the tokens of init_from=resume, but token 0 is 'a' there, 'A' here" in message
    export(["--to=exported"])
    assert "token 0 is 'a'" in refusal(run, Path("new"), init_from="exported", dataset="shifted", bias=True)
    assert (out / "ckpt.pt").read_bytes() == before
    (make_data(Path("data/bare")) / "meta.json").write_text('{"vocab_size": 32}')
    resume(out, dataset="bare", max_iters=5)
    assert last(out)["nanofuse"]["tokenizer"]["chars"] == list(CHARS)  # a table that the data lacks is kept


def test_words_are_told_apart_too(out):
    for name, step in (("words", 1), ("other", -1)):
        folder = make_data(Path("data", name))
        (folder / "meta.json").unlink()
        (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": [f"word{i}" for i in range(32)][::step]}))
    run(Path("of_words"), dataset="words", max_iters=2)
    assert TWO_TABLES in refusal(resume, Path("of_words"), dataset="other")
    export(["--out_dir=of_words", "--to=exported"])
    assert TWO_TABLES in refusal(run, Path("new"), dataset="other", init_from="exported", bias=True)
    assert resume(Path("of_words"), max_iters=3) == 0


def test_nanogpts_checkpoint_has_the_tokenizer_of_its_dataset_if_that_is_here(out):
    nanogpts = {"nanofuse": {}, "config": {"dataset": "letters"}}
    for size, known in ((32, "char"), (64, "char"), (33, None)):  # of the model: as many, padded, another data's
        assert checkpoint_tokenizer(nanogpts | {"model_args": {"vocab_size": size}}).get("tokenizer") == known
    Path("data/letters/meta.json").unlink()
    assert "tokenizer" not in checkpoint_tokenizer(nanogpts | {"model_args": {"vocab_size": 32}})


# The best loss


@pytest.mark.parametrize("change", ["the same folder", "nanogpt", "block_size"])
def test_a_best_loss_of_other_data_is_forgotten(out, capsys, change):
    best = last(out)
    assert best["iter_num"] == best["nanofuse"]["best_iter"] == 4
    letters, other = Path("data/letters"), make_data(Path("data/other"))
    for name, length in (("train", 3000), ("val", 500)):  # the same letters, all as frequent: they cannot be learnt
        np.random.default_rng(1).integers(0, 32, length).astype("<u2").tofile(other / f"{name}.bin")
    changes = {"block_size": 1} if change == "block_size" else {"dataset": "other"}
    if change == "the same folder":
        shutil.rmtree(letters)
        other.rename(letters)
        changes = {}
    elif change == "nanogpt":
        torch.save({key: value for key, value in best.items() if key != "nanofuse"}, out / "ckpt.pt")
    assert resume(out, max_iters=8, **changes, **CONSTANT) == 0
    said = capsys.readouterr().out
    what = "block_size" if change == "block_size" else "dataset"
    assert f"iteration 4; best validation loss starts again: {what} changed" in said
    evaluations = [record["val_loss"] for record in logged(out, "eval").values()]
    now = last(out)
    assert now["best_val_loss"] == evaluations[-1] > best["best_val_loss"]
    assert iterations(out, "eval")[-3:] == [4, 6, 8]
    assert now["iter_num"] == 4  # the first evaluation is the best until a better one
    (kept,) = out.glob("earlier-*/ckpt-best.pt")
    assert held(kept) == (4, best["best_val_loss"])
    assert "checkpoint: out/ckpt.pt, iteration 4\n" in said


def test_the_same_data_in_another_place_is_the_same(out):
    before = last(out)["best_val_loss"]
    shutil.copytree("data/letters", "data/moved")
    resume(out, dataset="moved", max_iters=6, **CONSTANT)
    assert last(out)["best_val_loss"] == before
