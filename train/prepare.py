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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.corpora import CORPORA, dataset_folder, openwebtext
from train.errors import UserError, one_line, quoted, run, shown
from train.files import checksums, making_folder, replace_together, staging_folder
from train.settings import command_line, nearest, setting
from train.text import (
    END_OF_TEXT,
    GPT2_TOKENS,
    NAMES,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    code_points,
    read_meta,
    read_text,
    split_at,
    whole_words,
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
    """The settings of `python -m train.prepare`."""

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
        print(one_line(check(config.check)))
        return
    start = time.monotonic()
    dataset, meta = prepare(sources, config)
    if sources == ["docs"]:
        print(docs_line(meta))
    for name in ("train", "val"):
        print(one_line(f"{dataset_folder(dataset) / name}.bin: {meta[f'{name}_tokens']:,} tokens"))
    print(f"vocabulary: {meta['vocab_size']:,} ({meta['tokenizer']}); text sha256 {meta['sha256']}")
    print(f"{time.monotonic() - start:.1f} s; train on it with: {how_to_train(dataset, meta)}")


def how_to_train(dataset: str, meta: Mapping[str, Any]) -> str:
    """The command that trains on a dataset. The default job's sequences must fit into its smaller part."""
    command, tokens = f"python -m train --dataset={quoted(dataset)}", min(meta["train_tokens"], meta["val_tokens"])
    return command if tokens > DEFAULT_BLOCK_SIZE else f"{command} --block_size={min(tokens - 1, 64)}"


def check(name: str) -> str:
    """Compare a dataset with its meta and checksums. Returns a line about it. UserError for any difference."""
    from train.data import Dataset  # imported here: torch takes seconds

    dataset = Dataset(dataset_folder(name))
    has_checksums = dataset.check(whole=True)
    whole = f"{dataset.folder}: whole, {len(dataset.train):,} and {len(dataset.val):,} tokens below {dataset.n_vocab:,}"
    return whole if has_checksums else f"{whole}; its meta has no checksums to compare the files with"


def prepare(sources: list[str], config: PrepareConfig) -> tuple[str, dict[str, Any]]:
    """Prepare one corpus by name, or files. Returns the dataset's name and meta. UserError for bad input."""
    name = sources[0] if len(sources) == 1 and sources[0] in CORPORA else ""
    files = [] if name else text_files(sources)
    dataset = config.dataset or name or default_name(sources[0])
    folder = dataset_folder(dataset)
    if not name and not config.dataset:
        _check_replaces(folder, dataset, files)
    tokenizer = config.tokenizer
    if tokenizer == "auto":
        tokenizer = CORPORA[name].tokenizer if name else "char"
    if name == "openwebtext":
        if tokenizer != "gpt2" or config.val_fraction != PrepareConfig.val_fraction:
            raise UserError("openwebtext: made as nanoGPT makes it, expected no --tokenizer and no --val_fraction")
        return dataset, write_openwebtext(folder, config.bpe_dir)
    if name:
        return dataset, write_corpus(folder, name, tokenizer, config)
    return dataset, write_dataset(folder, files, tokenizer, config)


# Which files, and what the dataset is called


def text_files(sources: list[str]) -> list[Path]:
    """The files that `sources` names; those of a folder are sorted. UserError for a name of nothing.

    In folders, names that begin with a dot are left out, and the files of a dataset.
    """
    if not sources:
        raise UserError(f"nothing to prepare: expected a name ({', '.join(CORPORA)}) or text files")
    files: list[Path] = []
    for source in sources:
        if os.path.isfile(source):
            files.append(Path(source))
        elif os.path.isdir(source):
            inside = sorted(_below(source))
            if not inside:
                raise UserError(f"{shown(source)}: no files in this folder, expected text files")
            files.extend(inside)
        elif os.path.lexists(source):
            raise UserError(f"{shown(source)}: not a regular file or a folder, expected a text file")
        else:
            hint = nearest(source, CORPORA) or f", expected text files or one of {', '.join(CORPORA)}"
            raise UserError(f"{shown(source)}: no such file or corpus{hint}")
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
    parts = Path(os.path.relpath(source)).parts
    if parts[:1] == ("data",) and len(parts) > 2:
        name = parts[1]
    else:
        name = os.path.basename(os.path.abspath(source))
        name = name if os.path.isdir(source) else Path(name.removesuffix(".gz")).stem
    if not name or name in CORPORA:
        what = f"{name} is the name of a corpus" if name else f"{shown(source)} gives it no name"
        raise UserError(f"dataset: {what}, expected another: --dataset=NAME")
    return name


def _check_replaces(folder: Path, dataset: str, files: Sequence[Path]) -> None:
    """UserError if `folder` holds a dataset of other files, and the user did not name it."""
    if not any(os.path.lexists(folder / name) for name in FILES):
        return
    try:
        meta = read_meta(folder) or {}
    except UserError:
        meta = {}
    if meta.get("sources") != sources_of(files):  # not known for datasets of nanoGPT
        raise UserError(
            f"dataset: {folder} holds a dataset of other files; to replace it, name it: --dataset={quoted(dataset)}; "
            "to keep it, choose another name: --dataset=NAME"
        )


def sources_of(files: Sequence[Path]) -> str:
    """A digest of the files' paths. It tells whether a dataset was made of the same files, and shows no path."""
    names = "\0".join(os.path.realpath(path) for path in files)
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()


# Corpora by name


def ensure_docs(folder: Path, say: Callable[[str], None] = print) -> None:
    """Make the dataset `docs` in `folder` if it is missing, in seconds. Say its size and sha256.

    A dataset of that name that was made by another program is left as it is.
    """
    if not os.path.isfile(folder / "train.bin"):
        write_corpus(folder, "docs", "char", PrepareConfig())
    try:
        meta = read_meta(folder) or {}
    except UserError as error:
        raise UserError(f"{error}; python -m train.prepare docs makes it again") from None
    if {"train_tokens", "val_tokens", "tokenizer", "sha256"} <= meta.keys():
        say(docs_line(meta))


def docs_line(meta: dict[str, Any]) -> str:
    """A line about `docs`: its tokens and sha256."""
    tokens = meta["train_tokens"] + meta["val_tokens"]
    unit = "characters" if meta["tokenizer"] == "char" else "tokens"
    return f"docs: {tokens:,} {unit} of Python's own documentation, sha256 {meta['sha256']}"


def write_corpus(folder: Path, name: str, tokenizer: str, config: PrepareConfig) -> dict[str, Any]:
    """Fetch the text of a corpus as `folder`/input.txt, and make its dataset with `write_dataset`."""
    path = folder / "input.txt"
    if tokenizer == "gpt2":
        GPT2Tokenizer(config.bpe_dir or None)  # before anything is fetched for it
    with making_folder(folder):
        there = os.path.lexists(path)
        CORPORA[name].fetch(path)
        try:
            return write_dataset(folder, [path], tokenizer, config)
        except UserError:
            if not there:
                path.unlink(missing_ok=True)
            raise


def write_openwebtext(folder: Path, bpe_dir: str) -> dict[str, Any]:
    """Write OpenWebText in nanoGPT's split, <|endoftext|> after every document. Returns the meta."""
    bpe = GPT2Tokenizer(bpe_dir or None)
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
        return write_tokens(folder, bpe, in_order(encode, texts()), digest.hexdigest)


# The files


def write_dataset(folder: Path, paths: Sequence[Path], tokenizer: str, config: PrepareConfig) -> dict[str, Any]:
    """Encode the files, one after the other, into `folder`, the last part of them for validation.

    tokenizer: "char", "byte" or "gpt2", in place of config's. Parts are measured in characters, for "byte" in bytes.
    Returns what meta.json says. UserError if a file is not UTF-8, if all are empty, and if a part would have fewer than
    2 tokens; then `folder` stays as it was.
    """
    named = ", ".join(map(str, paths))
    changed = UserError(f"{named}: changed while being read; run again")
    coder = GPT2Tokenizer(config.bpe_dir or None) if tokenizer == "gpt2" else ByteTokenizer()
    between = END_OF_TEXT if tokenizer == "gpt2" else ""
    first, second = hashlib.sha256(), hashlib.sha256()
    with progress(2 * sum(os.stat(path).st_size for path in paths), "B") as bar:

        def reading(digest: Any) -> Iterator[str | bytes]:
            pieces = read_text(paths, between, raw=tokenizer == "byte")
            for piece in whole_words(pieces) if tokenizer == "gpt2" else pieces:
                data = piece.encode("utf-8", "surrogateescape")
                digest.update(data)
                bar.update(len(data))
                yield data if tokenizer == "byte" else piece

        def sha256() -> str:
            if first.digest() != second.digest():
                raise changed
            return first.hexdigest()

        length, alphabet = 0, np.zeros(0x110000, dtype=bool)
        for piece in reading(first):
            length += len(piece)
            if tokenizer == "char":
                alphabet[code_points(piece)] = True
        if length == 0:
            raise UserError(f"{named}: empty, expected text")
        if tokenizer == "char":
            coder = CharTokenizer([chr(code) for code in np.flatnonzero(alphabet)])
        parts = split_at(reading(second), int(length * (1 - config.val_fraction)), between)
        try:
            return write_tokens(folder, coder, in_order(coder.encode_array, parts), sha256, sources=sources_of(paths))
        except ValueError:  # a character that the first pass did not meet
            raise changed from None


def write_tokens(
    folder: Path,
    tokenizer: Tokenizer,
    tokens: Iterable[tuple[str, np.ndarray]],
    sha256: Callable[[], str],
    **facts: Any,
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta from arrays of ids, each with the name of its part. Returns the meta.

    sha256: of the text; called last. facts: more for meta.json. UserError if a part has fewer than 2 tokens; then
    `folder` stays as it was.
    """
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    meta, sums = tokenizer.meta() | {"dtype": dtype.name} | facts, {"bytes": CHECKSUM_BYTES}
    with making_folder(folder), staging_folder(folder) as staging:
        with open(staging / "train.bin", "w+b") as train, open(staging / "val.bin", "w+b") as val:
            files = {"train": train, "val": val}
            for name, ids in tokens:
                files[name].write(np.ascontiguousarray(ids, dtype=dtype))
            for name, file in files.items():
                meta[f"{name}_tokens"] = count = file.tell() // dtype.itemsize
                if count < 2:
                    raise UserError(f"too little text: the {name} part has {count} tokens, expected 2 or more")
                file.seek(0)
                sums[name] = checksums(file, CHECKSUM_BYTES)
        meta |= {"sha256": sha256(), "checksums": sums}
        (staging / "meta.json").write_text(json.dumps(meta))
        if isinstance(tokenizer, CharTokenizer):  # nanoGPT's own form, for its scripts
            itos = dict(enumerate(tokenizer.chars))
            stoi = {char: i for i, char in itos.items()}
            nanogpts = {"vocab_size": tokenizer.n_vocab, "itos": itos, "stoi": stoi}
            (staging / "meta.pkl").write_bytes(pickle.dumps(nanogpts))
        replace_together(staging, folder, FILES)
    return meta


def in_order(encode: Callable[[Any], np.ndarray], parts: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, encode(item)) of every (name, item), on all cores, in order, a few items ahead."""
    ahead = 2 * (os.cpu_count() or 1)
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, item in parts:
            waiting.append((name, pool.submit(encode, item)))
            if len(waiting) > ahead:
                name, ids = waiting.popleft()
                yield name, ids.result()
        yield from ((name, ids.result()) for name, ids in waiting)


def progress(total: int, unit: str) -> Any:
    """A progress bar on a terminal, else a line every half minute. Nothing is shown in the first second."""
    from tqdm import tqdm  # only here: a run that trains does without

    style = {"mininterval": 0.1, "delay": 1}
    if not sys.stderr.isatty():
        line = "{percentage:3.0f}%, {rate_fmt}, {remaining} left\n"
        style = {"mininterval": 30, "delay": 30, "bar_format": line}
    return tqdm(total=total, unit=unit, unit_scale=True, leave=False, **style)


if __name__ == "__main__":
    run(main)
