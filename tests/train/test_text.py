"""Text read in pieces, to ids and back, and where GPT-2's ranks come from."""

import gzip
import io
import json
import os
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train import text as texts
from train.errors import UserError
from train.text import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    from_meta,
    read_text,
    split_at,
    whole_words,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@given(text=TEXT)
def test_char_round_trip_through_its_meta(text):
    made = CharTokenizer(sorted(set(text) | {"a"}))
    read = from_meta(made.meta())
    assert read.decode(made.encode(text)) == text
    assert read.n_vocab == len(set(text) | {"a"})


@given(text=TEXT)
def test_byte_round_trip(text):
    byte = from_meta(ByteTokenizer().meta())
    ids = byte.encode(text)
    assert ids == list(text.encode())
    assert byte.decode(ids) == text


@given(text=TEXT)
@settings(max_examples=50)
def test_gpt2_round_trip(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode_ordinary(text).tolist() == gpt2._bpe.encode_ordinary(text)


def test_gpt2_known_ids(gpt2):
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("<|endoftext|>") == [50256]
    assert gpt2.encode_ordinary("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.n_vocab == 50257


def test_byte_keeps_what_the_command_line_could_not_decode():
    assert ByteTokenizer().encode(b"\xff!".decode("utf-8", "surrogateescape")) == [0xFF, ord("!")]


def test_char_names_the_character_it_lacks():
    with pytest.raises(ValueError, match="'é'"):
        CharTokenizer("abc").encode("abé")


@pytest.mark.parametrize("token", [-1, 256, 60000])
def test_an_unknown_id_is_an_error(gpt2, token):
    coders = [CharTokenizer("abc"), ByteTokenizer(), *([gpt2] if not 0 <= token < 50257 else [])]
    for coder in coders:
        with pytest.raises(ValueError, match=str(token)):
            coder.decode([token])


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"tokenizer": "words"},
        {"tokenizer": "char"},
        {"tokenizer": "char", "chars": ["a", "a"]},
        {"tokenizer": "char", "chars": ["ab"]},
        {"tokenizer": "char", "chars": [1]},
        {"tokenizer": "char", "chars": ["a", "b"], "vocab_size": 1},
        {"tokenizer": "char", "chars": ["a", "b"], "vocab_size": "2"},
        {"tokenizer": "char", "chars": None},
        {"tokenizer": ["char"]},
        "char",
        None,
        7,
    ],
)
def test_a_meta_that_does_not_describe_a_tokenizer_is_refused(meta):
    with pytest.raises(UserError):
        from_meta(meta)


def test_bpe_dir_is_used_and_checked(tmp_path, gpt2):
    with pytest.raises(UserError, match=r"encoder\.json"):
        GPT2Tokenizer(tmp_path)
    path = tmp_path / "encoder.json"
    shutil.copy(texts._packaged_encoder(), path)
    assert GPT2Tokenizer(tmp_path).encode("hello world") == [31373, 995]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match="sha256"):
        GPT2Tokenizer(tmp_path)


def test_without_package_and_network_the_error_says_what_to_do(monkeypatch):
    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(texts, "_packaged_encoder", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"offline.*--bpe_dir"):
        GPT2Tokenizer()


# In pieces

WORDS = st.text(st.sampled_from("ab'sl ré\n\t\u00a0\x1c生。\uff112½,.!_\u0301\u2028"), max_size=80)


@given(text=WORDS, size=st.integers(1, 20))
@example(text="it's 'll  we'll\n\n x", size=1)
@settings(max_examples=100, deadline=None)
def test_bpe_in_pieces_is_bpe_of_the_whole(gpt2, text, size):
    want = gpt2.encode_ordinary(text).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHUNK", size)
        pieces = list(whole_words(text[i : i + size] for i in range(0, len(text), size)))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in gpt2.encode_ordinary(piece).tolist()] == want


def test_words_are_not_held_for_ever(monkeypatch):
    monkeypatch.setattr(texts, "CHUNK", 10)
    monkeypatch.setattr(texts, "LONGEST_WORD", 100)
    pieces = list(whole_words(["aaaaa"] * 1000))
    assert "".join(pieces) == "a" * 5000
    assert max(map(len, pieces)) < 120
    assert all(len(piece) < 30 for piece in whole_words(["one two "] * 100))


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50),
    chunk=st.integers(1, 9),
    cut=st.floats(0, 1),
    mark=st.booleans(),
    pack=st.booleans(),
)
@example(text="a\r\n\rb", chunk=2, cut=0.5, mark=True, pack=False)
@example(text="%PD", chunk=1, cut=0.5, mark=False, pack=False)
def test_text_is_read_and_split_whole(tmp_path_factory, text, chunk, cut, mark, pack):
    """In pieces, packed or not, with a byte order mark or not; line ends are those of Python's text files."""
    path = tmp_path_factory.getbasetemp() / "text.txt"
    data = ("\ufeff".encode() if mark else b"") + text.encode()
    path.write_bytes(gzip.compress(data) if pack else data)
    with path.open("rb") as file, io.TextIOWrapper(gzip.open(file) if pack else file, "utf-8-sig") as ours:
        text = ours.read()
    size = int(len(text) * cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHUNK", chunk)
        first, second = split_at(read_text([path]), size)
        assert "".join(first) == text[:size]
        assert "".join(second) == text[size:]


def read(path: Path, between: str = "") -> str:
    return "".join(read_text([path], between=between))


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "UTF-16, expected UTF-8 text"),
        ("utf-32", "UTF-32, expected UTF-8 text"),
        ("utf-16-le", "it has bytes of zero as UTF-16LE has, expected UTF-8 text"),
        ("utf-16-be", "it has bytes of zero as UTF-16BE has, expected UTF-8 text"),
        ("latin-1", "byte 17 is not UTF-8 (invalid start byte), expected UTF-8 text; if it is Latin-1"),
    ],
)
def test_another_encoding_is_named_and_the_command_that_helps_works(tmp_path, monkeypatch, encoding, said):
    monkeypatch.chdir(tmp_path)
    text, path = "Ob's edler im Gemüt, die Pfeil und Schleudern\n", Path("my 'poems'.txt")
    path.write_bytes(text.encode(encoding))
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {said}: iconv ")
    command = str(caught.value).rpartition(": ")[2]
    subprocess.run(command, shell=True, check=True)
    assert read(Path(shlex.split(command)[-1])) == text


def test_archives_are_named_and_a_damaged_gzip_file_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "To be")
    with pytest.raises(UserError, match=r"a\.txt: a zip archive, expected UTF-8 text: unpack it"):
        read(path)
    whole = gzip.compress(os.urandom(1000))
    for data in (whole[:500], whole[:-8] + bytes(8), whole[:10] + b"x" * 100):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.txt: a damaged gzip file|a\.txt: byte \d+ is not UTF-8"):
            read(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: (Is a directory|not a regular file)"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_documents_of_a_jsonl_file(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(texts, "CHUNK", chunk)
    path, documents = tmp_path / "a.jsonl.gz", ["To be,\r\nor", "nót", "", "to\u2028be \U0001f600"]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents)]
    path.write_bytes(gzip.compress("\n\n".join(lines).encode()))
    expected = [text.replace("\r\n", "\n") for text in documents]
    assert read(path) == "\n".join([*expected, ""])
    assert read(path, "|") == "|".join(expected)
    assert "".join(read_text([path], raw=True)) == "\n".join([*expected, ""])


@pytest.mark.parametrize(
    "line", ["{", '"text"', "[1]", "{}", '{"text": 1}', '{"text": null}', "[" * 9999, '{"text": "\\ud800"}']
)
def test_a_line_that_is_no_document_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r'a\.jsonl: line 3: expected a JSON object with a "text", got ') as caught:
        read(path)
    assert len(str(caught.value)) < 300
