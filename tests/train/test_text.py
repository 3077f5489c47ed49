"""Text read in pieces, to ids and back, and where GPT-2's ranks come from."""

import shutil

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
    last_cut,
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
    for at in range(1, len(text)):
        if last_cut(text[: at + 1], at) == at:
            assert gpt2.encode_ordinary(text[:at]).tolist() + gpt2.encode_ordinary(text[at:]).tolist() == want
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


@given(text=st.text(st.characters(codec="utf-8"), max_size=50), chunk=st.integers(1, 9), cut=st.floats(0, 1))
def test_text_is_read_and_split_whole(tmp_path_factory, text, chunk, cut):
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    size = int(len(text) * cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHUNK", chunk)
        first, second = split_at(read_text([path]), size)
        assert "".join(first) == text[:size]
        assert "".join(second) == text[size:]
