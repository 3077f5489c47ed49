"""The corpora by name, without a network: downloads come from files, OpenWebText is replaced."""

import functools
import hashlib
import pickle
import sys
import types
from pathlib import Path
from unittest import mock

import pytest

from train import corpora, prepare
from train import text as texts
from train.corpora import docs_text
from train.data import Dataset
from train.errors import UserError
from train.prepare import PrepareConfig, ensure_docs
from train.text import GPT2Tokenizer

DOCS = "The library reference.\n" * 1000
RANKS = functools.cache(texts.gpt2_encoding)  # reading them takes most of a test's time
PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20


@pytest.fixture(autouse=True)
def play(tmp_path, monkeypatch) -> Path:
    """In an empty current folder `docs` is the text DOCS, TinyShakespeare the text PLAY, downloaded from this file."""
    source = tmp_path / "source.txt"
    source.write_text(PLAY)
    monkeypatch.setattr(texts, "gpt2_encoding", RANKS)
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


def test_docs_is_made_once_and_again_only_by_the_command_that_is_named(monkeypatch):
    lines, folder = [], Path("data", "docs")
    ensure_docs(folder, lines.append)
    dataset = Dataset(folder)
    assert (len(dataset.train), len(dataset.val)) == (20_700, 2_300)
    assert dataset.tokenizer().decode(dataset.val) == DOCS[20_700:]
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "docs_text", lambda: pytest.fail("made again"))
        ensure_docs(folder, lines.append)
    assert lines[0] == lines[1]
    assert "23,000 characters" in lines[0]
    assert hashlib.sha256(DOCS.encode()).hexdigest() in lines[0]
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read: .*; python -m train\.prepare docs makes it again"):
        ensure_docs(folder, pytest.fail)
    make("docs")
    ensure_docs(folder, lines.append)


@pytest.mark.parametrize(("name", "text"), [("docs", DOCS), ("shakespeare_char", PLAY)])
def test_what_others_made_under_the_name_of_a_corpus_stays(play, name, text):
    with pytest.raises(UserError, match=f"no such dataset; make it with: python -m train.prepare {name}$"):
        Dataset(Path("data", name))
    path = Path("data", name, "input.txt")
    path.parent.mkdir(parents=True)
    path.write_text("my own")
    with pytest.raises(UserError, match=r"input\.txt: sha256 is .* expected .*; delete it to have the corpus's own"):
        make(name)
    assert [path.read_text() for path in path.parent.iterdir()] == ["my own"]
    path.write_text(text)
    play.unlink()  # what lies there is not downloaded
    assert len(make(name).train) == int(len(text) * 0.9)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"input\.txt: cannot be read: Is a directory"):
        make(name)


def test_nanogpts_folder_of_the_name_docs_stays():
    folder = Path("data/docs")
    folder.mkdir(parents=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 300}))
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(b"\1\0\2\0")
    ensure_docs(folder, pytest.fail)
    assert Dataset(folder).train.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "val_fraction", "downloaded", "said"),
    [
        ("docs", 1e-9, None, "too little text"),
        ("shakespeare_char", 1e-9, PLAY, "too little text"),
        (
            "shakespeare_char",
            0.1,
            "another play",
            "sha256 is .*; put the file at data/shakespeare_char/input.txt",
        ),
        (
            "shakespeare_char",
            0.1,
            None,
            r"cannot be downloaded \(.*; put the file at data/shakespeare_char/",
        ),
    ],
)
def test_what_was_fetched_for_a_dataset_that_cannot_be_goes_again(play, name, val_fraction, downloaded, said):
    play.unlink() if downloaded is None else play.write_text(downloaded)
    with pytest.raises(UserError, match=said):
        make(name, val_fraction=val_fraction)
    assert list(Path().iterdir()) == []


def test_shakespeare_has_gpt2s_tokens():
    dataset = make("shakespeare")
    assert dataset.tokenizer().name == "gpt2"
    assert dataset.tokenizer().decode([*dataset.train, *dataset.val]) == PLAY
    assert dataset.meta["sha256"] == hashlib.sha256(PLAY.encode()).hexdigest()


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
    documents = Documents(f"Document {n}. <|endoftext|>" for n in range(12))
    load = mock.Mock(side_effect=[ConnectionError("no route\nto host"), documents])
    package = types.SimpleNamespace(load_dataset=load)
    monkeypatch.setattr(prepare, "DOCUMENTS", 5)
    for module, said in ((None, r"nanofuse\[data\]"), (package, "ConnectionError: no route$")):
        monkeypatch.setitem(sys.modules, "datasets", module)
        with pytest.raises(UserError, match=said):
            make("openwebtext")
        assert not Path("data").exists()
    dataset, bpe = make("openwebtext"), GPT2Tokenizer()
    want = [[*bpe.encode_ordinary(text).tolist(), 50256] for text in documents]
    assert dataset.val.tolist() == want[0]
    assert dataset.train.tolist() == [i for ids in want[1:] for i in ids]
