"""Token files: train.bin and val.bin, flat little-endian arrays of ids, and meta.json, which describes them.

nanoGPT's folders are read as they are: with a meta.pkl, by an unpickler that admits only dicts, strings and
ints; without any meta, as GPT-2 BPE in uint16.
"""

import json
import mmap
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.errors import UserError
from train.tokenizer import GPT2_TOKENS, Tokenizer, from_meta, padded_vocab_size

Split = Literal["train", "val"]

FULL_SCAN_BYTES = 256 << 20  # files up to this size are checked whole before the first step
SCAN_TOKENS = 4 << 20  # tokens looked at together in such a check


class Dataset:
    """A prepared dataset: a folder with train.bin, val.bin and, unless it is nanoGPT's GPT-2 BPE, its meta.

    Attributes:
        train, val: (n,) read-only np.memmap of uint16 or uint32 token ids; no part of them is read here.
        meta: dict as in meta.json ("vocab_size", "tokenizer", "dtype", "chars", ...).
        n_vocab: ids in the files are below this.
        vocab_size: what a new model should be given; n_vocab, or GPT-2's padded to a multiple of 64.

    Raises UserError where a file is missing, empty, of a size that is no whole number of tokens, or where
    meta is malformed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self.n_vocab: int = self.meta["vocab_size"]
        self.vocab_size = padded_vocab_size(self.n_vocab) if self.meta.get("tokenizer") == "gpt2" else self.n_vocab
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self.train = _open_tokens(self.folder / "train.bin", dtype)
        self.val = _open_tokens(self.folder / "val.bin", dtype)

    def split(self, name: Split) -> np.memmap:
        return self.train if name == "train" else self.val

    def path(self, name: Split) -> Path:
        return self.folder / f"{name}.bin"

    def tokenizer(self, bpe_dir: str | Path | None = None) -> Tokenizer:
        """The tokenizer that made the files. Raises UserError where that cannot be had."""
        return from_meta(self.meta, bpe_dir)

    def check_length(self, block_size: int) -> None:
        """Raise UserError where a split does not hold one sample: block_size tokens and the one after."""
        for name in ("train", "val"):
            if (length := len(self.split(name))) <= block_size:
                raise UserError(
                    f"block_size={block_size}: {self.path(name)} holds {length:,} tokens,"
                    f" expected at least {block_size + 1:,}"
                )

    def check(self, block_size: int, vocab_size: int | None = None) -> None:
        """Raise UserError where a split is too short for `block_size` or holds an id of `vocab_size` or more.

        Files over 256 MB are not read for this: the loader checks every batch that it draws.
        """
        self.check_length(block_size)
        limit = self.vocab_size if vocab_size is None else vocab_size
        for name in ("train", "val"):
            tokens = np.asarray(self.split(name))
            if tokens.nbytes > FULL_SCAN_BYTES or limit > np.iinfo(tokens.dtype).max:
                continue
            for start in range(0, len(tokens), SCAN_TOKENS):
                chunk = tokens[start : start + SCAN_TOKENS]
                if chunk.max() >= limit:
                    at = int(np.argmax(chunk >= limit))
                    raise bad_token(self.path(name), start + at, int(chunk[at]), limit)


class _PlainUnpickler(pickle.Unpickler):
    """Dicts, strings and ints need no class to be looked up by name; whatever does is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only dicts, strings and ints are read")


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return isinstance(value, str | int)


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, else nanoGPT's meta.pkl, else GPT-2 BPE: completed and checked."""
    if not (folder / "train.bin").is_file():
        what = "no train.bin" if folder.is_dir() else "no such dataset"
        raise UserError(f"{folder}: {what}; make it with: python -m train.prepare {folder.name}")
    path = folder / "meta.json"
    meta: Any = {"vocab_size": GPT2_TOKENS, "tokenizer": "gpt2"}
    try:
        if path.is_file():
            meta = json.loads(path.read_text("utf-8"))
        elif (path := folder / "meta.pkl").is_file():
            with path.open("rb") as file:
                meta = _from_pickle(_PlainUnpickler(file).load())
        vocab_size = meta["vocab_size"]
        if type(vocab_size) is not int or vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size!r}, expected a positive int")
        dtype = meta.setdefault("dtype", "uint16" if vocab_size <= 1 << 16 else "uint32")
        if dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {dtype!r}, expected uint16 or uint32")
    except KeyError as error:
        raise UserError(f"{path}: no {error.args[0]!r} in it") from None
    except Exception as error:  # an unpickler fed with garbage raises almost anything
        raise UserError(f"{path}: cannot be read: {error}") from None
    return meta


def _from_pickle(meta: Any) -> dict[str, Any]:
    """nanoGPT's {vocab_size, itos, stoi} in the form of meta.json. nanoGPT writes uint16, nothing else."""
    if not isinstance(meta, dict) or not _is_plain(meta):
        raise ValueError("expected a dict of strings and ints")
    found = {"vocab_size": meta["vocab_size"], "dtype": "uint16"}
    if "itos" in meta:
        found |= {"tokenizer": "char", "chars": [meta["itos"][i] for i in range(meta["vocab_size"])]}
    return found


def _open_tokens(path: Path, dtype: np.dtype) -> np.memmap:
    try:
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise UserError(f"{path}: {size:,} bytes, expected a positive multiple of {dtype.itemsize} ({dtype.name})")
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; make it with: python -m train.prepare {path.parent.name}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if size > FULL_SCAN_BYTES and hasattr(mmap, "MADV_RANDOM"):
        # A sample is 2 KB anywhere in the file. Read-ahead would bring up to megabytes around each.
        tokens.base.madvise(mmap.MADV_RANDOM)
    return tokens


def bad_token(path: Path, position: int, token: int, vocab_size: int) -> UserError:
    return UserError(f"{path}: token {token} at position {position:,}, expected ids below vocab_size={vocab_size}")
