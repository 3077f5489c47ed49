"""What a device does at best, measured on it: the two ceilings that a step is held against."""

import time
from dataclasses import dataclass

import torch

from train.hardware import measure_flops, synchronize

COPIED = 2**28  # bytes of the tensor that is copied: an H100 caches 50 MB, a B200 126 MB, a CPU seldom more than this


@dataclass(frozen=True)
class Ceilings:
    flops: float  # FLOP/s of a large matmul
    bandwidth: float  # bytes/s of a large copy, those read and those written together


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Both, the first in `dtype`, in about a second; nothing else should run on the device meanwhile."""
    return Ceilings(measure_flops(device, dtype), measure_bandwidth(device))


def measure_bandwidth(device: torch.device, budget: float = 0.5, size: int = COPIED) -> float:
    """The best rate of copying `size` bytes from memory to memory, in about `budget` seconds; bytes/s, both ways."""
    source = torch.ones(size // 4, device=device)  # written: pages that nobody wrote to may all be one
    target = torch.empty_like(source)
    repeats = 1 if device.type == "cpu" else 8  # as for the matmuls
    target.copy_(source)
    best, deadline = 0.0, time.perf_counter() + budget
    while True:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        synchronize(device)
        best = max(best, 2 * size * repeats / (time.perf_counter() - start))
        if time.perf_counter() > deadline:
            return best
