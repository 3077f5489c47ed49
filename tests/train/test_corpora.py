"""The corpora by name, without a network: downloads come from files, OpenWebText is replaced."""

import hashlib
import sys
import types
from pathlib import Path

import pytest

from train import corpora, prepare
from train.corpora import docs_text
from train.data import Dataset
from train.errors import UserError
from train.prepare import PrepareConfig, ensure_docs, write_corpus, write_openwebtext
from train.text import GPT2Tokenizer

TEXT = "The library reference.\n" * 1000

# docs


@pytest.mark.slow
def test_docs_is_plain_text_of_the_expected_size():
    text = docs_text()
    assert 1_500_000 < len(text) < 2_200_000
    assert set(text) == {"\n", *map(chr, range(32, 127))}
    assert 'The "assert" statement' in text  # from the language reference
    assert "Return the sum of a 'start' value" in text or "Base class for" in text  # from a docstring


def test_ensure_docs_makes_it_once_and_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "docs_text", lambda: TEXT)
    lines = []
    ensure_docs(tmp_path / "data" / "docs", lines.append)
    dataset = Dataset(tmp_path / "data" / "docs")
    assert (len(dataset.train), len(dataset.val)) == (20_700, 2_300)
    assert dataset.tokenizer().decode(dataset.val) == TEXT[20_700:]
    monkeypatch.setattr(corpora, "docs_text", lambda: pytest.fail("made again"))
    ensure_docs(tmp_path / "data" / "docs", lines.append)
    assert lines[0] == lines[1]
    assert "23,000 characters" in lines[0]
    assert hashlib.sha256(TEXT.encode()).hexdigest() in lines[0]


@pytest.mark.parametrize("damage", ["", "{", "[]", "[" * 100_000])
def test_docs_that_are_damaged_are_made_anew_by_the_command_that_is_named(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpora, "docs_text", lambda: TEXT)
    folder = Path("data", "docs")
    ensure_docs(folder, lambda line: None)
    (folder / "meta.json").write_text(damage)
    with pytest.raises(UserError, match=r"cannot be read: .*; python -m train\.prepare docs makes it anew"):
        ensure_docs(folder, lambda line: None)
    prepare.prepare(["docs"], PrepareConfig())
    ensure_docs(folder, lambda line: None)


def test_what_was_fetched_for_a_dataset_that_cannot_be_goes_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpora, "docs_text", lambda: TEXT)
    for config in (
        PrepareConfig(tokenizer="gpt2", bpe_dir="nowhere"),
        PrepareConfig(val_fraction=1e-9),
        PrepareConfig(dataset="x" * 300),
    ):
        with pytest.raises(UserError):
            prepare.prepare(["docs"], config)
        assert list(tmp_path.iterdir()) == []
    Path("data/docs").mkdir(parents=True)
    Path("data/docs/input.txt").mkdir()
    with pytest.raises(UserError, match=r"data/docs/input\.txt: cannot be read: Is a directory"):
        prepare.prepare(["docs"], PrepareConfig())


# TinyShakespeare and downloads


PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20


@pytest.fixture
def play(tmp_path, monkeypatch):
    """TinyShakespeare is the text PLAY, downloaded from a file."""
    source = tmp_path / "source.txt"
    source.write_text(PLAY)
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", source.as_uri())
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    return source


def test_shakespeare_is_downloaded_and_split_as_nanogpt_splits_it(tmp_path, play):
    folder = tmp_path / "data" / "shakespeare"
    write_corpus(folder, "shakespeare", "gpt2")
    dataset = Dataset(folder)
    coder = dataset.tokenizer()
    cut = int(len(PLAY) * 0.9)
    assert dataset.train.tolist() == coder.encode(PLAY[:cut])
    assert dataset.val.tolist() == coder.encode(PLAY[cut:])
    assert dataset.meta["sha256"] == hashlib.sha256(PLAY.encode()).hexdigest()


def test_shakespeare_takes_the_file_that_is_there_but_no_other(tmp_path, play):
    folder = tmp_path / "shakespeare_char"
    folder.mkdir()
    (folder / "input.txt").write_text("To be")
    with pytest.raises(UserError, match=r"input\.txt: sha256 is .* expected .*delete it"):
        write_corpus(folder, "shakespeare", "char")
    assert [path.name for path in folder.iterdir()] == ["input.txt"]
    play.rename(folder / "input.txt")
    write_corpus(folder, "shakespeare", "char")
    assert len(Dataset(folder).train) == int(len(PLAY) * 0.9)


def test_no_network_leaves_nothing_and_says_where_to_put_the_file(tmp_path, play):
    play.unlink()
    folder = tmp_path / "data" / "shakespeare"
    with pytest.raises(UserError, match=rf"cannot be downloaded.*put the file at {folder / 'input.txt'}"):
        write_corpus(folder, "shakespeare", "char")
    assert not (tmp_path / "data").exists()
    play.write_text("another play")
    with pytest.raises(UserError, match=r"sha256 is .* put the file at"):
        write_corpus(folder, "shakespeare", "char")
    assert not (tmp_path / "data").exists()


# OpenWebText


class Documents(list):
    """The part of `datasets.Dataset` that is used."""

    def train_test_split(self, test_size: float, seed: int, shuffle: bool) -> dict[str, "Documents"]:
        assert (test_size, seed, shuffle) == (0.0005, 2357, True)
        return {"train": Documents(self[1:]), "test": Documents(self[:1])}

    def iter(self, batch_size: int):
        for start in range(0, len(self), batch_size):
            yield {"text": list(self[start : start + batch_size])}


def test_openwebtext_ends_every_document(tmp_path, monkeypatch):
    documents = Documents(f"Document {n}. <|endoftext|> is text here." for n in range(12))
    package = types.ModuleType("datasets")
    package.load_dataset = lambda name, split: documents
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setattr(prepare, "DOCUMENTS", 5)
    write_openwebtext(tmp_path / "owt")
    bpe = GPT2Tokenizer()
    want = [[*bpe.encode_ordinary(text).tolist(), 50256] for text in documents]
    dataset = Dataset(tmp_path / "owt")
    assert dataset.val.tolist() == want[0]
    assert dataset.train.tolist() == [i for ids in want[1:] for i in ids]


def test_openwebtext_without_its_package_or_network(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"nanofuse\[data\]"):
        write_openwebtext(tmp_path / "owt")
    package = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", package)

    def offline(name, split):
        raise ConnectionError("no route\nto host")

    package.load_dataset = offline
    with pytest.raises(UserError, match=r"ConnectionError: no route$"):
        write_openwebtext(tmp_path / "owt")
    assert not (tmp_path / "owt").exists()
