"""Text files and corpora by name to token files. No network: downloads come from files, OpenWebText is replaced."""

import dataclasses
import functools
import gzip
import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from train import corpora, prepare
from train import text as texts
from train.config import compose, parse
from train.corpora import CORPORA, dataset_folder
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
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, empty. `docs` is the text DOCS here, and TinyShakespeare the text of `play`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "gpt2_encoding", RANKS)
    monkeypatch.setattr(corpora, "docs_text", lambda: DOCS)
    for name in ("shakespeare", "shakespeare_char"):
        corpus = dataclasses.replace(CORPORA[name], sha256=hashlib.sha256(PLAY.encode()).hexdigest())
        monkeypatch.setitem(CORPORA, name, corpus)
    handler = SimpleNamespace(SIGTERM=None, signal=lambda *_: None)  # no handler of the command in the tests
    monkeypatch.setattr(prepare, "signal", handler)
    return tmp_path


@pytest.fixture
def play(tmp_path_factory, monkeypatch) -> Path:
    """The file that TinyShakespeare is downloaded from."""
    source = tmp_path_factory.mktemp("network") / "play.txt"
    source.write_text(PLAY)
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", source.as_uri())
    return source


def make(name: str, **settings) -> Dataset:
    return Dataset(Path("data", prepare.prepare([name], PrepareConfig(**settings))[0]))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole_text(dataset: Dataset) -> str:
    return dataset.tokenizer().decode([*dataset.train, *dataset.val])


# The result


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_files_are_encoded_one_after_the_other(monkeypatch, capsys, folder, tokenizer):
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
    said = capsys.readouterr().out
    assert f"data/a/train.bin: {len(ids[0]):,} tokens" in said
    assert dataset.meta["sha256"] in said
    assert ("--block_size=" in said) == (len(ids[1]) <= 256)  # of the default job


def test_nanogpt_reads_the_folder(folder):
    (folder / "a.txt").write_text("hello world, hello moon")
    run("a.txt", "--dataset", "greetings", "--val_fraction=0.5")
    meta = pickle.loads((folder / "data/greetings/meta.pkl").read_bytes())
    train = np.memmap("data/greetings/train.bin", dtype=np.uint16, mode="r")
    assert meta["vocab_size"] == len(meta["itos"]) == len(meta["stoi"]) == 11
    assert "".join(meta["itos"][i] for i in train.tolist()) == "hello world"


def test_an_alphabet_over_65536_takes_uint32(folder):
    text = "".join(map(chr, range(0x10000, 0x20001)))
    (folder / "a.txt").write_text(text)
    run("a.txt")
    dataset = Dataset("data/a")
    assert dataset.train.dtype == np.uint32
    assert whole_text(dataset) == text


def test_documents_end_with_gpt2s_token(folder):
    """Files, lines of .jsonl files and <|endoftext|> in a text; the parts are never divided inside the token's name."""
    poems = folder / "data" / "poems"
    (poems / "b").mkdir(parents=True)
    (poems / "a.txt").write_text("One.<|endoftext|>Two, and more")
    (poems / ".hidden").write_bytes(b"\xff")
    (poems / "b" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Three"}\n{"text": "Four"}\n'))
    (poems / "d.md").write_bytes("\ufeffFive\r\n".encode())
    for fraction in (0.5, 0.9):  # both would begin inside a name: of the token between two files, of that in a.txt
        run("data/poems", "--tokenizer=gpt2", f"--val_fraction={fraction}")
        dataset = Dataset("data/poems")
        assert [*dataset.train, *dataset.val].count(END) == 4
        assert whole_text(dataset) == "<|endoftext|>".join(["One.", "Two, and more", "Three", "Four", "Five\n"])
    # By character they are one text. The files of the dataset, which now lie there too, and the old meta are no part.
    run("data/poems")
    assert whole_text(Dataset("data/poems")) == "One.<|endoftext|>Two, and moreThree\nFour\nFive\n"
    run("data/poems", "--tokenizer=byte")
    assert sorted(os.listdir(poems)) == [".hidden", "a.txt", "b", "d.md", "meta.json", "train.bin", "val.bin"]
    assert Dataset("data/poems").n_vocab == 256


def shell(command: str) -> list[str]:
    """The arguments of a command after `python -m`, as bash reads them."""
    script = "printf '%s\\0' " + command.removeprefix("python -m ")
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("ABSOLUTE/data/poems/input.txt", "poems"),
        ("data/poems/raw/a.txt", "poems"),
        ("data/poems", "poems"),
        ("a.txt.gz", "a"),
        ("songs/v1.2/", "v1.2"),
        ("$HOME; two\nlines\x1b'.txt", "$HOME; two\nlines\x1b'"),
    ],
)
def test_the_name_of_a_dataset_and_the_command_that_trains_on_it(capsys, folder, source, name):
    source = source.replace("ABSOLUTE", str(folder))
    path = Path(source, "text.txt" if source.endswith(("/", "poems")) else "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"To be\n" * 20))
    run(source)
    assert (folder / "data" / name / "train.bin").is_file()
    (command,) = re.findall("train on it with: (.*)", capsys.readouterr().out)
    program, *arguments = shell(command)
    assert program == "train"
    config = compose(parse(arguments), parse(["docs"]).settings)
    Dataset(dataset_folder(config.dataset)).check(config.block_size)


def test_a_dataset_of_other_files_is_replaced_only_by_name(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "input.txt").write_text(TEXT + name)
    run("a/input.txt")
    (folder / "a" / "input.txt").write_text(TEXT + "a, longer")
    run("a/input.txt")  # the same file, changed since
    before = tree(folder)
    with pytest.raises(UserError, match="data/input holds a dataset of other files") as caught:
        run("b/input.txt")
    assert tree(folder) == before
    for option in re.findall(r"--dataset=\w+", str(caught.value)):
        run("b/input.txt", option)
    assert sorted(os.listdir("data")) == ["NAME", "input"]
    assert Dataset("data/input").meta["sha256"] == Dataset("data/NAME").meta["sha256"]
    (folder / "data" / "input" / "meta.json").unlink()  # as nanoGPT's, of which nothing is known
    with pytest.raises(UserError, match="holds a dataset of other files"):
        run("b/input.txt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("poems", r"^data/poems: no such dataset \(did you mean my poems\?\); make it with: "),
        ("./data/poems/", "^data/poems: no such dataset"),
        ("my poems", "^data/my poems: no train.bin; make it with: "),
        ("shakespeare_chars", r"no such dataset \(did you mean shakespeare_char\?\); make it with: "),
        ("a\nb", "no such dataset; make it with: "),
        ("ABSOLUTE/abs", "/abs: no such dataset"),
    ],
)
def test_the_command_that_makes_a_missing_dataset(folder, name, said):
    (folder / "a.txt").write_text(TEXT)
    (folder / "data" / "my poems").mkdir(parents=True)
    there = dataset_folder(name.replace("ABSOLUTE", str(folder)))
    for missing, of in (
        (said, "FILE ... "),
        (r"val\.bin: cannot be read: No such file or directory; make it with: ", ""),
    ):
        with pytest.raises(UserError, match=missing) as caught:
            Dataset(there)
        command = str(caught.value).rpartition("make it with: ")[2]
        assert command.startswith(f"python -m train.prepare {of}")
        run(*shell(command.replace("FILE ...", "a.txt"))[1:])
        Dataset(there)
        (there / "val.bin").unlink()
        (there / "input.txt").write_text(TEXT)  # nanoGPT's place for the text


def test_check_reads_all_of_a_dataset(capsys, folder):
    (folder / "a.txt").write_text("To be\n" * 100)
    run("a.txt", "--dataset=my poems")
    capsys.readouterr()
    run("--check", "my poems")
    assert capsys.readouterr().out == "data/my poems: whole, 540 and 60 tokens below 6\n"
    path = folder / "data" / "my poems" / "val.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"data/my poems/val\.bin: "):
        run("--check", "my poems")
    for name in ("meta.json", "meta.pkl"):  # as GPT-2's BPE, without checksums
        path.with_name(name).unlink()
    run("--check", "my poems")
    assert "540 and 60 tokens below 50,257; its meta has no checksums" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to prepare"),
        (["shakespeare_cher"], "no regular file, folder or corpus (did you mean shakespeare_char?)"),
        (["a.txt", "xyzzy"], "'xyzzy': no regular file, folder or corpus, expected text files or one of docs, "),
        (["pipe"], "'pipe': no regular file, folder or corpus"),
        (["hollow"], "'hollow': no files in this folder"),
        (["a.txt", "--check=nothing"], "check: got 'a.txt' too"),
        (["--check=nothing"], "data/nothing: no such dataset"),
        (["shakespeare", "--bpe_dir=nowhere"], "bpe_dir: nowhere/encoder.json"),
        (["a.txt", "--dataset=" + "x" * 300], "cannot be written: File name too long"),
        (["a.txt", "--dataset=new/../../a.txt/b"], "cannot be written: "),
        (["empty.txt.gz", "--tokenizer=byte"], "empty.txt.gz: empty"),
        (["a.txt", "latin.txt"], "latin.txt: byte 2,003 is not UTF-8"),
        (["a.txt", "cut.txt", "--tokenizer=gpt2"], "cut.txt: byte 2,000 is not UTF-8"),
        (["short.txt"], "val part has 1 tokens"),
        (["a.txt", "--val_fraction=1.0"], "val_fraction: got 1.0"),
        (["docs.txt"], "dataset: got 'docs', expected a name, and not that of a corpus"),
        (["openwebtext", "--tokenizer=char"], "openwebtext: made as nanoGPT makes it"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(monkeypatch, folder, arguments, message):
    (folder / "a.txt").write_text(TEXT)
    (folder / "docs.txt").write_text(TEXT)
    (folder / "short.txt").write_text("12345678")
    (folder / "empty.txt.gz").write_bytes(gzip.compress(b""))
    (folder / "hollow").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "latin.txt").write_bytes(b"a" * 2000 + "abé".encode()[:2] + b"c\xe9" + b"a" * 200)
    (folder / "cut.txt").write_bytes(b"a" * 2000 + "€".encode()[:2])
    monkeypatch.setattr(texts, "CHUNK", 1000)
    before = tree(folder)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    assert tree(folder) == before
    assert not (folder / "data").exists()


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_after_an_end_between_two_renames_there_is_no_mixture(monkeypatch, folder, failing):
    (folder / "a.txt").write_text(TEXT)
    run("a.txt")
    results = [*[mock.DEFAULT] * (failing - 1), KeyboardInterrupt]
    monkeypatch.setattr(os, "replace", mock.Mock(wraps=os.replace, side_effect=results))
    with pytest.raises(KeyboardInterrupt):
        run("a.txt", "--val_fraction=0.2")
    assert not (folder / "data/a/train.bin").exists()
    assert not list(Path("data/a").glob(".*"))


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(folder):
    (folder / "a.txt").write_text(TEXT)
    (folder / "data/a/.staging-dead").mkdir(parents=True)
    (folder / "data/a/.staging-dead/train.bin").write_text("half")
    with staging_folder(folder / "data/a") as used:
        assert os.listdir("data/a") == [used.name]
        run("a.txt")
        assert used.is_dir()
    assert sorted(os.listdir("data/a")) == ["meta.json", "meta.pkl", "train.bin", "val.bin"]


def test_a_file_that_changes_while_it_is_read_is_refused(monkeypatch, folder):
    path = folder / "a.txt"
    path.write_text(TEXT)

    def between_the_passes(*arguments):
        path.write_text(TEXT.replace("To", "%$"))
        return texts.split_at(*arguments)

    monkeypatch.setattr(prepare, "split_at", between_the_passes)
    with pytest.raises(UserError, match="changed while being read"):
        run("a.txt")
    assert not (folder / "data").exists()


# Corpora by name


def test_docs_is_made_once_and_again_only_by_the_command(monkeypatch):
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
    with pytest.raises(UserError, match=r"meta\.json: cannot be read"):
        ensure_docs(folder, pytest.fail)
    make("docs")
    ensure_docs(folder, lines.append)
    for name in ("meta.json", "meta.pkl"):  # as another program leaves a dataset of that name
        (folder / name).unlink()
    ensure_docs(folder, pytest.fail)


@pytest.mark.parametrize(("name", "text"), [("docs", DOCS), ("shakespeare_char", PLAY)])
def test_what_others_made_under_the_name_of_a_corpus_stays(play, name, text):
    with pytest.raises(UserError, match=f"no such dataset; make it with: python -m train.prepare {name}$"):
        Dataset(Path("data", name))
    path = Path("data", name, "input.txt")
    path.parent.mkdir(parents=True)
    path.write_text("my own")
    with pytest.raises(UserError, match=r"input\.txt: the text's sha256 is .* expected .*; put the corpus's own there"):
        make(name)
    assert [path.read_text() for path in path.parent.iterdir()] == ["my own"]
    path.write_text(text)
    play.unlink()  # what lies there is not downloaded
    assert len(make(name).train) == int(len(text) * 0.9)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"input\.txt: cannot be read: Is a directory"):
        make(name)


@pytest.mark.parametrize(
    ("downloaded", "said"), [("another play", "sha256 is"), (None, r"cannot be downloaded \(.*; put the file into")]
)
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(play, downloaded, said):
    play.unlink() if downloaded is None else play.write_text(downloaded)
    with pytest.raises(UserError, match=said):
        make("shakespeare_char")
    assert list(Path().iterdir()) == []


def test_shakespeare_has_gpt2s_tokens(play):
    dataset = make("shakespeare")
    assert dataset.tokenizer().name == "gpt2"
    assert whole_text(dataset) == PLAY
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
    package = SimpleNamespace(load_dataset=load)
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
