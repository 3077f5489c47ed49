"""A prepared dataset, and the batches drawn from it.

train.bin and val.bin are flat little-endian arrays of token ids; meta.json describes them, and has their checksums.
nanoGPT's folders are read as they are: with a meta.pkl, by an unpickler that runs nothing (`metapickle.py`); without
any meta, as GPT-2 BPE in uint16.

A batch depends on (seed, step, rank) and on nothing else. So there is no position in the data to save, and a resumed
run gets the batches that it would have had. The start offsets of a step are drawn once, without replacement, for the
*global* batch: all micro-steps of all ranks. Each rank takes its rows of it. So ranks never share a sample within a
step, and two processes train on exactly what one would have trained on.

While the device works, a thread gathers the next steps. It uses only host memory: a CUDA call from a second thread
would break a graph capture in the first one.
"""

import itertools
import json
import math
import os
import time
import weakref
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
import torch

from train.corpora import CORPORA, dataset_folder, how_to_make
from train.errors import UserError, shown
from train.files import open_regular, read_regular
from train.metapickle import digest
from train.settings import nearest
from train.text import GPT2_TOKENS, MAX_META, Tokenizer, checked_meta, from_meta, padded_vocab_size, read_meta

Split = Literal["train", "val"]

SCAN_BYTES = 256 << 20  # of each file, read before the first step
SCAN_TOKENS = 4 << 20  # tokens looked at together in such a check
GPT2_TABLE = "4b8ea1d264f01b94e5d7257c9998d1f4b94172ee57985fd67b408871d59146d3"  # digest of its tokens, spelled
GPT2_PADDED = 51200  # GPT-2's vocabulary, padded to the next multiple of 1024
# Small steps are gathered many at a time: waking the thread costs more than filling 12 x 64 tokens.
RUN_BYTES = 1 << 20
MAX_RUN = 16
STREAMS = {"train": 1, "val": 2}  # random streams of the evaluations; training's is 0


class Dataset:
    """A prepared dataset: a folder with train.bin, val.bin and, unless it is nanoGPT's GPT-2 BPE, its meta.

    Attributes:
        train, val: (n,) read-only np.memmap of uint16 or uint32 token ids; no part of them is read here.
        meta: dict as in meta.json ("vocab_size", "tokenizer", "dtype", "chars", ...).
        n_vocab: ids in the files are below this.
        vocab_size: of a new model for this data: n_vocab, GPT-2's padded to a multiple of 64.

    UserError if a file is missing or empty, if its size is no whole number of tokens or not the one that meta says, and
    if meta is malformed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        if not os.path.isfile(self.path("train")):
            there = [path.name for path in folder.parent.glob("*/")]
            similar = "" if folder.name in CORPORA else nearest(folder.name, [*there, *CORPORA])
            what = "no train.bin" if os.path.isdir(folder) else f"no such dataset{similar}"
            raise UserError(f"{folder}: {what}; make it with: {how_to_make(folder)}")
        self.meta = read_meta(folder) or checked_meta({"vocab_size": GPT2_TOKENS, "tokenizer": "gpt2"})
        self._checksums = self.meta.pop("checksums", None)
        self.meta.pop("sources", None)  # for `train.prepare`
        self.n_vocab: int = self.meta["vocab_size"]
        self.vocab_size = padded_vocab_size(self.n_vocab) if self.meta.get("tokenizer") == "gpt2" else self.n_vocab
        self._files: dict[Split, BinaryIO] = {}  # open, so that a file stays whole that another one replaces
        self.train, self.val = self._open("train"), self._open("val")

    def _open(self, name: Split) -> np.memmap:
        path, expected = self.path(name), self.meta.get(f"{name}_tokens")
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        try:
            self._files[name] = file = open_regular(path)
            weakref.finalize(self, file.close)
            count, rest = divmod(os.fstat(file.fileno()).st_size, dtype.itemsize)
            if rest or not count or count != (expected or count):
                known = f"the {expected:,} of meta.json" if expected else "one or more"
                raise UserError(
                    f"{path}: {count:,} tokens and {rest} bytes, expected {known}, {dtype.itemsize} bytes each: it was "
                    f"cut short, or it is another file; make it again with: {self._how()}"
                )
            return np.memmap(file, dtype=dtype, mode="r")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; make it with: {self._how()}") from None

    def _how(self) -> str:
        return how_to_make(self.folder, self.meta.get("tokenizer"))

    def split(self, name: Split) -> np.memmap:
        return self.train if name == "train" else self.val

    def path(self, name: Split) -> Path:
        return self.folder / f"{name}.bin"

    def tokenizer(self, bpe_dir: str | Path | None = None) -> Tokenizer:
        """The tokenizer that made the files. UserError if it is not known, or cannot be loaded."""
        return from_meta(self.meta, bpe_dir)

    def fingerprint(self) -> str:
        """Identifies the validation split: its length and a CRC. The CRC of a large file is that of its two ends."""
        tokens = np.asarray(self.val)
        if tokens.nbytes > SCAN_BYTES:
            tokens = np.concatenate([tokens[:SCAN_TOKENS], tokens[-SCAN_TOKENS:]])
        return f"{len(self.val)} tokens, CRC {zlib.crc32(tokens):08x}"

    def check(self, block_size: int = 0, vocab_size: int | None = None, *, whole: bool = False) -> bool:
        """UserError if a split is too short for `block_size`, holds an id of `vocab_size` (None: n_vocab) or more, or
        does not match its checksums. Returns whether meta has checksums.

        Of a file over 256 MB only the beginning is read, unless `whole`. The loader checks the ids of every batch.
        """
        limit = self.n_vocab if vocab_size is None else vocab_size
        sums = self._checksums
        for name in ("train", "val"):
            tokens = np.asarray(self.split(name))
            if len(tokens) <= block_size:  # a sample has one token more
                raise UserError(
                    f"block_size={block_size}: {self.path(name)} holds {len(tokens):,} tokens, expected at least "
                    f"{block_size + 1:,}"
                )
            ids = tokens[:SCAN_TOKENS]
            if sums is None and len(ids) > 1 and ids.any() and not ids[1::2].any():
                raise UserError(
                    f"{self.path(name)}: every second token is 0, as where the file has ids of more than "
                    f"{8 * ids.itemsize} bits; expected {self.meta['dtype']} for vocab_size={self.n_vocab}, or another "
                    f'"dtype" in {self.folder / "meta.json"}, beside "vocab_size" and "tokenizer"'
                )
            count = sums["bytes"] // tokens.itemsize if sums else SCAN_TOKENS
            end = len(tokens) if whole else min(len(tokens), SCAN_BYTES // tokens.itemsize)
            for i, start in enumerate(range(0, end, count)):
                ids = tokens[start : start + count]
                self.check_ids(name, ids, start, limit)
                if sums and sums[name][i : i + 1] != [zlib.crc32(ids)]:
                    raise UserError(
                        f"{self.path(name)}: damaged, or another file: tokens {start:,} to {start + count:,} do not "
                        f"match the checksum in meta.json; make it again with: {self._how()}"
                    )
        return sums is not None

    def check_ids(self, split: Split, ids: np.ndarray, start: int, limit: int) -> None:
        """UserError if one of `ids` is `limit` or more. They are the split's tokens from position `start` on."""
        if ids.max() >= limit:
            at = int(np.argmax(ids >= limit))
            raise UserError(
                f"{self.path(split)}: token {ids[at]} at position {start + at:,}, expected ids below vocab_size={limit}"
            )

    def samples(self, split: Split, starts: np.ndarray, length: int) -> np.ndarray:
        """(n, length): the split's tokens from each of `starts` (n,) on. UserError if the file has become shorter.

        It is read, not mapped, because reading a map beyond the end of its file kills the process.
        """
        file, tokens = self._files[split].fileno(), self.split(split)
        rows = np.empty((len(starts), length), tokens.dtype)
        for row, start in zip(rows, starts.tolist(), strict=True):
            if os.preadv(file, [row], start * row.itemsize) < row.nbytes:
                raise UserError(
                    f"{self.path(split)}: {os.fstat(file).st_size:,} bytes, expected {tokens.nbytes:,}: it was cut "
                    "short under the run"
                )
        return rows


# Which tokenizer


def checkpoint_tokenizer(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer of a loaded checkpoint, as in meta.json.

    Our checkpoints hold it. nanoGPT's name only their dataset: its tokenizer is taken if it is here and has as many
    tokens as the model, else that of `unnamed_tokenizer`.
    """
    found, vocab_size = checkpoint["nanofuse"].get("tokenizer", {}), checkpoint["model_args"]["vocab_size"]
    if "vocab_size" in found:
        return found
    meta = read_meta(dataset_folder(str(checkpoint["config"].get("dataset", ""))))
    if meta and vocab_size in (meta["vocab_size"], padded_vocab_size(meta["vocab_size"])):
        return meta
    return unnamed_tokenizer(vocab_size)


def weights_tokenizer(source: str, vocab_size: int) -> dict[str, Any]:
    """The tokenizer of the weights `source`, a name, a file or a folder: that of the meta.json beside them, which
    `python -m train.export` writes, else that of `unnamed_tokenizer`, unless `transformers`' own says otherwise."""
    if not os.path.exists(source):
        return unnamed_tokenizer(vocab_size)
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    found = read_meta(folder) or unnamed_tokenizer(vocab_size)
    foreign = _foreign_tokenizer(folder) if found.get("tokenizer") == "gpt2" else ""
    return {"tokenizer": foreign, "vocab_size": vocab_size} if foreign else found


def _foreign_tokenizer(folder: Path) -> str:
    """The name of the file in which `transformers` keeps a tokenizer with other tokens than GPT-2's; "" without one.
    GPT-2s of other languages have as many tokens as OpenAI's."""
    for name in ("vocab.json", "tokenizer.json"):
        try:
            vocab = json.loads(read_regular(folder / name, MAX_META[".json"]))
            vocab = vocab if name == "vocab.json" else vocab["model"]["vocab"]
            tokens = {i: token for token, i in vocab.items() if i < GPT2_TOKENS - 1}
        except OSError:
            continue
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # of another kind, a list for one
            return name
        return "" if digest(tokens) == GPT2_TABLE else name
    return ""


def unnamed_tokenizer(vocab_size: int) -> dict[str, Any]:
    """The tokenizer of a model that does not say: GPT-2's if it has GPT-2's tokens, padded or not; else unknown."""
    if GPT2_TOKENS <= vocab_size <= GPT2_PADDED:
        return {"tokenizer": "gpt2", "vocab_size": GPT2_TOKENS}
    return {"vocab_size": vocab_size}


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """How two tokenizers differ, each as in meta.json; "" if they are the same. An equal size is not enough."""
    kinds, sizes = (there.get("tokenizer"), here.get("tokenizer")), (there["vocab_size"], here["vocab_size"])
    tables = [digest(dict(enumerate(it["chars"]))) if "chars" in it else it.get("table") for it in (there, here)]
    if None in kinds and None not in tables:
        return "" if tables[0] == tables[1] else "the tables of tokens are two different ones"
    if None in kinds:  # only sizes can be compared; if both are unknown, the model may have more tokens than the data
        fits = sizes[0] == sizes[1] or max(sizes) == padded_vocab_size(min(sizes)) or kinds == (None, None)
        return "" if fits else f"{sizes[0]} different tokens there, {sizes[1]} here"
    if kinds[0] != kinds[1]:
        return f"the tokenizer is {shown(kinds[0])} there, {shown(kinds[1])} here"
    for token, (one, other) in enumerate(itertools.zip_longest(there.get("chars", ()), here.get("chars", ()))):
        if one != other:
            return f"token {token} is {shown(one)} there, {shown(other)} here"
    return ""


class Batch(NamedTuple):
    """What one rank trains on in one step, A micro-steps of B samples of T tokens.

    x, y: (A, B, T) int64, contiguous, on the loader's device; y is x one token later.
    seeds: A ints in [0, 2^63), the seed of each micro-step's dropout masks.
    """

    x: torch.Tensor
    y: torch.Tensor
    seeds: tuple[int, ...]


# x and y of a step, (2, A, B, T) in the host's memory, and the seeds of its micro-steps
Gathered = tuple[torch.Tensor, tuple[int, ...]]


@dataclass
class Loader:
    """Draws the batches of one rank. Use it as a context: its end ends the loader's thread."""

    dataset: Dataset
    batch_size: int  # B samples in a micro-step
    block_size: int  # T tokens in a sample
    accumulation: int = 1  # A micro-steps in a step of this rank
    seed: int = 1337  # with the step's number it determines every batch
    device: str | torch.device = "cpu"  # where batches are put; copies to CUDA are pinned and do not block
    rank: int = 0  # global micro-step m * world_size + rank is this rank's m-th
    world_size: int = 1
    vocab_size: int | None = None  # ids in a batch must be below it; None: the dataset's

    def __post_init__(self) -> None:
        self.seed, self.device = self.seed % 2**64, torch.device(self.device)
        self._pinned = self.device.type == "cuda"
        self.vocab_size = self.vocab_size or self.dataset.vocab_size
        step_bytes = 16 * self.accumulation * self.batch_size * self.block_size
        self._run_length = min(max(RUN_BYTES // step_bytes, 1), MAX_RUN)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        # Steps are gathered in runs: run n holds those from n * run_length on. Here are the current one and the next.
        self._runs: dict[int, Future[list[Gathered]]] = {}

    def train(self, step: int) -> Batch:
        """The batch of `step`. Any order gives the same batches. Asked for in order, they are ready."""
        number, i = divmod(step, self._run_length)
        self._runs = {n: run for n, run in self._runs.items() if n in (number, number + 1)}
        for n in (number, number + 1):
            if n not in self._runs:
                memory = self._host_memory(self._run_length, 2, self.accumulation)  # here: CUDA is not for the thread
                self._runs[n] = self._thread.submit(self._gather_run, n, memory)
        xy, seeds = self._runs[number].result()[i]  # waits, and raises what the thread met
        return Batch(*xy.to(self.device, non_blocking=self._pinned), seeds)  # one copy

    def evaluation(self, split: Split, k: int) -> Batch:
        """The k-th evaluation batch of a split, (1, B, T): the same at every evaluation and on every rank.

        So two evaluations differ by the model alone. Early stopping and the best checkpoint depend on that. Ranks share
        the work: each takes other k.
        """
        offsets = self._draw(split, self._generator(STREAMS[split], k), self.batch_size)
        x, y = self._gather(split, offsets, self._host_memory(2, 1)).to(self.device, non_blocking=self._pinned)
        return Batch(x, y, (0,))  # dropout is off

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread. The batches handed out stay valid."""
        self._thread.shutdown(cancel_futures=True)

    def _host_memory(self, *shape: int) -> torch.Tensor:
        """Memory for this many micro-steps. torch uses freed pinned memory again only after the copies from it."""
        shape = (*shape, self.batch_size, self.block_size)
        return torch.empty(shape, dtype=torch.int64, pin_memory=self._pinned)

    def _gather_run(self, number: int, memory: torch.Tensor) -> list[Gathered]:
        shape = (self.accumulation, self.world_size, self.batch_size)
        steps = []
        for step, xy in enumerate(memory, number * self._run_length):
            generator = self._generator(0, step)
            offsets = self._draw("train", generator, math.prod(shape)).reshape(shape)[:, self.rank]
            seeds = generator.integers(2**63 - 1, size=shape[:2])[:, self.rank]
            steps.append((self._gather("train", offsets.ravel(), xy), tuple(seeds.tolist())))
            time.sleep(0)  # release the GIL: the caller may be waiting for it
        return steps

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, stream, number))))

    def _draw(self, split: Split, generator: np.random.Generator, size: int) -> np.ndarray:
        """(size,) int64 start offsets in [0, len - block_size), distinct if there are that many.

        numpy draws a small sample of a large range by Floyd's method, without a table of the range.
        """
        n = len(self.dataset.split(split)) - self.block_size
        return generator.choice(n, size=size, replace=size > n)

    def _gather(self, split: Split, offsets: np.ndarray, buffer: torch.Tensor) -> torch.Tensor:
        """Fill buffer[0] with the samples at `offsets`, buffer[1] with the same a token later, as int64."""
        rows = self.dataset.samples(split, offsets, self.block_size + 1)  # (A·B, T + 1)
        if rows.max() >= self.vocab_size:
            for start, ids in zip(offsets, rows, strict=True):
                self.dataset.check_ids(split, ids, int(start), self.vocab_size)
        x, y = buffer.view(2, -1, self.block_size).numpy()
        x[:] = rows[:, :-1]
        y[:] = rows[:, 1:]
        return buffer
