"""Text files and corpora by name to token files. No network: downloads come from files, OpenWebText is replaced."""

import functools
import gzip
import hashlib
import os
import pickle
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from train import corpora, prepare
from train import text as texts
from train.config import compose, parse
from train.corpora import dataset_folder
from train.data import Dataset
from train.errors import UserError
from train.files import staging_folder
from train.prepare import PrepareConfig, ensure_docs
from train.text import GPT2Tokenizer

DOCS = "The library reference.\n" * 1000
PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20
TEXT = "To be, or not to be: that's the question.\nOb's edler im Gemüt, €, die Pfeil' … 生存还是毁灭。\n" * 30
END = 50256
RANKS = functools.cache(texts.gpt2_encoding)  # reading them takes most of a test's time


def run(*arguments: str) -> None:
    prepare.main(list(arguments))


@pytest.fixture(autouse=True)
def play(tmp_path, tmp_path_factory, monkeypatch) -> Path:
    """The file that TinyShakespeare is downloaded from. The current folder is empty, and `docs` is the text DOCS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "gpt2_encoding", RANKS)
    monkeypatch.setattr(corpora, "docs_text", lambda: DOCS)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # no handler of the command in the tests
    source = tmp_path_factory.mktemp("network") / "play.txt"
    source.write_text(PLAY)
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", source.as_uri())
    for name in ("shakespeare", "shakespeare_char"):
        corpus = corpora.CORPORA[name]._replace(sha256=hashlib.sha256(PLAY.encode()).hexdigest())
        monkeypatch.setitem(corpora.CORPORA, name, corpus)
    return source


def make(name: str, **settings) -> Dataset:
    return Dataset(Path("data", prepare.prepare([name], PrepareConfig(**settings))[0]))


def tree() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def whole_text(dataset: Dataset) -> str:
    return dataset.tokenizer().decode_bytes([*dataset.train, *dataset.val]).decode("utf-8", "replace")


# The result


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_files_are_encoded_one_after_the_other(monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(texts, "CHUNK", 7)
    parts = [TEXT[:1000].encode(), TEXT[1000:].encode()]
    if tokenizer == "byte":  # which stay as they are
        parts = ["\ufeff".encode() + parts[0] + b"\r\n", bytes(range(256)) + parts[1]]
    Path("a.txt").write_bytes(parts[0])
    Path("b.txt").write_bytes(parts[1])
    run("a.txt", "b.txt", f"--tokenizer={tokenizer}")
    dataset = Dataset("data/a")
    text = (b"<|endoftext|>" if tokenizer == "gpt2" else b"").join(parts)
    text, encode = (text, list) if tokenizer == "byte" else (text.decode(), dataset.tokenizer().encode)
    cut = int(len(text) * 0.9)
    ids = [encode(text[:cut]), encode(text[cut:])]
    assert [dataset.train.tolist(), dataset.val.tolist()] == ids
    assert (dataset.meta["train_tokens"], dataset.meta["val_tokens"]) == (len(ids[0]), len(ids[1]))
    if tokenizer == "char":  # nanoGPT's scripts read it
        meta = pickle.loads(Path("data/a/meta.pkl").read_bytes())
        assert meta["vocab_size"] == len(meta["itos"]) == len(meta["stoi"])
        assert "".join(meta["itos"][i] for i in np.fromfile("data/a/train.bin", "<u2").tolist()) == text[:cut]
    said = capsys.readouterr().out
    assert f"data/a/train.bin: {len(ids[0]):,} tokens" in said
    assert hashlib.sha256(text if tokenizer == "byte" else text.encode()).hexdigest() in said


def test_an_alphabet_over_65536_takes_uint32():
    text = "".join(map(chr, range(0x10000, 0x20001)))
    Path("a.txt").write_text(text)
    assert whole_text(make("a.txt")) == text


def test_documents_end_with_gpt2s_token():
    """Files, lines of .jsonl files and <|endoftext|> in a text; the parts are never divided inside the token's name."""
    poems = Path("data/poems")
    (poems / "b").mkdir(parents=True)
    (poems / "a.txt").write_text("One.<|endoftext|>Two, and more")
    (poems / ".hidden").mkdir()
    (poems / ".hidden" / "a.txt").write_bytes(b"\xff")
    (poems / "b" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Three"}\n{"text": "Four"}\n'))
    (poems / "d.md").write_bytes("\ufeffFive\r\n".encode())
    for fraction in (0.5, 0.9):  # both would begin inside a name: of the token between two files, of that in a.txt
        dataset = make("data/poems", tokenizer="gpt2", val_fraction=fraction)
        assert [*dataset.train, *dataset.val].count(END) == 4
        assert whole_text(dataset) == "<|endoftext|>".join(["One.", "Two, and more", "Three", "Four", "Five\n"])
    # By character they are one text. The files of the dataset, which now lie there too, and the old meta are no part.
    assert whole_text(make("data/poems")) == "One.<|endoftext|>Two, and moreThree\nFour\nFive\n"
    make("data/poems", tokenizer="byte")
    assert sorted(os.listdir(poems)) == [".hidden", "a.txt", "b", "d.md", "meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_short_documents_are_encoded_together(monkeypatch, tokenizer):
    calls, kind = [], {"char": texts.CharTokenizer, "byte": texts.ByteTokenizer}[tokenizer]
    encode = kind.encode_array
    monkeypatch.setattr(kind, "encode_array", lambda self, text: calls.append(len(text)) or encode(self, text))
    Path("a.jsonl").write_text('{"text": "To be"}\n' * 1000)
    assert whole_text(make("a.jsonl", tokenizer=tokenizer)) == "To be\n" * 1000
    assert calls == [5400, 600]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/poems/raw/a.txt", "poems"),
        ("data/poems/", "poems"),
        ("songs/a.txt.gz", "a"),
        ("songs/v1.2/", "v1.2"),
    ],
)
def test_the_name_of_a_dataset(source, name):
    path = Path(source) / ("text.txt" if source.endswith("/") else "")
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"To be\n" * 20))
    assert make(os.path.abspath(source)).folder == Path("data", name)


def test_a_dataset_of_other_files_is_replaced_only_by_name():
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "input.txt").write_text(TEXT + name)
    run("a/input.txt")
    Path("a", "input.txt").write_text(TEXT + "a, longer")
    run("a/input.txt")  # the same file, changed since
    before = tree()
    with pytest.raises(UserError, match="data/input holds a dataset of other files") as caught:
        run("b/input.txt")
    assert tree() == before
    for option in re.findall(r"--dataset=\w+", str(caught.value)):
        run("b/input.txt", option)
    assert sorted(os.listdir("data")) == ["NAME", "input"]
    assert whole_text(Dataset("data/input")) == TEXT + "b"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./data/poems/", r"^data/poems: no such dataset \(did you mean my poems\?\); "),
        ("my poems", "^data/my poems: no train.bin; "),
        ("ABSOLUTE/abs", "/abs: no such dataset; "),
    ],
)
def test_the_command_that_makes_a_missing_dataset(name, said):
    """Of a file of the user's, or of nanoGPT's input.txt in the folder, where a part of the dataset is lost."""
    Path("data", "my poems").mkdir(parents=True)
    there = dataset_folder(name.replace("ABSOLUTE", os.getcwd()))
    for tokenizer in (None, "char", "byte"):
        if tokenizer:
            there.joinpath("input.txt").write_text(TEXT)
            run(str(there / "input.txt"), f"--dataset={there}", f"--tokenizer={tokenizer}")
            Dataset(there).path("val").unlink()
            said = r"val\.bin: cannot be read: No such file or directory; "
        with pytest.raises(UserError, match=f"{said}make it with: ") as caught:
            Dataset(there)
        command = str(caught.value).rpartition("python -m train.prepare ")[2]
        if not tokenizer:
            Path("a.txt").write_text(TEXT)
            command = command.replace("FILE ...", "a.txt")
        run(*shlex.split(command))
        assert Dataset(there).meta["tokenizer"] == (tokenizer or "char")


@pytest.mark.parametrize(("size", "block_size"), [(20, 1), (2560, 64), (2600, 256)])
def test_the_command_that_trains_on_a_dataset_works(capsys, size, block_size):
    Path("a b.txt").write_text("To be, or not to be\n" * (size // 20))
    run("a b.txt")
    (command,) = re.findall("train on it with: python -m train (.*)", capsys.readouterr().out)
    config = compose(parse(shlex.split(command)), parse(["docs"]).settings)
    assert config.block_size == block_size
    Dataset(dataset_folder(config.dataset)).check(block_size)


def test_check_reads_all_of_a_dataset(capsys):
    Path("a.txt").write_text("To be\n" * 100)
    path = make("a.txt").path("val")
    run("--check", "a")
    assert capsys.readouterr().out == "data/a: whole, 540 and 60 tokens below 6\n"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"data/a/val\.bin: "):
        run("--check", "a")
    for name in ("meta.json", "meta.pkl"):  # as GPT-2's BPE, without checksums
        path.with_name(name).unlink()
    run("--check", "a")
    assert "540 and 60 tokens below 50,257; its meta has no checksums" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to prepare"),
        (["shakespeare_cher"], "no regular file, folder or corpus (did you mean shakespeare_char?)"),
        (["a.txt", "pipe"], "'pipe': no regular file, folder or corpus, expected text files or one of docs, "),
        (["hollow"], "'hollow': no files in this folder"),
        (["a.txt", "--check=nothing"], "check: got 'a.txt' too"),
        (["shakespeare", "--bpe_dir=nowhere"], "bpe_dir: nowhere/encoder.json"),
        (["a.txt", "--dataset=new/../../a.txt/b"], "cannot be written: "),
        (["empty.txt.gz", "--tokenizer=byte"], "empty.txt.gz: empty"),
        (["a.txt", "latin.txt"], "latin.txt: byte 20,003 is not UTF-8"),
        (["short.txt"], "val part has 1 tokens"),
        (["docs.txt"], "dataset: got 'docs', expected a name, and not that of a corpus"),
        (["openwebtext", "--tokenizer=char"], "openwebtext: made as nanoGPT makes it"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(monkeypatch, arguments, message):
    for name, text in (("a", TEXT), ("docs", TEXT), ("short", "12345678")):
        Path(f"{name}.txt").write_text(text)
    Path("empty.txt.gz").write_bytes(gzip.compress(b""))
    Path("hollow").mkdir()
    os.mkfifo("pipe")
    Path("latin.txt").write_bytes(b"a" * 20_000 + "abé".encode()[:2] + b"c\xe9" + b"a" * 200)
    monkeypatch.setattr(texts, "CHUNK", 1000)
    before = tree()
    with pytest.raises(UserError, match=re.escape(message)):
        run(*arguments)
    assert tree() == before
    assert not Path("data").exists()


def test_a_file_that_changes_while_it_is_read(monkeypatch):
    Path("a.txt").write_text("ab" * 1000)
    pieces = mock.Mock(side_effect=[iter(["ab" * 1000]), iter(["ac" * 1000])])
    monkeypatch.setattr(prepare, "read_text", pieces)
    with pytest.raises(UserError, match=r"a\.txt: changed while being read; run again"):
        run("a.txt")
    assert not Path("data").exists()


def test_a_folder_that_cannot_be_read_is_named(monkeypatch):
    Path("poems").mkdir()
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=PermissionError(13, "Permission denied", "poems")))
    with pytest.raises(UserError, match="'poems': cannot be read: Permission denied"):
        run("poems")


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_after_an_end_between_two_renames_there_is_no_mixture(monkeypatch, failing):
    """And what a killed process left is removed, what a living one uses is not."""
    Path("a.txt").write_text(TEXT)
    run("a.txt")
    Path("data/a/.staging-dead").mkdir()
    results = [*[mock.DEFAULT] * (failing - 1), KeyboardInterrupt]
    monkeypatch.setattr(os, "replace", mock.Mock(wraps=os.replace, side_effect=results))
    with staging_folder(Path("data/a")) as used:
        with pytest.raises(KeyboardInterrupt):
            run("a.txt", "--val_fraction=0.2")
        assert not Path("data/a/train.bin").exists()
        assert list(Path("data/a").glob(".*")) == [used]


# Corpora by name


def test_docs_is_made_once(monkeypatch):
    lines, folder = [], Path("data", "docs")
    ensure_docs(folder, lines.append)
    dataset = Dataset(folder)
    assert (len(dataset.train), len(dataset.val)) == (20_700, 2_300)
    assert whole_text(dataset) == DOCS
    monkeypatch.setattr(prepare, "prepare", lambda *_: pytest.fail("made again"))
    ensure_docs(folder, lines.append)
    digest = hashlib.sha256(DOCS.encode()).hexdigest()
    assert lines == [f"docs: 23,000 characters of Python's own documentation, sha256 {digest}"] * 2
    for name in ("meta.json", "meta.pkl"):  # as another program leaves a dataset of that name
        (folder / name).unlink()
    ensure_docs(folder, pytest.fail)


def test_shakespeare_is_downloaded_once(play):
    with pytest.raises(UserError, match=r"make it with: python -m train\.prepare shakespeare_char$"):
        Dataset("data/shakespeare_char")
    assert whole_text(make("shakespeare_char")) == PLAY
    play.unlink()  # what lies there is not downloaded
    assert whole_text(make("shakespeare_char")) == PLAY
    with pytest.raises(UserError, match=r"cannot be downloaded \(.*; put the file into"):
        make("shakespeare")
    play.write_text("another play")
    with pytest.raises(UserError, match="sha256 is"):
        make("shakespeare")
    assert os.listdir("data") == ["shakespeare_char"]
    play.write_text(PLAY)
    assert make("shakespeare").tokenizer().name == "gpt2"


@pytest.mark.parametrize("name", ["docs", "shakespeare"])
def test_another_text_under_the_name_of_a_corpus_stays(name):
    path = Path("data", name, "input.txt")
    path.parent.mkdir(parents=True)
    path.write_text(TEXT)
    with pytest.raises(UserError, match=r"input\.txt: the text's sha256 is .* expected .*; move it away, or ") as told:
        make(name)
    assert tree() == {str(path): TEXT.encode()}
    run(*shlex.split(str(told.value).partition("train.prepare ")[2].replace("NAME", "mine")))
    assert whole_text(Dataset("data/mine")) == TEXT


class Documents(list):
    def iter(self, batch_size: int):
        return ({"text": self[start : start + batch_size]} for start in range(0, len(self), batch_size))


def test_openwebtext(monkeypatch):
    """Every document ends with the token. Without the package or the network there is one line, and nothing is left."""
    documents = Documents(f"Document {n}. <|endoftext|>" for n in range(12))
    whole, package = mock.Mock(), mock.Mock()
    whole.train_test_split.return_value = {"train": Documents(documents[1:]), "test": Documents(documents[:1])}
    package.load_dataset.side_effect = [ConnectionError("no route\nto host"), whole]
    monkeypatch.setattr(prepare, "DOCUMENTS", 5)
    for module, said in ((None, r"nanofuse\[data\]"), (package, "ConnectionError: no route$")):
        monkeypatch.setitem(sys.modules, "datasets", module)
        with pytest.raises(UserError, match=said):
            make("openwebtext")
        assert not Path("data").exists()
    dataset, bpe = make("openwebtext"), GPT2Tokenizer()
    whole.train_test_split.assert_called_once_with(test_size=0.0005, seed=2357, shuffle=True)  # as nanoGPT splits
    want = [[*bpe.encode_ordinary(text).tolist(), 50256] for text in documents]
    assert dataset.val.tolist() == want[0]
    assert dataset.train.tolist() == [i for ids in want[1:] for i in ids]
