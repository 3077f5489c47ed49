"""Whether a training step fits into its device's memory: asked before memory is taken, not an hour later.

How much a step holds is found by running it on shapes (`train/dryrun.py`): what torch and our kernels would ask an
allocator for, eager. What is not counted: gaps between an allocator's blocks, the code of kernels, and the CUDA
context, which is there before free memory is asked for. Compiled, steps of 6 or 8 blocks took from 2 % less to 15 %
more on a CPU.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kernels import Ops
from model import GPTConfig
from model.recompute import MODES
from train.config import TrainConfig
from train.distributed import World
from train.dryrun import Job, dry_run
from train.errors import UserError

LOSS_CHUNK = 4096  # rows of logits, where not all are held: enough for the matmuls to stay large


def job_of(
    config: TrainConfig,
    shape: GPTConfig,
    ops: Ops,
    dtype: torch.dtype,
    world: World,
    chunk: int,
    *,
    resumed: bool,
    **device: Any,
) -> Job:
    """One rank's part in a training step. chunk: rows of logits at a time, 0 for all. device: `Job`'s on, capability,
    multiprocessors."""
    return Job(
        shape,
        config.batch_size,
        ops,
        accumulation=config.gradient_accumulation_steps // world.size,
        several=config.gradient_accumulation_steps > 1,
        dtype=dtype,
        stream_dtype=getattr(torch, config.residual_dtype),
        loss_chunk=chunk,
        recompute=config.recompute,
        attention=config.attention,
        resumed=resumed,
        shards=world.size if config.shard else 1,
        **device,
    )


def rows_at_a_time(
    config: TrainConfig, ops: Ops, dtype: torch.dtype, vocab_size: int, block_size: int, room: float, why: str = ""
) -> int:
    """How many rows of logits the loss holds at a time, 0 for all: as set, or in chunks where all of them would fill a
    quarter of `room`, the device's bytes. UserError for chunks of the reference kernels; why: what explains these."""
    chunk = config.loss_chunk
    if ops.name == "reference":
        if chunk > 0:
            raise UserError(f"loss_chunk: got {chunk}, expected 0 or -1: the reference kernels hold all logits{why}")
        return 0
    logits = config.batch_size * block_size * vocab_size * dtype.itemsize
    return chunk if chunk >= 0 else LOSS_CHUNK if logits > room / 4 else 0


def as_planned_for(device: torch.device) -> dict[str, Any]:
    """What a `Job` says of a device that is there."""
    if device.type != "cuda":
        return {"on": "cpu" if device.type == "cpu" else "meta"}
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return {"on": "meta", "capability": capability, "multiprocessors": properties.multi_processor_count}


def check_memory(job: Job, where: str, free: int | None, ranks: int) -> str:
    """A line for the log: what this rank's step will hold, and what its device, called `where`, has free.

    free: bytes, None where the system does not say. UserError, naming settings that would fit, only if the step needs
    more than that: a run that would fit is never refused.
    """
    memory = dry_run(job).memory
    total = sum(memory.values())
    if free is None:
        return f"memory: {amount(total)} estimated: {listed(memory)}"
    loaded = job.on == "cpu" and job.resumed  # then the checkpoint's weights are where they are to be
    room = free + memory["weights"] if loaded else free
    if total > room:
        raise UserError(
            f"memory: got a step of {amount(total)} ({listed(memory)}), expected at most {amount(room)}, what {where} "
            f"has free; {advice(job, room, ranks)}"
        )
    return f"memory: {amount(total)} estimated: {listed(memory)}; {where} has {amount(room)} free"


def free_memory(device: torch.device, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Free bytes on the device, None where the system does not say. Ranks on one host all see the same."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and meminfo.exists():
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo.read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    return None


def advice(job: Job, room: int, ranks: int) -> str:
    """Which settings to change so that the step fits, the first of `changes` that does; what to say where none does."""
    for settings in changes(job, ranks):
        times = job.batch_size // settings.get("batch_size", job.batch_size)  # so that a step keeps its tokens
        accumulation = times * job.accumulation
        fields = {name: value for name, value in settings.items() if name != "shard"}
        if "shard" in settings:
            fields |= {"shards": ranks}
        changed = dataclasses.replace(job, accumulation=accumulation, several=job.several or times > 1, **fields)
        if dry_run(changed).total <= room:
            if times > 1:
                settings = settings | {"gradient_accumulation_steps": accumulation * ranks}
            return " ".join(f"--{name}={value}" for name, value in settings.items()) + " fits"
    return "not even --batch_size=1 --recompute=block fits" + (
        f", nor with --shard on {ranks} ranks" if ranks > 1 else ""
    )


def changes(job: Job, ranks: int) -> Iterator[dict[str, Any]]:
    """Settings to try, in this order: the loss in chunks; what is computed again; both; smaller micro-batches; these
    and all of the former; the same on shards of the state."""
    tokens = job.batch_size * job.shape.block_size
    fused = job.ops.name == "fused"
    chunk = [{"loss_chunk": LOSS_CHUNK}] if fused and not job.loss_chunk and tokens > LOSS_CHUNK else []
    again = [{"recompute": mode} for mode in MODES[MODES.index(job.recompute) + 1 :]]
    cheap = [*chunk, *again, *(one | other for one in chunk for other in again)]
    sizes = [{"batch_size": n} for n in range(job.batch_size - 1, 0, -1) if job.batch_size % n == 0]
    local = [*cheap, *sizes, *(size | most for size in sizes for most in cheap[-1:])]
    yield from local
    if ranks > 1 and job.shards == 1:
        yield from ({"shard": True} | change for change in ({}, *local))


def amount(size: int) -> str:
    """1234567890 as "1.2 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def listed(memory: dict[str, int]) -> str:
    """Each part that is worth mentioning, in the unit of the whole."""
    whole = sum(memory.values())
    unit = 1e9 if whole >= 1e9 else 1e6
    return ", ".join(f"{name} {size / unit:.1f}" for name, size in memory.items() if size >= whole / 100)
