"""What one `pytest bench/` measured, and how pytest-benchmark is shown it."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import pytest
import torch

from bench.bounds import bound
from bench.clock import Clock
from bench.schema import Kernel, Peak, Step, median
from train.hardware import Ceilings, measure_ceilings, peak_flops, resolve_device, resolve_dtype, use_device

CLOCK = Clock()  # one for all: pytest-benchmark wants a test's timer before the test begins


@dataclass
class Session:
    device: torch.device
    dtype: torch.dtype
    kernels: list[Kernel] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def of(cls, config: pytest.Config) -> Self:
        """The session of this run of pytest: the same one every time."""
        if SESSION not in config.stash:
            device = use_device(resolve_device("auto"))
            config.stash[SESSION] = cls(device, resolve_dtype("auto", device))
        return config.stash[SESSION]

    @cached_property
    def peak(self) -> Peak:
        """The device's peak FLOP/s, of which MFU is a share."""
        return Peak(**asdict(peak_flops(self.device, self.dtype)))

    @cached_property
    def ceilings(self) -> Ceilings:
        """The device's, measured when they are first asked for."""
        return measure_ceilings(self.device, self.dtype)


SESSION = pytest.StashKey[Session]()


def facts(row: Kernel, group: list[Kernel], ceilings: Ceilings) -> dict[str, Any]:
    """What stands beside a row's times in a file of pytest-benchmark's; rates are those of the median."""
    seconds = median(row.seconds)
    found = bound(row, ceilings.flops, ceilings.bandwidth)
    compiled = next((median(r.seconds) for r in group if r.variant == "compiled" and r.seconds), None)
    return {
        "shape": row.shape,
        "dtype": row.dtype,
        "bytes": row.bytes,
        "flops": row.flops,
        "bytes_per_second": row.bytes / seconds if row.bytes else None,
        "flops_per_second": row.flops / seconds if row.flops else None,
        "share_of_ceiling": found and found.share,
        "times_faster_than_compiled": compiled / seconds if compiled else None,
    }
