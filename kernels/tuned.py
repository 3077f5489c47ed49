"""Which path a matmul takes: the fused kernel or cuBLAS with an elementwise kernel, by measurements in `tuned.json`.

The table maps a device's name and a problem to what was faster there, and the milliseconds of all that was tried.
`python -m kernels.tune` fills it. Where nothing was measured cuBLAS is taken, so that fusing never costs time.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.matmul import Tiles

TABLE = Path(__file__).with_name("tuned.json")
CUBLAS = "cublas"
PATHS = ("auto", "triton", CUBLAS)


@dataclass(frozen=True)
class Problem:
    """A product of (M, K) by a weight, N wide, with what its op does to it."""

    op: str
    dtype: torch.dtype
    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.op} {str(self.dtype).removeprefix('torch.')} {self.M}x{self.N}x{self.K}"


@lru_cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def device_name(x: Tensor) -> str:
    """What the table calls the device that x is on."""
    return _device_name(x.device.index) if x.is_cuda else str(x.device)


@lru_cache
def _read(table: Path) -> dict[str, dict[str, Any]]:
    return json.loads(table.read_text())


def measured(device: str, problem: Problem) -> Tiles | None:
    """The fused kernel's tiles where it won on a device; None where cuBLAS did or nothing was measured."""
    use = _read(TABLE).get(device, {}).get(str(problem), {}).get("use", CUBLAS)
    return None if use == CUBLAS else Tiles(**use)


def choose(path: str, problem: Problem, x: Tensor, candidates: tuple[Tiles, ...]) -> Tiles | None:
    """The fused kernel's tiles on x's device, None for cuBLAS. path: "triton" and "cublas" force one.

    ValueError where "triton" is forced and there are no candidates.
    """
    if path == CUBLAS or not candidates:
        if path == "triton":
            raise ValueError(
                f"path: got triton, expected cublas or auto for {problem}: rows that do not begin at multiples of 16 "
                "bytes would make the fused kernel spill"
            )
        return None
    won = measured(device_name(x), problem)
    return won or candidates[0] if path == "triton" else won


def record(device: str, problem: Problem, use: Tiles | None, ms: dict[str, float], versions: str) -> None:
    """Put a measurement into the table's file, over an older one of the same problem."""
    table = json.loads(TABLE.read_text())
    entry = {"use": CUBLAS if use is None else asdict(use), "ms": ms, "with": versions}
    table.setdefault(device, {})[str(problem)] = entry
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    _read.cache_clear()
