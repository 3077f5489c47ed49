"""Whether a training step fits into its device's memory. The check runs before memory is taken, not an hour later.

A run on shapes (`train/dryrun.py`) counts what torch and our kernels would ask an allocator for, without torch.compile.
Four things are not counted: gaps between an allocator's blocks, the kernels' code, NCCL's buffers between several GPUs,
and the CUDA context, which exists before free memory is read. On a CPU, compiled steps of 6 or 8 blocks took from 2 %
less to 15 % more.
"""

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kernels import Ops
from model import GPTConfig
from model.recompute import MODES
from train.config import MOST_ROWS, TrainConfig
from train.distributed import World
from train.dryrun import Job, dry_run
from train.errors import UserError

LOSS_CHUNK = 4096  # rows of logits in a chunk: enough to keep the matmuls large
MOST_CHUNKS = MOST_ROWS // LOSS_CHUNK  # more cost only time


def job_of(config: TrainConfig, world: World, shape: GPTConfig, ops: Ops, dtype: torch.dtype, **others: Any) -> Job:
    """One rank's part in a training step. others: `Job`'s fields that settings do not decide alone."""
    return Job(
        shape,
        config.batch_size,
        ops,
        dtype=dtype,
        accumulation=config.gradient_accumulation_steps // world.size,
        several=config.gradient_accumulation_steps > 1,
        residual_dtype=config.residual_dtype,
        recompute=config.recompute,
        attention=config.attention,
        shards=world.size if config.shard else 1,
        **others,
    )


def rows_at_a_time(
    config: TrainConfig, ops: Ops, dtype: torch.dtype, vocab_size: int, block_size: int, room: float, why: str = ""
) -> int:
    """How many rows of logits the loss holds at a time, 0 for all: as set, or LOSS_CHUNK if all would take more than a
    quarter of `room`, the device's bytes. UserError for too many chunks, and for any with the reference kernels; why: a
    reason to add."""
    chunk = config.loss_chunk
    if ops.name == "reference":
        if chunk > 0:
            raise UserError(f"loss_chunk: got {chunk}, expected 0 or -1: the reference kernels hold all logits{why}")
        return 0
    rows = config.batch_size * block_size
    if 0 < chunk < rows / MOST_CHUNKS:
        least = -(-rows // MOST_CHUNKS)
        raise UserError(f"loss_chunk: got {chunk}, expected 0, -1 or at least {least}: at most {MOST_CHUNKS} chunks")
    logits = rows * vocab_size * dtype.itemsize
    return chunk if chunk >= 0 else LOSS_CHUNK if logits > room / 4 else 0


def check_memory(job: Job, where: str, free: int | None, ranks: int) -> str:
    """A line for the log: what this rank's step will hold, and what its device, called `where`, has free.

    free: bytes, None if the system does not say. UserError only if the step needs more than that; it names settings
    that would fit.
    """
    run = dry_run(job)
    total, listed = amount(run.total), parts(run.memory)
    if free is None:
        return f"memory: {total} estimated: {listed}"
    loaded = job.on == "cpu" and job.resumed  # the checkpoint's weights already lie in this memory
    room = free + run.memory["weights"] if loaded else free
    if run.total > room:
        raise UserError(
            f"memory: got a step of {total} ({listed}), expected at most {amount(room)}, what {where} has free; "
            f"{advice(job, room, ranks)}"
        )
    return f"memory: {total} estimated: {listed}; {where} has {amount(room)} free"


def free_memory(
    device: torch.device, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Free bytes on the device, None if the system does not say. On a CPU all ranks see the same number. A container's
    limit counts, where control groups are of version 2."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and meminfo.exists():
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo.read_text(), re.MULTILINE)
        if found is None:
            return None
        free = 1024 * int(found[1])
        with suppress(OSError, ValueError):  # not in a container; no limit
            limit, stat = ((cgroup / name).read_text() for name in ("memory.max", "memory.stat"))
            free = min(free, int(limit) - int(re.search(r"^anon (\d+)$", stat, re.MULTILINE)[1]))
        return free
    return None


def advice(job: Job, room: int, ranks: int) -> str:
    """A message: the first of `changes` with which the step fits, or that none fits."""

    def changed(settings: dict[str, Any]) -> Job:
        times = job.batch_size // settings.get("batch_size", job.batch_size)  # a step keeps its number of tokens
        fields = {"accumulation": times * job.accumulation, "several": job.several or times > 1, **settings}
        if fields.pop("shard", False):
            fields["shards"] = ranks
        return dataclasses.replace(job, **fields)

    def fits(settings: dict[str, Any]) -> bool:
        tried = changed(settings)
        if tried.loss_chunk:  # there can be a thousand chunks: first, what the step holds beside all logits
            whole = dry_run(dataclasses.replace(tried, loss_chunk=0))
            if whole.total - whole.memory["logits"] > room:
                return False
        return dry_run(tried).total <= room

    for group in changes(job, ranks):
        if fits(group[-1]):
            settings = group[bisect_left(group, True, hi=len(group) - 1, key=fits)]
            after = changed(settings)
            if after.batch_size < job.batch_size:
                settings = settings | {"gradient_accumulation_steps": after.accumulation * ranks}
            return " ".join(f"--{name}={value}" for name, value in settings.items()) + " fits"
    return "not even --batch_size=1 --recompute=block fits" + (
        f", nor with --shard on {ranks} ranks" if ranks > 1 else ""
    )


def changes(job: Job, ranks: int) -> Iterator[list[dict[str, Any]]]:
    """Settings to try, in this order: the loss in chunks; recomputation; both; smaller micro-batches; all of these
    together; the same with a sharded state. In groups, within which each needs less memory than the one before it."""
    tokens = job.batch_size * job.shape.block_size
    fused = job.ops.name == "fused"
    chunk = [{"loss_chunk": LOSS_CHUNK}] if fused and not job.loss_chunk and tokens > LOSS_CHUNK else []
    again = [{"recompute": mode} for mode in MODES[MODES.index(job.recompute) + 1 :]]
    cheap = [*chunk, *again, *(one | other for one in chunk for other in again)]
    sizes = [{"batch_size": n} for n in range(job.batch_size - 1, 0, -1) if job.batch_size % n == 0]
    local = [*([settings] for settings in cheap), sizes, [size | most for size in sizes for most in cheap[-1:]]]
    local = [group for group in local if group]
    yield from local
    if ranks > 1 and job.shards == 1:
        yield from ([{"shard": True} | change for change in group] for group in ([{}], *local))


def amount(size: int) -> str:
    """1234567890 as "1.2 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def parts(memory: dict[str, int]) -> str:
    """Each part of at least 1 %, in the unit of the sum."""
    whole = sum(memory.values())
    unit = 1e9 if whole >= 1e9 else 1e6
    return ", ".join(f"{name} {size / unit:.1f}" for name, size in memory.items() if size >= whole / 100)
