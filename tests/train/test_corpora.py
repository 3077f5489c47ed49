"""The corpora by name, without a network: downloads come from files, OpenWebText is replaced."""

import hashlib
import pickle
import sys
import types
from pathlib import Path

import pytest

from train import corpora, prepare
from train.corpora import docs_text
from train.data import Dataset
from train.errors import UserError
from train.prepare import PrepareConfig, ensure_docs
from train.text import GPT2Tokenizer

DOCS = "The library reference.\n" * 1000
PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20


@pytest.fixture(autouse=True)
def play(tmp_path, monkeypatch) -> Path:
    """In an empty current folder `docs` is the text DOCS, TinyShakespeare the text PLAY, downloaded from this file."""
    source = tmp_path / "source.txt"
    source.write_text(PLAY)
    monkeypatch.setattr(corpora, "docs_text", lambda: DOCS)
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", source.as_uri())
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return source


def make(name: str, **settings) -> Dataset:
    return Dataset(Path("data", prepare.prepare([name], PrepareConfig(**settings))[0]))


@pytest.mark.slow
def test_docs_is_plain_text_of_the_expected_size():
    text = docs_text()
    assert 1_500_000 < len(text) < 2_200_000
    assert set(text) == {"\n", *map(chr, range(32, 127))}
    assert 'The "assert" statement' in text  # from the language reference
    assert "Return the sum of a 'start' value" in text or "Base class for" in text  # from a docstring


def test_ensure_docs_makes_it_once_and_says_what_it_is(monkeypatch):
    lines = []
    ensure_docs(Path("data", "docs"), lines.append)
    dataset = Dataset("data/docs")
    assert (len(dataset.train), len(dataset.val)) == (20_700, 2_300)
    assert dataset.tokenizer().decode(dataset.val) == DOCS[20_700:]
    monkeypatch.setattr(corpora, "docs_text", lambda: pytest.fail("made again"))
    ensure_docs(Path("data", "docs"), lines.append)
    assert lines[0] == lines[1]
    assert "23,000 characters" in lines[0]
    assert hashlib.sha256(DOCS.encode()).hexdigest() in lines[0]


@pytest.mark.parametrize("damage", ["", "{", "[]", "[" * 100_000])
def test_docs_that_are_damaged_are_made_again_by_the_command_that_is_named(damage):
    folder = Path("data", "docs")
    ensure_docs(folder, lambda line: None)
    (folder / "meta.json").write_text(damage)
    with pytest.raises(UserError, match=r"cannot be read: .*; python -m train\.prepare docs makes it again"):
        ensure_docs(folder, lambda line: None)
    make("docs")
    ensure_docs(folder, lambda line: None)


def test_what_others_made_under_the_name_of_a_corpus_stays(play):
    for name in ("docs", "shakespeare_char"):
        with pytest.raises(UserError, match=f"no such dataset; make it with: python -m train.prepare {name}$"):
            Dataset(Path("data", name))
        text = Path("data", name, "input.txt")
        text.parent.mkdir(parents=True)
        text.write_text("my own")
        with pytest.raises(
            UserError, match=r"input\.txt: sha256 is .* expected .*; delete it to have the corpus's own"
        ):
            make(name)
        assert [path.read_text() for path in text.parent.iterdir()] == ["my own"]
        text.write_text(DOCS if name == "docs" else PLAY)
        play.unlink(missing_ok=True)  # what lies there is not downloaded
        assert len(make(name).train) == int(len(text.read_text()) * 0.9)
        text.unlink()
        text.mkdir()
        with pytest.raises(UserError, match=r"input\.txt: cannot be read: Is a directory"):
            make(name)
    for name in ("meta.json", "train.bin", "meta.pkl"):  # nanoGPT's folder
        Path("data/docs", name).write_bytes(pickle.dumps({"vocab_size": 300}) if name == "meta.pkl" else b"\1\0\2\0")
    Path("data/docs/meta.json").unlink()
    ensure_docs(Path("data/docs"), pytest.fail)
    assert Dataset("data/docs").train.tolist() == [1, 2]


def test_what_was_fetched_for_a_dataset_that_cannot_be_goes_again(play):
    for name, settings, said in (
        ("docs", {"tokenizer": "gpt2", "bpe_dir": "nowhere"}, "nowhere"),
        ("docs", {"val_fraction": 1e-9}, "too little text"),
        ("docs", {"dataset": "x" * 300}, "File name too long"),
        ("shakespeare", {"val_fraction": 1e-9}, "too little text"),
        ("shakespeare", {}, "sha256 is .* expected .*put the file at data/shakespeare/input.txt and run again"),
        ("shakespeare_char", {}, r"cannot be downloaded \(.*put the file at data/shakespeare_char/input.txt and run"),
    ):
        if not settings:
            play.write_text("another play") if name == "shakespeare" else play.unlink()
        with pytest.raises(UserError, match=said):
            make(name, **settings)
        assert list(Path().iterdir()) == []


def test_shakespeare_is_split_as_nanogpt_splits_it():
    dataset = make("shakespeare")
    coder, cut = dataset.tokenizer(), int(len(PLAY) * 0.9)
    assert coder.name == "gpt2"
    assert dataset.train.tolist() == coder.encode(PLAY[:cut])
    assert dataset.val.tolist() == coder.encode(PLAY[cut:])
    assert dataset.meta["sha256"] == hashlib.sha256(PLAY.encode()).hexdigest()


# OpenWebText


class Documents(list):
    """The part of `datasets.Dataset` that is used."""

    def train_test_split(self, test_size: float, seed: int, shuffle: bool) -> dict[str, "Documents"]:
        assert (test_size, seed, shuffle) == (0.0005, 2357, True)
        return {"train": Documents(self[1:]), "test": Documents(self[:1])}

    def iter(self, batch_size: int):
        for start in range(0, len(self), batch_size):
            yield {"text": list(self[start : start + batch_size])}


def test_openwebtext(monkeypatch):
    """Every document ends with the token. Without the package or the network there is one line, and nothing is left."""

    def offline(name, split):
        raise ConnectionError("no route\nto host")

    documents = Documents(f"Document {n}. <|endoftext|> is text here." for n in range(12))
    package = types.ModuleType("datasets")
    for module, load, said in (
        (None, None, r"nanofuse\[data\]"),
        (package, offline, r"ConnectionError: no route$"),
    ):
        monkeypatch.setitem(sys.modules, "datasets", module)
        package.load_dataset = load
        with pytest.raises(UserError, match=said):
            make("openwebtext")
        assert not Path("data").exists()
    package.load_dataset = lambda name, split: documents
    monkeypatch.setattr(prepare, "DOCUMENTS", 5)
    dataset, bpe = make("openwebtext"), GPT2Tokenizer()
    want = [[*bpe.encode_ordinary(text).tolist(), 50256] for text in documents]
    assert dataset.val.tolist() == want[0]
    assert dataset.train.tolist() == [i for ids in want[1:] for i in ids]
