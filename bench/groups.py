"""Which variants of a step are measured together: as many as the device's memory holds, always with a reference.

A variant holds its state as long as it lives. With CUDA graphs it also holds the memory of a step, because a graph has
its own. Without graphs, only one variant at a time needs the memory of a step. Times are compared only within a group.
"""

import gc
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from bench.variants import Setting, Variant
from kernels import REFERENCE, Ops, select
from model import GPTConfig
from model.flops import num_params
from train.dryrun import Job, dry_run

USED = 0.9  # of free memory: allocators leave gaps, kernels have code, and a compiled step may take more


class Footprint(NamedTuple):
    """Bytes on the device."""

    held: int  # as long as the variant lives
    beside: int  # more, during its turn


def groups(
    variants: Sequence[Variant], footprint: Callable[[Variant], Footprint], room: int | None
) -> list[list[Variant]]:
    """The variants, in groups that fit into `room` bytes; None: all in one group.

    Every group has all references. If some variant does not fit beside all of them, every group has only the last one.
    A variant that is still too large gets a group too: the run shows whether it fits.
    """

    def fits(group: Sequence[Variant]) -> bool:
        sizes = [footprint(variant) for variant in group]
        return sum(size.held for size in sizes) + max(size.beside for size in sizes) <= room

    if room is None or fits(variants):
        return [list(variants)]
    references = [variant for variant in variants if variant.compares and not variant.ours]
    others = [variant for variant in variants if variant not in references]
    kept = references if all(fits([*references, other]) for other in others) else references[-1:]
    found: list[list[Variant]] = []
    # rungs come last: if time runs out, only rungs are left out
    for variant in sorted((v for v in variants if v not in kept), key=lambda v: not v.compares):
        group = next((group for group in found if fits([*group, variant])), None)
        if group is None:
            found.append([*kept, variant])
        else:
            group.append(variant)
    return found


def footprint(variant: Variant, setting: Setting) -> Footprint:
    """A variant's memory, from a dry run on shapes."""
    workload, device = setting.workload, setting.device
    dtype = torch.float32 if variant.float32 else setting.dtype
    ops = variant.ops or select("auto", device)
    if ops.name != "fused":  # a rung with some of the fused operations takes no more than one without
        ops = REFERENCE
    memory = _memory(workload.config, workload.batch_size, workload.accumulation, ops, dtype)
    held = sum(memory[name] for name in ("weights", "copies", "moments", "gradients"))
    beside = sum(memory.values()) - held
    if not variant.ours:
        held = 16 * num_params(workload.config, non_embedding=False)  # float32: weights, gradients, two moments
    return Footprint(held + beside, 0) if variant.graphed else Footprint(held, beside)


@lru_cache
def _memory(config: GPTConfig, batch_size: int, accumulation: int, ops: Ops, dtype: torch.dtype) -> dict[str, int]:
    return dry_run(
        Job(config, batch_size, ops, accumulation=accumulation, several=accumulation > 1, dtype=dtype)
    ).memory


def free(device: torch.device) -> int | None:
    """Bytes for all variants of a group; None unless the device is a CUDA device."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    return int(USED * torch.cuda.mem_get_info(device)[0])
