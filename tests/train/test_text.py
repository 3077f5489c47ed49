"""Text read in pieces, to ids and back, and where GPT-2's ranks come from."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train import text as texts
from train.errors import UserError
from train.text import ByteTokenizer, CharTokenizer, GPT2Tokenizer, from_meta, large, read_text, split_at


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


# Tokenizers


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
@settings(max_examples=30)
def test_round_trips_through_meta(gpt2, text):
    for made in (CharTokenizer(sorted(set(text) | {"a"})), ByteTokenizer(), gpt2):
        ids = made.encode(text)
        assert (gpt2 if made is gpt2 else from_meta(made.meta())).decode_bytes(ids).decode() == text
    assert ByteTokenizer().encode(text) == list(text.encode())


def test_known_ids(gpt2):
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("<|endoftext|>") == [50256]
    assert gpt2.encode_ordinary("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    undecoded = b"\xff!".decode("utf-8", "surrogateescape")  # what a command line could not decode
    assert ByteTokenizer().encode(undecoded) == [0xFF, ord("!")]
    assert gpt2.decode_bytes(gpt2.encode(undecoded)).decode() == "\ufffd!"
    assert CharTokenizer("b\udcffa").encode("a\udcff") == [2, 1]
    assert CharTokenizer("b\udcffa").decode_bytes([2, 1]) == b"a?"
    with pytest.raises(ValueError, match="'é' is not among the 3"):
        CharTokenizer("abc").encode("abé")


def test_where_gpt2s_ranks_come_from(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"encoder\.json"):
        GPT2Tokenizer(tmp_path)
    path = tmp_path / "encoder.json"
    shutil.copy(texts._packaged_encoder(), path)
    assert GPT2Tokenizer(tmp_path).encode("hello world") == [31373, 995]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match="sha256"):
        GPT2Tokenizer(tmp_path)

    monkeypatch.setattr(texts, "_packaged_encoder", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", mock.Mock(side_effect=ConnectionError))
    with pytest.raises(UserError, match=r"offline.*--bpe_dir"):
        GPT2Tokenizer()


# In pieces

WORDS = st.text(st.sampled_from("ab'sl ré\n\t\u00a0\x1c生。\uff112½,.!_\u0301\u2028"), max_size=80)


@given(text=WORDS, size=st.integers(1, 20))
@example(text="it's 'll  we'll\n\n x", size=1)
@settings(max_examples=100)
def test_bpe_in_pieces_is_bpe_of_the_whole(gpt2, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHUNK", size)
        pieces = list(large((text[i : i + size] for i in range(0, len(text), size)), texts.WORDS))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in gpt2.encode_ordinary(piece)] == gpt2.encode_ordinary(text).tolist()


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50),
    chunk=st.integers(1, 9),
    cut=st.floats(0, 1),
    mark=st.booleans(),
    pack=st.booleans(),
)
@example(text="a\r\n\rb", chunk=2, cut=0.5, mark=True, pack=False)
@settings(max_examples=50)
def test_text_is_read_and_split_whole(tmp_path_factory, text, chunk, cut, mark, pack):
    """In pieces, packed or not, with a byte order mark or not; line ends are those of Python's text files."""
    path = tmp_path_factory.getbasetemp() / "text.txt"
    data = ("\ufeff" if mark else "").encode() + text.encode()
    path.write_bytes(gzip.compress(data) if pack else data)
    with path.open("rb") as file, io.TextIOWrapper(gzip.open(file) if pack else file, "utf-8-sig") as ours:
        text = ours.read()
    size = int(len(text) * cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHUNK", chunk)
        parts = list(split_at(read_text([path]), size))
        for name, part in (("train", text[:size]), ("val", text[size:])):
            assert "".join(piece for named, piece in parts if named == name) == part
        raw = "".join(read_text([path], raw=True))
    assert raw.encode("utf-8", "surrogateescape") == data


def read(path: Path, between: str = "") -> str:
    return "".join(read_text([path], between=between))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        *(
            (text.encode(f"utf-{n}"), f"UTF-{n}, expected UTF-8 text: iconv -f UTF-{n} -t UTF-8 OLD > NEW makes it$")
            for text in ("Gemüt\n", "生存还是毁灭。")
            for n in (16, 32)
        ),
        (codecs.BOM_UTF16_BE + "生存".encode("utf-16-be"), "UTF-16, expected"),
        ("Быть\n".encode("utf-16-be"), "zero bytes, as in UTF-16"),
        (b"PK\x03\x04" + bytes(26), "a zip archive, expected UTF-8 text: unpack it first$"),
        (bz2.compress(b"a"), "packed by bzip2, expected UTF-8 text: unpack it first$"),
        (lzma.compress(b"a"), "packed by xz, expected"),
        ("Gemüt\n".encode("latin-1"), r"byte 3 is not UTF-8 \(invalid start byte\), .* Latin-1: iconv -f ISO-8859-1"),
    ],
)
def test_another_encoding_is_named(tmp_path, data, said, pack):
    path = tmp_path / "a.txt"
    path.write_bytes(pack(data))
    with pytest.raises(UserError, match=rf"a\.txt: {said}") as caught:
        read(path)
    if pack is bytes and (command := re.search("iconv .*NEW", str(caught.value))):
        names = {"OLD": path, "NEW": tmp_path / "new.txt"}
        subprocess.run(re.sub("OLD|NEW", lambda name: str(names[name[0]]), command[0]), shell=True, check=True)
        assert read(names["NEW"]) in ("Gemüt\n", "生存还是毁灭。", "生存")


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = tmp_path / "a.txt"
    whole = gzip.compress(b"a" * 1000)
    for data in (whole[:20], whole[:-8] + bytes(8), whole[:10] + b"x" * 100):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.txt: a damaged gzip file"):
            read(path)


def test_documents_of_a_jsonl_file(tmp_path):
    path, documents = tmp_path / "a.JSONL.gz", ["To be,\r\nor", "nót", "half \ud83d", "to\u2028be \U0001f600", ""]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents)]
    path.write_bytes(gzip.compress("\n\n".join(lines).encode("utf-8-sig")))
    expected = [text.replace("\r\n", "\n").replace("\ud83d", "\ufffd") for text in documents]
    assert read(path) == "".join(read_text([path], raw=True)) == "\n".join([*expected, ""])
    assert read(path, "|") == "|".join(expected)


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"text": 1}', "[" * 99999])
def test_a_line_that_is_no_document_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r'a\.jsonl: line 3: expected a JSON object with a "text", got '):
        read(path)
