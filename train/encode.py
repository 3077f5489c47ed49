"""Text into token files, streamed: a corpus of any size passes through memory a megabyte at a time, twice.

The first pass checks that it is UTF-8, counts its characters and collects the alphabet; the second encodes
it: characters by a table lookup in numpy, GPT-2's BPE on all cores. A long text may be cut for BPE wherever
the pre-tokenizer is certain to begin a new word: the pieces, encoded apart, then give the ids of the whole.
"""

import codecs
import hashlib
import itertools
import json
import os
import pickle
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import UserError
from train.files import making_folder, replace_together, staging_folder, sync
from train.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer

CHUNK = 1 << 20  # bytes read at once
LONGEST_WORD = 16 << 20  # characters without a certain cut after which BPE text is cut all the same
FILES = ("train.bin", "val.bin", "meta.json", "meta.pkl")

See = Callable[[bytes], object]  # is shown all that was read, as it was read


def write_dataset(
    folder: Path,
    sources: Sequence[Path],
    tokenizer: str,
    *,
    val_fraction: float = 0.1,
    bpe_dir: str = "",
    see: See = lambda data: None,
) -> dict[str, Any]:
    """Encode the files, one after the other, into `folder`, the last part of them for validation.

    `tokenizer` is "char", "byte" or "gpt2"; parts are measured in characters, for "byte" in bytes. `see` is
    shown everything twice. Returns what meta.json says. Raises UserError, and leaves `folder` as it was,
    where a file is missing, empty or not UTF-8, and where a part would hold fewer than 2 tokens.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction: got {val_fraction}, expected more than 0 and less than 1")
    if sum(_size(path) for path in sources) == 0:
        raise UserError(f"{', '.join(map(str, sources))}: empty, expected text")
    bpe = GPT2Tokenizer(bpe_dir or None) if tokenizer == "gpt2" else None  # before the work: it may be missing
    read = read_bytes if tokenizer == "byte" else read_text

    digest = hashlib.sha256()
    length, alphabet = 0, _Alphabet()
    for piece in read(sources, lambda data: (see(data), digest.update(data))):
        length += len(piece)
        if tokenizer == "char":
            alphabet.add(piece)
    coder = CharTokenizer(alphabet.chars()) if tokenizer == "char" else bpe or ByteTokenizer()

    again = hashlib.sha256()
    pieces = read(sources, lambda data: (see(data), again.update(data)))
    train, val = split_at(pieces, int(length * (1 - val_fraction)))
    encode = _encoder(coder)

    def sha256() -> str:
        if again.digest() != digest.digest():
            raise UserError(f"{', '.join(map(str, sources))}: changed while being read; run again")
        return digest.hexdigest()

    return write_tokens(folder, coder, {"train": encode(train), "val": encode(val)}, sha256)


def write_tokens(
    folder: Path, tokenizer: Tokenizer, splits: Mapping[str, Iterable[np.ndarray]], sha256: Callable[[], str]
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta from arrays of ids, "train" first; `sha256` is called last.

    Returns the meta. Raises UserError, and leaves `folder` as it was, where a split has fewer than 2 tokens.
    """
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    meta = tokenizer.meta() | {"dtype": dtype.name}
    with making_folder(folder), staging_folder(folder) as staging:
        for name in ("train", "val"):
            with open(staging / f"{name}.bin", "wb") as file:
                for ids in splits[name]:
                    file.write(np.ascontiguousarray(ids, dtype=dtype))
                count = file.tell() // dtype.itemsize
                sync(file)
            if count < 2:
                raise UserError(f"too little text: the {name} part has {count} tokens, expected 2 or more")
            meta[f"{name}_tokens"] = count
        meta["sha256"] = sha256()
        files = {"meta.json": json.dumps(meta).encode()}
        if isinstance(tokenizer, CharTokenizer):  # nanoGPT's own form, for its scripts
            ids = {char: i for i, char in enumerate(tokenizer.chars)}
            chars = dict(enumerate(tokenizer.chars))
            files["meta.pkl"] = pickle.dumps({"vocab_size": tokenizer.n_vocab, "itos": chars, "stoi": ids})
        for name, data in files.items():
            with open(staging / name, "wb") as file:
                file.write(data)
                sync(file)
        replace_together(staging, folder, FILES)
    return meta


def read_bytes(sources: Sequence[Path], see: See = lambda data: None) -> Iterator[bytes]:
    """The files' bytes, one file after the other, in pieces."""
    for path in sources:
        try:
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    see(data)
                    yield data
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(sources: Sequence[Path], see: See = lambda data: None) -> Iterator[str]:
    """The files' text in pieces that never divide a character. Raises UserError where it is not UTF-8."""
    for path in sources:
        decoder = codecs.getincrementaldecoder("utf-8")()
        position = 0  # of the next byte that the decoder takes
        for data in itertools.chain(read_bytes([path], see), [b""]):
            held = len(decoder.getstate()[0])  # bytes of a character that the last piece began
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = position - held + error.start
                raise UserError(f"{path}: byte {at:,} is not UTF-8 ({error.reason}), expected UTF-8 text") from None
            position += len(data)


def split_at(pieces: Iterable[Any], size: int) -> tuple[Iterator[Any], Iterator[Any]]:
    """The first `size` characters or bytes of `pieces`, and the rest: to be read in that order."""
    pieces, rest = iter(pieces), []

    def first() -> Iterator[Any]:
        left = size
        for piece in pieces:
            if len(piece) >= left:
                rest.append(piece[left:])
                yield piece[:left]
                return
            left -= len(piece)
            yield piece

    def second() -> Iterator[Any]:
        yield from rest
        yield from pieces

    return first(), second()


class _Alphabet:
    """The distinct characters of a text."""

    def __init__(self) -> None:
        self._ascii = b""
        self._seen = np.zeros(0x110000, dtype=bool)

    def add(self, text: str) -> None:
        if text.isascii():
            self._ascii += bytes(set(text.encode().translate(None, self._ascii)))  # deletes the known: mostly all
        else:
            self._seen[_codes(text)] = True

    def chars(self) -> str:
        """Sorted by code point."""
        self._seen[list(self._ascii)] = True
        return "".join(map(chr, np.flatnonzero(self._seen)))


def _size(path: Path) -> int:
    """Bytes. Raises UserError where `path` is no regular file: the text is read twice."""
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}, expected a text file")
    return path.stat().st_size


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _encoder(tokenizer: Tokenizer) -> Callable[[Iterable[Any]], Iterator[np.ndarray]]:
    """Pieces of text (bytes for "byte") to arrays of their ids."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return lambda pieces: in_order(tokenizer.encode_ordinary, whole_words(pieces))
    if isinstance(tokenizer, CharTokenizer):
        return lambda pieces: _char_ids(tokenizer.chars, pieces)
    return lambda pieces: (np.frombuffer(piece, dtype=np.uint8) for piece in pieces)


def _char_ids(chars: Sequence[str], pieces: Iterable[str]) -> Iterator[np.ndarray]:
    table = np.zeros(0x110000, dtype=np.uint32 if len(chars) > 1 << 16 else np.uint16)
    table[_codes("".join(chars))] = np.arange(len(chars))
    ascii_table = table[:256].astype(np.uint8).tobytes()  # ids go by code point: those of ASCII fit a byte
    for piece in pieces:
        if piece.isascii():
            yield np.frombuffer(piece.encode().translate(ascii_table), dtype=np.uint8)
        else:
            yield table[_codes(piece)]


def whole_words(pieces: Iterable[str]) -> Iterator[str]:
    """The same text, in pieces of about CHUNK characters that end where BPE may be cut."""
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

    A space or newline after anything but white space begins one, as white space only ever leads a word. So
    does a number or a mark of punctuation after a letter. What comes before such a place is divided as if the
    text ended there.
    """
    for at in range(len(text) - 1, max(start, 1) - 1, -1):
        before, after = text[at - 1], text[at]
        if after in " \n":
            if not before.isspace():
                return at
        elif before.isalpha() and unicodedata.category(after)[0] in "NP":
            return at
    return 0


def in_order(work: Callable[[Any], np.ndarray], items: Iterable[Any]) -> Iterator[np.ndarray]:
    """map(work, items) on all cores, in order, a few items ahead. `work` must release the GIL."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
