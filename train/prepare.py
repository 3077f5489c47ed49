"""Text to token files: python -m train.prepare NAME | FILE ... [--tokenizer=char|byte|gpt2]

A corpus of any size passes through memory a megabyte at a time, twice. The first pass checks that it is UTF-8,
counts its characters and collects the alphabet. The second one encodes it: characters by a table lookup in
numpy, GPT-2's BPE on all cores.
"""

import hashlib
import json
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.corpora import CORPORA, openwebtext
from train.errors import UserError, run
from train.files import making_folder, replace_together, staging_folder, sync
from train.settings import command_line, nearest, setting, shown
from train.text import (
    GPT2_TOKENS,
    NAMES,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    read_bytes,
    read_text,
    split_at,
    whole_words,
)

ABOUT = f"""Writes data/DATASET/train.bin, val.bin and meta.json. NAME is one of {", ".join(CORPORA)};
or name text files, to be taken one after the other. Then: python -m train --dataset=DATASET"""

FILES = ("train.bin", "val.bin", "meta.json", "meta.pkl")
DOCUMENTS = 500  # encoded together
LINE = "{percentage:3.0f}%, {rate_fmt}, {remaining} left\n"  # of progress, where there is no terminal


@dataclass(frozen=True)
class PrepareConfig:
    """The settings of `python -m train.prepare`."""

    tokenizer: str = setting("auto", "auto: gpt2 for shakespeare and openwebtext, else char", choices=("auto", *NAMES))
    dataset: str = setting("", "folder in data/, or an absolute path; if empty, the name of the corpus or first file")
    val_fraction: float = setting(0.1, "the last part of the text, for validation", low=1e-9, below=1)
    bpe_dir: str = setting("", "folder of GPT-2's encoder.json, for a machine without network")


def main() -> None:
    """The command. Raises UserError for bad input, with nothing written."""
    program, usage = "python -m train.prepare", "NAME | FILE ..."
    config, sources = command_line(PrepareConfig, None, program, ABOUT, positional=usage)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files go
    start = time.monotonic()
    dataset, meta = prepare(sources, config)
    if sources == ["docs"]:
        print(docs_line(meta))
    for name in ("train", "val"):
        print(f"{Path('data') / dataset / name}.bin: {meta[f'{name}_tokens']:,} tokens")
    print(f"vocabulary: {meta['vocab_size']:,} ({meta['tokenizer']}); text sha256 {meta['sha256']}")
    print(f"{time.monotonic() - start:.1f} s; train on it with: python -m train --dataset={dataset}")


def prepare(sources: list[str], config: PrepareConfig) -> tuple[str, dict[str, Any]]:
    """Prepare one corpus by name, or the files. Returns the dataset's name and meta. Raises UserError."""
    name = sources[0] if len(sources) == 1 and sources[0] in CORPORA else ""
    if not name:
        _check_files(sources, config.dataset)
    dataset = config.dataset or name or Path(sources[0]).stem
    folder = Path("data") / dataset
    tokenizer = config.tokenizer
    if tokenizer == "auto":
        tokenizer = CORPORA[name].tokenizer if name else "char"
    options = {"val_fraction": config.val_fraction, "bpe_dir": config.bpe_dir}
    if name == "openwebtext":
        if tokenizer != "gpt2" or config.val_fraction != PrepareConfig.val_fraction:
            raise UserError("openwebtext: made as nanoGPT makes it, expected no --tokenizer and no --val_fraction")
        return dataset, write_openwebtext(folder, config.bpe_dir)
    if name:
        return dataset, write_corpus(folder, name, tokenizer, **options)
    return dataset, write_dataset(folder, [Path(source) for source in sources], tokenizer, **options)


def _check_files(sources: list[str], dataset: str) -> None:
    names = ", ".join(CORPORA)
    if not sources:
        raise UserError(f"nothing to prepare: expected a name ({names}) or text files")
    for source in sources:
        path = Path(source)
        if path.is_file():
            continue
        if path.exists():
            raise UserError(f"{shown(source)}: not a regular file, expected a text file")
        if len(sources) == 1 and path.name == source and not path.suffix:
            raise UserError(
                f"{shown(source)}: no such corpus or file{nearest(source, CORPORA) or f', expected one of {names}'}"
            )
        raise UserError(f"{shown(source)}: no such file")
    if not dataset and (stem := Path(sources[0]).stem) in CORPORA:
        raise UserError(f"dataset: {stem} is the name of a corpus, expected another: --dataset=NAME")


def ensure_docs(folder: Path, say: Callable[[str], None] = print) -> None:
    """Make the dataset `docs` in `folder` if it is missing, in seconds; say its size and sha256."""
    path = folder / "meta.json"
    if not all((folder / name).is_file() for name in ("train.bin", "val.bin", "meta.json")):
        write_corpus(folder, "docs", "char")
    try:
        say(docs_line(json.loads(path.read_text("utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); python -m train.prepare docs makes it anew") from None


def docs_line(meta: dict[str, Any]) -> str:
    """One line on `docs`: its tokens and sha256."""
    tokens = meta["train_tokens"] + meta["val_tokens"]
    unit = "characters" if meta["tokenizer"] == "char" else "tokens"
    return f"docs: {tokens:,} {unit} of Python's own documentation, sha256 {meta['sha256']}"


def write_corpus(folder: Path, name: str, tokenizer: str, **options: Any) -> dict[str, Any]:
    """Fetch the text of a corpus into `folder`/input.txt and make the dataset of it. Options: write_dataset's."""
    path = folder / "input.txt"
    with making_folder(folder):
        CORPORA[name].fetch(path)
        return write_dataset(folder, [path], tokenizer, **options)


def write_openwebtext(folder: Path, bpe_dir: str = "") -> dict[str, Any]:
    """Write OpenWebText in nanoGPT's split, <|endoftext|> after every document. Returns the meta."""
    bpe = GPT2Tokenizer(bpe_dir or None)
    documents = openwebtext()
    digest = hashlib.sha256()
    end = np.array([GPT2_TOKENS - 1], dtype=np.uint16)

    def texts(part: Any) -> Iterator[list[str]]:
        for batch in part.iter(batch_size=DOCUMENTS):
            for text in batch["text"]:
                digest.update(text.encode("utf-8", "replace"))
            yield batch["text"]
            bar.update(len(batch["text"]))

    def encode(batch: list[str]) -> np.ndarray:
        return np.concatenate([ids for text in batch for ids in (bpe.encode_ordinary(text), end)])

    with progress(sum(map(len, documents.values())), " documents") as bar:
        splits = {name: in_order(encode, texts(part)) for name, part in documents.items()}
        return write_tokens(folder, bpe, splits, digest.hexdigest)


def write_dataset(
    folder: Path, paths: Sequence[Path], tokenizer: str, *, val_fraction: float = 0.1, bpe_dir: str = ""
) -> dict[str, Any]:
    """Encode the files, one after the other, into `folder`, the last part of them for validation.

    `tokenizer` is "char", "byte" or "gpt2"; parts are measured in characters, for "byte" in bytes. Returns what
    meta.json says. Raises UserError, and leaves `folder` as it was, where a file is empty or not UTF-8, and where
    a part would hold fewer than 2 tokens.
    """
    named = ", ".join(map(str, paths))
    size = sum(path.stat().st_size for path in paths)
    if size == 0:
        raise UserError(f"{named}: empty, expected text")
    coder = GPT2Tokenizer(bpe_dir or None) if tokenizer == "gpt2" else ByteTokenizer()
    read = read_bytes if tokenizer == "byte" else read_text
    first, second = hashlib.sha256(), hashlib.sha256()
    with progress(2 * size, "B") as bar:

        def reading(digest: Any) -> Iterator[Any]:
            return read(paths, lambda data: (bar.update(len(data)), digest.update(data)))

        length, alphabet = 0, np.zeros(0x110000, dtype=bool)
        for piece in reading(first):
            length += len(piece)
            if tokenizer == "char":
                alphabet[_code_points(piece)] = True
        if tokenizer == "char":
            coder = CharTokenizer([chr(code) for code in np.flatnonzero(alphabet)])

        def sha256() -> str:
            if first.digest() != second.digest():
                raise UserError(f"{named}: changed while being read; run again")
            return first.hexdigest()

        train, val = split_at(reading(second), int(length * (1 - val_fraction)))
        return write_tokens(folder, coder, {"train": encode(coder, train), "val": encode(coder, val)}, sha256)


def write_tokens(
    folder: Path, tokenizer: Tokenizer, splits: Mapping[str, Iterable[np.ndarray]], sha256: Callable[[], str]
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta from arrays of ids, "train" first; `sha256` is called last.

    Returns the meta. Raises UserError, and leaves `folder` as it was, where a split has fewer than 2 tokens.
    """
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    meta = tokenizer.meta() | {"dtype": dtype.name}
    with making_folder(folder), staging_folder(folder) as staging:

        def write(name: str, pieces: Iterable[Any]) -> int:
            with open(staging / name, "wb") as file:
                file.writelines(pieces)
                sync(file)
                return file.tell()

        for name in ("train", "val"):
            pieces = (np.ascontiguousarray(ids, dtype=dtype) for ids in splits[name])
            count = write(f"{name}.bin", pieces) // dtype.itemsize
            if count < 2:
                raise UserError(f"too little text: the {name} part has {count} tokens, expected 2 or more")
            meta[f"{name}_tokens"] = count
        meta["sha256"] = sha256()
        write("meta.json", [json.dumps(meta).encode()])
        if isinstance(tokenizer, CharTokenizer):  # nanoGPT's own form, for its scripts
            itos = dict(enumerate(tokenizer.chars))
            stoi = {char: i for i, char in itos.items()}
            write("meta.pkl", [pickle.dumps({"vocab_size": tokenizer.n_vocab, "itos": itos, "stoi": stoi})])
        replace_together(staging, folder, FILES)
    return meta


def encode(tokenizer: Tokenizer, pieces: Iterable[Any]) -> Iterator[np.ndarray]:
    """Pieces of text (bytes for "byte") to arrays of their ids."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return in_order(tokenizer.encode_ordinary, whole_words(pieces))
    if isinstance(tokenizer, CharTokenizer):
        table = np.zeros(0x110000, dtype=np.uint32 if tokenizer.n_vocab > 1 << 16 else np.uint16)
        table[_code_points("".join(tokenizer.chars))] = np.arange(tokenizer.n_vocab)
        return (table[_code_points(piece)] for piece in pieces)
    return (np.frombuffer(piece, dtype=np.uint8) for piece in pieces)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def in_order(work: Callable[[Any], np.ndarray], items: Iterable[Any]) -> Iterator[np.ndarray]:
    """map(work, items) on all cores, in order, a few items ahead. `work` must release the GIL."""
    ahead = 2 * (os.cpu_count() or 1)
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def progress(total: int, unit: str) -> Any:
    """A bar on a terminal; elsewhere a line every half minute. Neither for what takes less than a second."""
    from tqdm import tqdm  # only here: a run that trains does without

    style = {"mininterval": 0.1, "delay": 1} if sys.stderr.isatty() else {"mininterval": 30, "delay": 30}
    if not sys.stderr.isatty():
        style["bar_format"] = LINE
    return tqdm(total=total, unit=unit, unit_scale=True, leave=False, **style)


if __name__ == "__main__":
    run(main)
