"""Whether a training step fits into its device's memory: asked before memory is taken, not an hour later."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from model import GPT
from model.attention import slow_in_sdpa
from model.memory import Step, estimate
from model.recompute import MODES
from train.build import LOSS_CHUNK
from train.config import TrainConfig
from train.distributed import World
from train.errors import UserError


def check_memory(
    config: TrainConfig, model: GPT, device: torch.device, world: World, chunk: int, *, resumed: bool
) -> str:
    """A line for the log: what this rank's step is estimated to hold, and what its device has free.

    model: still on the host. chunk: rows of logits at a time, 0 for all. UserError, naming settings that would fit,
    where the estimate is more than what is free; not before: a refusal must not be for safety's sake.
    """
    step = planned(config, model, device, world, chunk, resumed=resumed)
    whole, parts, free = amount(total(step)), listed(step), free_memory(device)
    if free is None:
        return f"memory: {whole} estimated: {parts}"
    room = free + estimate(step)["weights"] if step.cpu else free  # on a CPU the weights are where they are to be
    if total(step) > room:
        raise UserError(
            f"memory: got a step of {whole} ({parts}), expected at most {amount(room)}, what {device} has free; "
            f"{advice(step, room, world.size)}"
        )
    return f"memory: {whole} estimated: {parts}; {device} has {amount(room)} free"


def planned(config: TrainConfig, model: GPT, device: torch.device, world: World, chunk: int, *, resumed: bool) -> Step:
    """One rank's training step, as far as memory is concerned."""
    sharded, shape = config.shard and world.size > 1, model.config
    matmuls = config.attention == "math"
    if config.attention == "auto":
        matmuls = slow_in_sdpa(device, model.compute_dtype, shape.block_size, shape.dropout)
    return Step(
        shape,
        config.batch_size,
        accumulation=config.gradient_accumulation_steps // world.size,
        several=config.gradient_accumulation_steps > 1,
        dtype_bytes=model.compute_dtype.itemsize,
        stream_bytes=model.stream_dtype.itemsize,
        recompute=model.recompute,
        fused=model.ops.name == "fused",
        loss_chunk=chunk,
        compiled=config.compile,
        graphs=config.cuda_graphs and device.type == "cuda" and not sharded,
        resumed=resumed,
        matmuls=matmuls,
        shards=world.size if sharded else 1,
        cpu=device.type == "cpu",
    )


def free_memory(device: torch.device, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that can still be taken on the device, None where nobody says. Ranks on one host all see the same."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and meminfo.exists():
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo.read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    return None


def advice(step: Step, room: int, ranks: int) -> str:
    """Which settings to change so that the step fits, the first of `changes` that does; what to say where none does."""
    for settings in changes(step, ranks):
        times = step.batch_size // settings.get("batch_size", step.batch_size)  # so that a step keeps its tokens
        accumulation = times * step.accumulation
        fields = {name: value for name, value in settings.items() if name != "shard"}
        if "shard" in settings:
            fields |= {"shards": ranks, "graphs": False}
        several = step.several or times > 1
        if total(dataclasses.replace(step, accumulation=accumulation, several=several, **fields)) <= room:
            if times > 1:
                settings = settings | {"gradient_accumulation_steps": accumulation * ranks}
            return " ".join(f"--{name}={value}" for name, value in settings.items()) + " fits"
    return "not even --batch_size=1 --recompute=block fits" + (
        f", nor with --shard on {ranks} ranks" if ranks > 1 else ""
    )


def changes(step: Step, ranks: int) -> Iterator[dict[str, Any]]:
    """Settings to try, in this order: the loss in chunks; what is computed again; both; smaller micro-batches; these
    and all of the former; the same on shards of the state."""
    chunk = [{"loss_chunk": LOSS_CHUNK}] if step.fused and not step.loss_chunk and step.tokens > LOSS_CHUNK else []
    again = [{"recompute": mode} for mode in MODES[MODES.index(step.recompute) + 1 :]]
    sparing = [*chunk, *again, *(one | other for one in chunk for other in again)]
    sizes = [{"batch_size": n} for n in range(step.batch_size - 1, 0, -1) if step.batch_size % n == 0]
    local = [*sparing, *sizes, *(size | most for size in sizes for most in sparing[-1:])]
    yield from local
    if ranks > 1 and step.shards == 1:
        yield from ({"shard": True} | change for change in ({}, *local))


def total(step: Step) -> int:
    """Bytes of the estimate, all in all."""
    return sum(estimate(step).values())


def amount(size: int) -> str:
    """1234567890 as "1.2 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def listed(step: Step) -> str:
    """Each part of the estimate that is worth mentioning, in the unit of the whole."""
    whole, unit = total(step), 1e9 if total(step) >= 1e9 else 1e6
    return ", ".join(f"{name} {size / unit:.1f}" for name, size in estimate(step).items() if size >= whole / 100)
