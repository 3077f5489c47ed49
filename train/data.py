"""Batches drawn from a prepared dataset.

A batch is a function of (seed, step, rank) and of nothing else: there is no position in the data to save, and
a resumed run continues with the batches it would have had. The start offsets of a step are one draw without
replacement for the *global* batch, all micro-steps of all ranks, of which each rank takes its rows. So ranks
never share a sample within a step, and two processes train on exactly what one would have trained on.

While the device works, a thread gathers the steps that follow. The thread touches host memory only: a CUDA
call from a second thread would invalidate a graph capture that happens to be under way in the first.
"""

import math
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch

from train.tokenfiles import Dataset, Split, bad_token

__all__ = ["Batch", "Dataset", "Loader", "Split"]

# Small steps are gathered many at a time: waking the thread costs more than filling 12 x 64 tokens.
RUN_BYTES = 1 << 20
MAX_RUN = 16
HOST_BUFFERS = 3  # one being filled, one being handed out, one that the device may still be reading
STREAMS = {"train": 1, "val": 2}  # random streams of the evaluations; 0 is training's


class Batch(NamedTuple):
    """What one rank trains on in one step, A micro-steps of B samples of T tokens.

    x, y: (A, B, T) int64, contiguous, on the loader's device; y is x one token later.
    seeds: A ints in [0, 2^63), the seed of each micro-step's dropout masks.
    """

    x: torch.Tensor
    y: torch.Tensor
    seeds: tuple[int, ...]


class _Buffer:
    """Pinned host memory for a run of steps, and the event after which the device has read it all."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.memory = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        self.copied: torch.cuda.Event | None = None


class _Run(NamedTuple):
    """Consecutive steps gathered together. Run n holds the steps from n * run_length on."""

    number: int
    buffer: _Buffer | None
    batches: "Future[list[Batch]]"


class Loader:
    """Draws the batches of one rank. A context manager; `close` ends its thread.

    Args:
        batch_size, block_size: B samples of T tokens a micro-step.
        accumulation: micro-steps a step of this rank.
        seed: with the step's number it determines every batch.
        device: where batches are put; copies to a CUDA device start from pinned memory and do not block.
        rank, world_size: global micro-step m * world_size + rank is this rank's m-th.
        vocab_size: ids in a batch must be below it; default the dataset's.

    Raises UserError where the dataset is shorter than one sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        block_size: int,
        accumulation: int = 1,
        seed: int = 1337,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        dataset.check_length(block_size)
        self.dataset = dataset
        self.batch_size, self.block_size, self.accumulation = batch_size, block_size, accumulation
        self.seed = seed % 2**64
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.vocab_size = dataset.vocab_size if vocab_size is None else vocab_size
        # Row i of this view is tokens[i : i + T + 1]; indexing it beats a loop of slices 3 to 10 times.
        self._windows = {
            name: np.lib.stride_tricks.sliding_window_view(np.asarray(dataset.split(name)), block_size + 1)
            for name in ("train", "val")
        }
        step_bytes = 16 * accumulation * batch_size * block_size
        self._run_length = min(max(RUN_BYTES // step_bytes, 1), MAX_RUN)
        self._shape = (self._run_length, 2, accumulation, batch_size, block_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        pinned = range(HOST_BUFFERS if self.device.type == "cuda" else 0)
        self._buffers = deque(_Buffer(self._shape) for _ in pinned)
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
        return batch if self.device.type == "cpu" else self._to_device(batch, self._current.buffer)

    def evaluation(self, split: Split, k: int) -> Batch:
        """The k-th evaluation batch of a split, (1, B, T): the same at every evaluation and on every rank.

        Fixed batches take the sampling noise out of the difference between two evaluations, which is what
        early stopping and the best checkpoint are decided by. Ranks share an evaluation out by taking
        different k.
        """
        offsets = self._draw(split, self._generator(STREAMS[split], k), self.batch_size)
        shape = (2, 1, self.batch_size, self.block_size)
        x, y = self._gather(split, offsets, torch.empty(shape, dtype=torch.int64)).to(self.device)
        return Batch(x, y, (0,))  # dropout is off

    def close(self) -> None:
        """End the thread. The batches handed out stay valid."""
        self._thread.shutdown(cancel_futures=True)
        self._next = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _gather_later(self, number: int) -> _Run:
        """Hand a run to the thread, which works in order: no buffer is ever filled by two runs at once."""
        buffer = None
        if self._buffers:
            self._buffers.rotate(-1)
            buffer = self._buffers[-1]
            if buffer.copied is not None:
                buffer.copied.synchronize()  # long done, unless the host is far ahead of the device
        return _Run(number, buffer, self._thread.submit(self._gather_run, number, buffer and buffer.memory))

    def _gather_run(self, number: int, memory: torch.Tensor | None) -> list[Batch]:
        memory = torch.empty(self._shape, dtype=torch.int64) if memory is None else memory
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

    def _to_device(self, batch: Batch, buffer: _Buffer | None) -> Batch:
        x, y = (t.to(self.device, non_blocking=buffer is not None) for t in batch[:2])
        if buffer is not None:
            buffer.copied = torch.cuda.Event()
            buffer.copied.record(torch.cuda.current_stream(self.device))
        return Batch(x, y, batch.seeds)

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
        rows = self._windows[split][offsets]  # (A·B, T + 1), the files' dtype
        if rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            position = int(offsets[row]) + int(column)
            raise bad_token(self.dataset.path(split), position, int(rows[row, column]), self.vocab_size)
        x, y = buffer.view(2, -1, self.block_size).numpy()
        x[:] = rows[:, :-1]
        y[:] = rows[:, 1:]
        return buffer
