"""A prepared dataset, and the batches drawn from it.

train.bin and val.bin are flat little-endian arrays of token ids; meta.json describes them, and has their checksums.
nanoGPT's folders are read as they are: with a meta.pkl, by an unpickler that runs nothing (`metapickle.py`); without
any meta, as GPT-2 BPE in uint16.

A batch is a function of (seed, step, rank) and of nothing else: there is no position in the data to save, and
a resumed run continues with the batches it would have had. The start offsets of a step are one draw without
replacement for the *global* batch, all micro-steps of all ranks, of which each rank takes its rows. So ranks
never share a sample within a step, and two processes train on exactly what one would have trained on.

While the device works, a thread gathers the steps that follow. The thread touches host memory only: a CUDA
call from a second thread would invalidate a graph capture that happens to be under way in the first.
"""

import json
import math
import mmap
import os
import random
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch

from train.corpora import CORPORA, dataset_folder, how_to_make
from train.errors import UserError, shown
from train.files import open_regular, read_regular
from train.metapickle import read_meta_pickle
from train.settings import nearest
from train.text import GPT2_TOKENS, Tokenizer, from_meta, padded_vocab_size

Split = Literal["train", "val"]

FULL_SCAN_BYTES = 256 << 20  # files up to this size are checked whole before the first step
SCAN_TOKENS = 4 << 20  # tokens looked at together in such a check
CHECK_SECONDS = 0.5  # how long a run compares its files with their checksums
MAX_META = 64 << 20  # bytes of a meta.json or meta.pkl
MAX_VOCAB = 1 << 32  # ids are uint32 at most
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
        vocab_size: what a new model should be given; n_vocab, or GPT-2's padded to a multiple of 64.

    Raises UserError where a file is missing, empty, of a size that is no whole number of tokens, of another length than
    meta says, or where meta is malformed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self._checksums = self.meta.pop("checksums", None)
        self.meta.pop("sources", None)  # for `train.prepare`
        self.n_vocab: int = self.meta["vocab_size"]
        self.vocab_size = padded_vocab_size(self.n_vocab) if self.meta.get("tokenizer") == "gpt2" else self.n_vocab
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self.train = _open_tokens(self.folder / "train.bin", dtype, self.meta.get("train_tokens"))
        self.val = _open_tokens(self.folder / "val.bin", dtype, self.meta.get("val_tokens"))
        self._inodes = {name: self.path(name).stat().st_ino for name in ("train", "val")}

    def split(self, name: Split) -> np.memmap:
        return self.train if name == "train" else self.val

    def path(self, name: Split) -> Path:
        return self.folder / f"{name}.bin"

    def fingerprint(self) -> str:
        """What tells this validation split from another: its length and a CRC, of a large file's two ends alone."""
        tokens = np.asarray(self.val)
        if tokens.nbytes > FULL_SCAN_BYTES:
            tokens = np.concatenate([tokens[:SCAN_TOKENS], tokens[-SCAN_TOKENS:]])
        return f"{len(self.val)} tokens, CRC {zlib.crc32(tokens):08x}"

    def check_uncut(self, split: Split) -> None:
        """Raise UserError where the open file has become shorter: reading past its end would kill the process."""
        try:
            now = os.stat(self.path(split))
        except OSError:
            return  # it has no name any more, and is whole
        expected = self.split(split).nbytes
        if now.st_ino == self._inodes[split] and now.st_size < expected:
            raise UserError(
                f"{self.path(split)}: {now.st_size:,} bytes, expected {expected:,}: it was cut short under the run"
            )

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
        """Raise UserError where a split is too short for `block_size` or holds an id of `vocab_size` or more, or where
        a file is not the one that its checksums are of, as far as half a second shows.

        Files over 256 MB are not searched for such ids: the loader checks every batch that it draws.
        """
        self.check_length(block_size)
        self.check_whole(vocab_size, FULL_SCAN_BYTES)
        self.check_sums(CHECK_SECONDS)

    def check_whole(self, vocab_size: int | None = None, most: int | None = None) -> None:
        """Raise UserError where a split, of at most `most` bytes, holds an id of `vocab_size` or more."""
        limit = self.vocab_size if vocab_size is None else vocab_size
        for name in ("train", "val"):
            tokens = np.asarray(self.split(name))
            if most is None or tokens.nbytes <= most:
                for start in range(0, len(tokens), SCAN_TOKENS):
                    self.check_ids(name, tokens[start : start + SCAN_TOKENS], start, limit)

    def check_sums(self, seconds: float = float("inf")) -> bool:
        """Compare the files with their checksums, in any order, for so many seconds. Whether meta has checksums.

        Raises UserError for a difference.
        """
        if self._checksums is None:
            return False
        size, end = self._checksums["bytes"], time.monotonic() + seconds
        parts = [(name, i) for name in ("train", "val") for i in range(len(self._checksums[name]))]
        random.Random().shuffle(parts)  # the next run sees other parts
        for name, i in parts:
            with open_regular(self.path(name)) as file:
                file.seek(i * size)
                if zlib.crc32(file.read(size)) != self._checksums[name][i]:
                    raise UserError(
                        f"{self.path(name)}: damaged, or another file: it has not the checksum that meta.json has of "
                        f"bytes {i * size:,} to {(i + 1) * size:,}; make it anew with: {how_to_make(self.folder)}"
                    )
            if time.monotonic() > end:
                break
        return True

    def check_ids(self, split: Split, ids: np.ndarray, start: int, limit: int) -> None:
        """Raise UserError where one of `ids`, the split's from position `start` on, is `limit` or more."""
        if ids.max() >= limit:
            at = int(np.argmax(ids >= limit))
            raise UserError(
                f"{self.path(split)}: token {ids[at]} at position {start + at:,}, expected ids below vocab_size={limit}"
            )


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, else nanoGPT's meta.pkl, else GPT-2 BPE: completed and checked."""
    if not os.path.isfile(folder / "train.bin"):
        what = "no train.bin" if os.path.isdir(folder) else f"no such dataset{_similar(folder)}"
        raise UserError(f"{folder}: {what}; make it with: {how_to_make(folder)}")
    path = _meta_path(folder)
    return _load_meta(path) if path else _checked_meta({"vocab_size": GPT2_TOKENS, "tokenizer": "gpt2"})


def _meta_path(folder: Path) -> Path | None:
    """The meta.json, else the meta.pkl of a folder, whatever they are; None where it has neither."""
    return next((folder / name for name in ("meta.json", "meta.pkl") if os.path.lexists(folder / name)), None)


def _load_meta(path: Path) -> dict[str, Any]:
    """A meta.json, or nanoGPT's meta.pkl in its form, completed and checked. UserError where it cannot be read."""
    try:
        data = read_regular(path, MAX_META)
        return _checked_meta(read_meta_pickle(data) if path.suffix == ".pkl" else json.loads(data))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read: nested too deeply") from None
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _checked_meta(meta: Any) -> dict[str, Any]:
    """The meta of a dataset, with its dtype. ValueError or UserError where a field is not what it should be."""
    if not isinstance(meta, dict):
        raise ValueError(f"it is {shown(meta)}, expected an object with a vocab_size")
    if "vocab_size" not in meta:
        raise ValueError("no 'vocab_size' in it")
    vocab_size = meta["vocab_size"]
    if type(vocab_size) is not int or not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size is {shown(vocab_size)}, expected a positive int of at most {MAX_VOCAB:,}")
    dtype = meta.setdefault("dtype", "uint16" if vocab_size <= 1 << 16 else "uint32")
    if dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {shown(dtype)}, expected uint16 or uint32")
    if dtype == "uint16" and vocab_size > 1 << 16:
        raise ValueError(f"dtype is uint16, expected uint32 for ids up to vocab_size={vocab_size}")
    for name in ("train_tokens", "val_tokens"):
        if name in meta and (type(meta[name]) is not int or meta[name] < 1):
            raise ValueError(f"{name} is {shown(meta[name])}, expected a positive int")
    sums = meta.get("checksums")
    if sums is not None and not (
        isinstance(sums, dict)
        and type(sums.get("bytes")) is int
        and 1 <= sums["bytes"] <= 1 << 30
        and all(isinstance(sums.get(name), list) for name in ("train", "val"))
    ):
        raise ValueError(f"checksums is {shown(sums)}, expected those that train.prepare writes")
    if meta.get("tokenizer") == "char":
        from_meta(meta)
    return meta


def _similar(folder: Path) -> str:
    """` (did you mean X?)` for a dataset of a similar name, or nothing."""
    try:
        there = [entry.name for entry in os.scandir(folder.parent) if entry.is_dir()]
    except OSError:
        there = []
    return "" if folder.name in CORPORA else nearest(folder.name, [*there, *CORPORA])


def checkpoint_tokenizer(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer of a loaded checkpoint, as in meta.json.

    A checkpoint of ours holds it. Of nanoGPT's it is that of its dataset, if this lies here and has as many tokens as
    the model; else as `unnamed_tokenizer` says.
    """
    found, vocab_size = checkpoint["nanofuse"].get("tokenizer", {}), checkpoint["model_args"]["vocab_size"]
    if "vocab_size" in found:
        try:
            return _checked_meta(dict(found))
        except (ValueError, UserError) as error:
            raise UserError(f"the checkpoint's tokenizer: {error}") from None
    if path := _meta_path(dataset_folder(str(checkpoint["config"].get("dataset", "")))):
        meta = _load_meta(path)
        if vocab_size in (meta["vocab_size"], padded_vocab_size(meta["vocab_size"])):
            return meta
    return unnamed_tokenizer(vocab_size)


def weights_tokenizer(source: str, vocab_size: int) -> dict[str, Any]:
    """The tokenizer of the weights `source`, a name, a file or a folder: that of the meta.json beside them, which
    `python -m train.export` writes; else as `unnamed_tokenizer` says."""
    path = Path(source)
    meta = (path if os.path.isdir(path) else path.parent) / "meta.json"
    if os.path.exists(path) and os.path.isfile(meta):
        return _load_meta(meta)
    return unnamed_tokenizer(vocab_size)


def unnamed_tokenizer(vocab_size: int) -> dict[str, Any]:
    """The tokenizer of a model that does not say: GPT-2's if it has GPT-2's tokens, padded or not; else unknown."""
    if GPT2_TOKENS <= vocab_size <= GPT2_PADDED:
        return {"tokenizer": "gpt2", "vocab_size": GPT2_TOKENS}
    return {"vocab_size": vocab_size, "unread": "the weights hold none, and there is no data/<dataset> here with one"}


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What tells two tokenizers apart, each as in meta.json; "" where nothing does. Equal size is not enough."""
    kinds = there.get("tokenizer"), here.get("tokenizer")
    sizes = there["vocab_size"], here["vocab_size"]
    if kinds == (None, None):
        return ""  # nothing is known of either
    if None in kinds:
        fits = sizes[0] == sizes[1] or max(sizes) == padded_vocab_size(min(sizes))
        return "" if fits else f"{sizes[0]} different tokens there, {sizes[1]} here"
    if kinds[0] != kinds[1]:
        return f"the tokenizer is {shown(kinds[0])} there, {shown(kinds[1])} here"
    tables = list(there.get("chars", ())), list(here.get("chars", ()))
    for token, (one, other) in enumerate(zip(*tables, strict=False)):
        if one != other:
            return f"token {token} is {shown(one)} there, {shown(other)} here"
    return "" if tables[0] == tables[1] else f"{len(tables[0])} characters there, {len(tables[1])} here"


def _open_tokens(path: Path, dtype: np.dtype, expected: int | None) -> np.memmap:
    """The tokens of a file. expected: how many meta says that there are, None where it does not say."""
    again = how_to_make(path.parent)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0 or size % dtype.itemsize:
                raise UserError(
                    f"{path}: {size:,} bytes, expected a positive multiple of {dtype.itemsize} ({dtype.name})"
                )
            if expected is not None and size != expected * dtype.itemsize:
                raise UserError(
                    f"{path}: {size // dtype.itemsize:,} tokens, but meta.json says {expected:,}: it was cut short, or "
                    f"is another file; make it anew with: {again}"
                )
            tokens = np.memmap(file, dtype=dtype, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; make it with: {again}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if size > FULL_SCAN_BYTES and hasattr(mmap, "MADV_RANDOM"):
        # A sample is 2 KB anywhere in the file. Read-ahead would bring up to megabytes around each.
        tokens.base.madvise(mmap.MADV_RANDOM)
    return tokens


class Batch(NamedTuple):
    """What one rank trains on in one step, A micro-steps of B samples of T tokens.

    x, y: (A, B, T) int64, contiguous, on the loader's device; y is x one token later.
    seeds: A ints in [0, 2^63), the seed of each micro-step's dropout masks.
    """

    x: torch.Tensor
    y: torch.Tensor
    seeds: tuple[int, ...]


class _Run(NamedTuple):
    """Consecutive steps gathered together. Run n holds the steps from n * run_length on."""

    number: int
    batches: "Future[list[Batch]]"


@dataclass
class Loader:
    """Draws the batches of one rank, inside its context, whose end ends its thread.

    Raises UserError where the dataset is shorter than one sample.
    """

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
        self.dataset.check_length(self.block_size)
        self.seed, self.device = self.seed % 2**64, torch.device(self.device)
        self._pinned = self.device.type == "cuda"
        self.vocab_size = self.vocab_size or self.dataset.vocab_size
        # Row i of this view is tokens[i : i + T + 1]; indexing it beats a loop of slices 3 to 10 times.
        self._windows = {
            name: np.lib.stride_tricks.sliding_window_view(np.asarray(self.dataset.split(name)), self.block_size + 1)
            for name in ("train", "val")
        }
        step_bytes = 16 * self.accumulation * self.batch_size * self.block_size
        self._run_length = min(max(RUN_BYTES // step_bytes, 1), MAX_RUN)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._current: _Run | None = None
        self._next: _Run | None = None

    def train(self, step: int) -> Batch:
        """The batch of `step`. Any order gives the same batches; in order they are ready when asked for."""
        number, i = divmod(step, self._run_length)
        if self._current is None or self._current.number != number:
            run = self._next if self._next and self._next.number == number else self._gather_later(number)
            run.batches.result()  # waits, and raises what the thread met
            self._current, self._next = run, self._gather_later(number + 1)
        batch = self._current.batches.result()[i]
        x, y = (t.to(self.device, non_blocking=self._pinned) for t in batch[:2])
        return Batch(x, y, batch.seeds)

    def evaluation(self, split: Split, k: int) -> Batch:
        """The k-th evaluation batch of a split, (1, B, T): the same at every evaluation and on every rank.

        Fixed batches take the sampling noise out of the difference between two evaluations, which is what
        early stopping and the best checkpoint are decided by. Ranks share an evaluation out by taking
        different k.
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
        """Memory for so many micro-steps. Pinned memory that is let go is used again only after copies have read it."""
        shape = (*shape, self.batch_size, self.block_size)
        return torch.empty(shape, dtype=torch.int64, pin_memory=self._pinned)

    def _gather_later(self, number: int) -> _Run:
        """Hand a run to the thread."""
        memory = self._host_memory(self._run_length, 2, self.accumulation)
        return _Run(number, self._thread.submit(self._gather_run, number, memory))

    def _gather_run(self, number: int, memory: torch.Tensor) -> list[Batch]:
        batches = []
        for i, xy in enumerate(memory):
            batches.append(self._gather_step(number * self._run_length + i, xy))
            time.sleep(0)  # let go of the GIL, for which the caller may be waiting
        return batches

    def _gather_step(self, step: int, xy: torch.Tensor) -> Batch:
        shape = (self.accumulation, self.world_size, self.batch_size)
        generator = self._generator(0, step)
        offsets = self._draw("train", generator, math.prod(shape)).reshape(shape)[:, self.rank]
        seeds = generator.integers(2**63 - 1, size=shape[:2])[:, self.rank]
        x, y = self._gather("train", offsets.ravel(), xy)
        return Batch(x, y, tuple(seeds.tolist()))

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, stream, number))))

    def _draw(self, split: Split, generator: np.random.Generator, size: int) -> np.ndarray:
        """(size,) int64 start offsets in [0, len - block_size), distinct unless there are fewer than `size`.

        numpy draws a small sample of a large range by Floyd's method, without a table of the range.
        """
        n = len(self.dataset.split(split)) - self.block_size
        return generator.choice(n, size=size, replace=size > n)

    def _gather(self, split: Split, offsets: np.ndarray, buffer: torch.Tensor) -> torch.Tensor:
        """Fill buffer[0] with the samples at `offsets`, buffer[1] with the same a token later, as int64."""
        self.dataset.check_uncut(split)
        rows = self._windows[split][offsets]  # (A·B, T + 1), the files' dtype
        if rows.max() >= self.vocab_size:
            for start, ids in zip(offsets, rows, strict=True):
                self.dataset.check_ids(split, ids, int(start), self.vocab_size)
        x, y = buffer.view(2, -1, self.block_size).numpy()
        x[:] = rows[:, :-1]
        y[:] = rows[:, 1:]
        return buffer
