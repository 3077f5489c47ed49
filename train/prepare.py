"""Text to token files: python -m train.prepare NAME | FILE ... [--tokenizer=char|byte|gpt2]

A corpus of any size passes through memory twice, a megabyte at a time. The first pass checks that it is UTF-8, counts
its characters and collects the alphabet. The second one encodes it, on all cores. GPT-2's tokenizer puts its
end-of-text token between two documents. The others have none, and take the documents as one text.
"""

import hashlib
import json
import os
import pickle
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from train.corpora import CORPORA, dataset_folder, openwebtext
from train.errors import UserError, command, one_line, quoted, run, shown
from train.files import making_folder, replace_together, staging_folder
from train.settings import command_line, nearest, setting
from train.text import (
    ALL,
    END_OF_TEXT,
    GPT2_TOKENS,
    NAMES,
    WORDS,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    code_points,
    from_meta,
    large,
    read_meta,
    read_text,
    split_at,
)

ABOUT = f"""Writes data/DATASET/train.bin, val.bin and meta.json. NAME is one of {", ".join(CORPORA)};
or name text files, .jsonl files, or folders of them, which are read one after the other. They may be gzipped.
Then: python -m train --dataset=DATASET"""

FILES = ("train.bin", "val.bin", "meta.json", "meta.pkl")
CHECKSUM_BYTES = 1 << 24  # bytes of a token file that one checksum is of
DOCUMENTS = 500  # of OpenWebText, encoded together
DEFAULT_BLOCK_SIZE = 256  # the longest sequence of the default jobs, docs and docs_cpu


@dataclass(frozen=True)
class PrepareConfig:
    tokenizer: str = setting("auto", "auto: gpt2 for shakespeare and openwebtext, else char", choices=("auto", *NAMES))
    dataset: str = setting(
        "", "folder in data/, or an absolute path; if empty, the name of the corpus or first file", path=True
    )
    val_fraction: float = setting(0.1, "the last part of the text, for validation", low=1e-9, below=1)
    bpe_dir: str = setting("", "folder of GPT-2's encoder.json, for a machine without network", path=True)
    check: str = setting("", "read all of this dataset and compare it with its checksums; make nothing", path=True)


def main(argv: list[str] | None = None) -> None:
    """The command. UserError for bad input; then nothing is written."""
    program, usage = "python -m train.prepare", "NAME | FILE ..."
    config, sources = command_line(PrepareConfig, argv, program, ABOUT, positional=usage)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files go
    if config.check:
        if sources:
            raise UserError(f"check: got {shown(sources[0])} too, expected nothing but the dataset to check")
        from train.data import Dataset  # imported here: torch takes seconds

        dataset = Dataset(dataset_folder(config.check))
        compared = "" if dataset.check(whole=True) else "; its meta has no checksums to compare the files with"
        tokens = f"{len(dataset.train):,} and {len(dataset.val):,} tokens below {dataset.n_vocab:,}"
        print(one_line(f"{dataset.folder}: whole, {tokens}{compared}"))
        return
    start = time.monotonic()
    dataset, meta = prepare(sources, config)
    for name in ("train", "val"):
        print(one_line(f"{dataset_folder(dataset) / name}.bin: {meta[f'{name}_tokens']:,} tokens"))
    print(f"vocabulary: {meta['vocab_size']:,} ({meta['tokenizer']}); text sha256 {meta['sha256']}")
    words, shortest = f"{command('train')} --dataset={quoted(dataset)}", min(meta["train_tokens"], meta["val_tokens"])
    if shortest <= DEFAULT_BLOCK_SIZE:  # sequences must fit into the smaller part
        words += f" --block_size={min(shortest - 1, 64)}"
    print(f"{time.monotonic() - start:.1f} s; train on it with: {words}")


def prepare(sources: list[str], config: PrepareConfig) -> tuple[str, dict[str, Any]]:
    """Prepare one corpus by name, or files. Returns the dataset's name and meta. UserError for bad input."""
    name = sources[0] if len(sources) == 1 and sources[0] in CORPORA else ""
    files = [] if name else text_files(sources)
    dataset = config.dataset or name or default_name(sources[0])
    folder = dataset_folder(dataset)
    unasked = not name and not config.dataset and any(os.path.lexists(folder / file) for file in FILES)
    if unasked and (read_meta(folder) or {}).get("sources") != sources_of(files):  # not known for datasets of nanoGPT
        raise UserError(
            f"dataset: {folder} holds a dataset of other files; to replace it, name it: --dataset={quoted(dataset)}; "
            "to keep it, choose another name: --dataset=NAME"
        )
    tokenizer = config.tokenizer
    if tokenizer == "auto":
        tokenizer = CORPORA[name].tokenizer if name else "char"
    known = {"tokenizer": tokenizer, "vocab_size": GPT2_TOKENS}
    coder = None if tokenizer == "char" else from_meta(known, config.bpe_dir)
    if name == "openwebtext" and (tokenizer != "gpt2" or config.val_fraction != PrepareConfig.val_fraction):
        raise UserError("openwebtext: made as nanoGPT makes it, expected no --tokenizer and no --val_fraction")
    with making_folder(folder):
        if name == "openwebtext":
            return dataset, write_openwebtext(folder, coder)
        if name:
            files = [folder / "input.txt"]
            CORPORA[name].fetch(files[0])
        return dataset, write_dataset(folder, files, coder, config.val_fraction)


# Which files, and what the dataset is called


def text_files(sources: list[str]) -> list[Path]:
    """The files that `sources` names; those of a folder are sorted. UserError for a name of nothing.

    In folders, names that begin with a dot are left out, and the files of a dataset.
    """
    if not sources:
        raise UserError(f"nothing to prepare: expected a name ({', '.join(CORPORA)}) or text files")
    files: list[Path] = []
    for source in sources:
        inside = sorted(_below(source)) if os.path.isdir(source) else [Path(source)]
        if not inside:
            raise UserError(f"{shown(source)}: no files in this folder, expected text files")
        if not os.path.isfile(inside[0]):
            hint = nearest(source, CORPORA) or f", expected text files or one of {', '.join(CORPORA)}"
            raise UserError(f"{shown(source)}: no regular file, folder or corpus{hint}")
        files.extend(inside)
    return files


def _below(folder: str) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise UserError(f"{shown(error.filename)}: cannot be read: {error.strerror}")

    for where, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(where, name)
            if not name.startswith(".") and name not in FILES and os.path.isfile(path):
                yield path


def default_name(source: str) -> str:
    """The name of a dataset of this file or folder: the file's, or NAME for a file in data/NAME."""
    parts, name = Path(os.path.relpath(source)).parts, os.path.basename(os.path.abspath(source))
    if parts[:1] == ("data",) and len(parts) > 2:
        name = parts[1]
    elif not os.path.isdir(source):
        name = Path(name.removesuffix(".gz")).stem
    if not name or name in CORPORA:
        raise UserError(f"dataset: got {shown(name)}, expected a name, and not that of a corpus: --dataset=NAME")
    return name


def sources_of(files: Sequence[Path]) -> str:
    """A digest of the files' paths. It tells whether a dataset was made of the same files, and shows no path."""
    names = "\0".join(os.path.realpath(path) for path in files)
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()


# Corpora by name


def ensure_docs(folder: Path, say: Callable[[str], None] = print) -> None:
    """Make the dataset `docs` in `folder`, data/docs, if it is missing, in seconds. Say its size and sha256.

    A dataset of that name that was made by another program is left as it is.
    """
    if not os.path.isfile(folder / "train.bin"):
        prepare(["docs"], PrepareConfig())
    meta = read_meta(folder) or {}
    if {"train_tokens", "val_tokens", "tokenizer", "sha256"} <= meta.keys():
        tokens, unit = meta["train_tokens"] + meta["val_tokens"], "characters" if "chars" in meta else "tokens"
        say(f"docs: {tokens:,} {unit} of Python's own documentation, sha256 {meta['sha256']}")


def write_openwebtext(folder: Path, bpe: GPT2Tokenizer) -> dict[str, Any]:
    """Write OpenWebText in nanoGPT's split, <|endoftext|> after every document. Returns the meta."""
    documents, digest = openwebtext(), hashlib.sha256()
    end = np.array([GPT2_TOKENS - 1])

    def texts() -> Iterator[tuple[str, list[str]]]:
        for name, part in documents.items():
            for batch in part.iter(batch_size=DOCUMENTS):
                for text in batch["text"]:
                    digest.update(text.encode("utf-8", "replace"))
                yield name, batch["text"]
                bar.update(len(batch["text"]))

    def encode(batch: list[str]) -> np.ndarray:
        return np.concatenate([ids for text in batch for ids in (bpe.encode_ordinary(text), end)])

    with progress(sum(map(len, documents.values())), " documents") as bar:
        return write_tokens(folder, bpe, in_order(encode, texts()), digest)


# The files


def write_dataset(folder: Path, paths: Sequence[Path], coder: Tokenizer | None, val_fraction: float) -> dict[str, Any]:
    """Encode the files, one after the other, into `folder`, the last part of them for validation.

    coder: None for one id a character. Parts are measured in characters, for a byte tokenizer in bytes. Returns what
    meta.json says. UserError if a file is not UTF-8, if all are empty, and if a part would have fewer than 2 tokens;
    then `folder` stays as it was.
    """
    named = ", ".join(map(str, paths))
    of_bytes, of_words = (coder is not None and coder.name == name for name in ("byte", "gpt2"))
    between = END_OF_TEXT if of_words else ""
    digest = hashlib.sha256()
    with progress(2 * sum(os.stat(path).st_size for path in paths), "B") as bar:

        def reading(digest: Any) -> Iterator[str | bytes]:
            pieces = read_text(paths, between, raw=of_bytes)
            for piece in large(pieces, WORDS if of_words else ALL):
                data = piece.encode("utf-8", "surrogateescape")
                digest.update(data)
                bar.update(len(data))
                yield data if of_bytes else piece

        length, alphabet = 0, np.zeros(0x110000, dtype=bool)
        for piece in reading(hashlib.sha256()):
            length += len(piece)
            if coder is None:
                alphabet[code_points(piece)] = True
        if length == 0:
            raise UserError(f"{named}: empty, expected text")
        coder = coder or CharTokenizer([chr(code) for code in np.flatnonzero(alphabet)])
        parts = split_at(reading(digest), int(length * (1 - val_fraction)), between)
        tokens = in_order(coder.encode_array, parts)
        try:
            return write_tokens(folder, coder, tokens, digest, sources=sources_of(paths))
        except ValueError:  # a character that the first pass did not meet
            raise UserError(f"{named}: changed while being read; run again") from None


def write_tokens(
    folder: Path, tokenizer: Tokenizer, tokens: Iterable[tuple[str, np.ndarray]], digest: Any, **facts: Any
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta from arrays of ids, each with the name of its part. Returns the meta.

    digest: of the text; whole when all arrays are made. facts: more for meta.json. UserError if a part has fewer than 2
    tokens; then `folder` stays as it was.
    """
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    meta, sums = tokenizer.meta() | {"dtype": dtype.name} | facts, {"bytes": CHECKSUM_BYTES}
    with staging_folder(folder) as staging:
        with open(staging / "train.bin", "w+b") as train, open(staging / "val.bin", "w+b") as val:
            files = {"train": train, "val": val}
            for name, ids in tokens:
                files[name].write(np.ascontiguousarray(ids, dtype=dtype))
            for name, file in files.items():
                meta[f"{name}_tokens"] = count = file.tell() // dtype.itemsize
                if count < 2:
                    raise UserError(f"too little text: the {name} part has {count} tokens, expected 2 or more")
                file.seek(0)
                sums[name] = [zlib.crc32(data) for data in iter(partial(file.read, CHECKSUM_BYTES), b"")]
        meta |= {"sha256": digest.hexdigest(), "checksums": sums}
        (staging / "meta.json").write_text(json.dumps(meta))
        if isinstance(tokenizer, CharTokenizer):  # nanoGPT's own form, for its scripts
            itos = dict(enumerate(tokenizer.chars))
            stoi = {char: i for i, char in itos.items()}
            nanogpts = {"vocab_size": tokenizer.n_vocab, "itos": itos, "stoi": stoi}
            (staging / "meta.pkl").write_bytes(pickle.dumps(nanogpts))
        replace_together(staging, folder, FILES)
    return meta


def in_order(encode: Callable[[Any], np.ndarray], parts: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, encode(item)) of every (name, item), on all cores, in order. Only a few items are held at a time."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        while batch := list(islice(parts, 4 * cores)):
            names, items = zip(*batch, strict=True)
            yield from zip(names, pool.map(encode, items), strict=True)


def progress(total: int, unit: str) -> Any:
    """A progress bar, if stderr is a terminal. Nothing is shown in the first second."""
    from tqdm import tqdm  # only here: a run that trains does without

    return tqdm(total=total, unit=unit, unit_scale=True, leave=False, delay=1, disable=None)


if __name__ == "__main__":
    run(main)
