"""Text to ids and back; where GPT-2's ranks come from."""

import shutil

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from train import tokenizer as tokenizers
from train.errors import UserError
from train.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, StreamDecoder, from_meta

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@given(text=TEXT)
def test_char_round_trip_through_its_meta(text):
    made = CharTokenizer(sorted(set(text) | {"a"}))
    read = from_meta(made.meta())
    assert read.decode(made.encode(text)) == text
    assert read.n_vocab == read.vocab_size == len(set(text) | {"a"})


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
    assert (gpt2.n_vocab, gpt2.vocab_size) == (50257, 50304)


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


@given(text=TEXT)
def test_streaming_gives_the_text_without_half_characters(text):
    byte = ByteTokenizer()
    decoder = StreamDecoder(byte)
    pieces = [decoder.feed([i]) for i in byte.encode(text)]
    assert "".join(pieces) + decoder.finish() == text
    assert all(piece in text for piece in pieces)


def test_streaming_ends_a_cut_character_with_the_replacement_character():
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.feed("€".encode()[:2]) == ""
    assert decoder.finish() == "\ufffd"


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
    shutil.copy(tokenizers._packaged_encoder(), path)
    assert GPT2Tokenizer(tmp_path).encode("hello world") == [31373, 995]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match="sha256"):
        GPT2Tokenizer(tmp_path)


def test_without_package_and_network_the_error_says_what_to_do(monkeypatch):
    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tokenizers, "_packaged_encoder", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"offline.*--bpe_dir"):
        GPT2Tokenizer()
