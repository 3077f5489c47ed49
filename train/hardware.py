"""Which device and dtype to run on, and how fast that device could be at best.

A peak is the vendor's dense figure (no structured sparsity) for matmuls that accumulate in float32, as
torch's do. GeForce cards do those at half the rate of float16 sums, so their larger advertised figures do
not apply. A card that boosts over its rated clock can beat its data sheet by a few per cent.
"""

import ctypes
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from train.errors import RunError, UserError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Peak:
    flops: float  # FLOP/s of one device
    source: str  # the data sheet, or what was measured


@dataclass(frozen=True)
class Link:
    """What joins the devices of one node."""

    name: str
    bandwidth: float  # GB/s of one device, in one direction; data sheets add both up
    hop: float  # microseconds from one device to the next, as NCCL's own model has it, src/graph/tuning.cc
    source: str


NVLINK3 = Link("NVLink 3", 300, 3.4, "NVIDIA A100 data sheet: 600 GB/s, both ways")
NVLINK4 = Link("NVLink 4", 450, 3.4, "NVIDIA H100, H200 data sheets, SXM: 900 GB/s, both ways")
NVLINK5 = Link("NVLink 5", 900, 3.4, "NVIDIA Blackwell data sheet: 1800 GB/s, both ways")
PCIE4 = Link("PCIe 4 x16", 32, 5.7, "PCI Express 4.0: 64 GB/s, both ways")
PCIE5 = Link("PCIe 5 x16", 64, 5.7, "PCI Express 5.0: 128 GB/s, both ways")


@dataclass(frozen=True)
class DataSheet:
    """Of a GPU: dense TFLOP/s by precision, GB/s of memory, and the link to others of its kind."""

    name: str  # torch.cuda.get_device_name() without "NVIDIA"
    tf32: float  # of float32 matmuls: a run lets them use TF32
    bf16: float  # float16 is as fast
    bandwidth: float
    link: Link
    source: str

    def peak(self, dtype: torch.dtype) -> Peak:
        column = {torch.float32: "tf32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        return Peak((self.tf32 if column == "tf32" else self.bf16) * 1e12, f"{self.source}, dense {column}")


# A MIG slice, a laptop chip or any other card has another name and is measured instead.
DATA_SHEETS = (
    # name, tf32, bf16, GB/s, link, source
    DataSheet("A100-SXM4-40GB", 156, 312, 1555, NVLINK3, "NVIDIA A100 data sheet"),
    DataSheet("A100-SXM4-80GB", 156, 312, 2039, NVLINK3, "NVIDIA A100 data sheet"),
    DataSheet("A100-PCIE-40GB", 156, 312, 1555, PCIE4, "NVIDIA A100 data sheet"),
    DataSheet("A100 80GB PCIe", 156, 312, 1935, PCIE4, "NVIDIA A100 data sheet"),
    DataSheet("A10", 62.5, 125, 600, PCIE4, "NVIDIA A10 data sheet"),
    DataSheet("A10G", 35, 70, 600, PCIE4, "NVIDIA A10G data sheet"),
    DataSheet("RTX A6000", 77.4, 154.8, 768, PCIE4, "NVIDIA Ampere GA102 white paper"),
    DataSheet("L4", 60, 121, 300, PCIE4, "NVIDIA L4 data sheet"),
    DataSheet("L40S", 183, 362, 864, PCIE4, "NVIDIA L40S data sheet"),
    DataSheet("H100 80GB HBM3", 495, 989, 3350, NVLINK4, "NVIDIA H100 data sheet, SXM"),
    DataSheet("H100 PCIe", 378, 756, 2000, PCIE5, "NVIDIA H100 data sheet, PCIe"),
    DataSheet("H200", 495, 989, 4800, NVLINK4, "NVIDIA H200 data sheet, SXM"),
    DataSheet("B200", 1100, 2250, 7700, NVLINK5, "NVIDIA Blackwell data sheet, HGX B200"),
    # GeForce: TF32 at the rate of the shaders' FP32, 16 bits at twice that
    DataSheet("GeForce RTX 3090", 35.6, 71.2, 936, PCIE4, "NVIDIA Ampere GA102 white paper, GeForce figures"),
    DataSheet("GeForce RTX 4090", 82.6, 165.2, 1008, PCIE4, "NVIDIA Ada white paper, GeForce figures"),
    DataSheet("GeForce RTX 5090", 104.8, 209.6, 1792, PCIE5, "NVIDIA RTX Blackwell white paper, GeForce figures"),
)


class Card(NamedTuple):
    """A GPU that a run can be rehearsed and predicted for: what torch would say of it."""

    name: str  # torch.cuda.get_device_name(), by which `data_sheet` finds its data sheet
    capability: int  # 90 is sm_90
    multiprocessors: int
    memory: int  # bytes that are free before a run


CARDS = {  # by the names that settings have for them; memory: torch's total_memory, less 0.5 GB for the CUDA context
    "a100": Card("NVIDIA A100-SXM4-80GB", 80, 108, int(84.5e9)),
    "h100": Card("NVIDIA H100 80GB HBM3", 90, 132, int(84.5e9)),
    "h200": Card("NVIDIA H200", 90, 132, int(149.6e9)),
    "b200": Card("NVIDIA B200", 100, 148, int(190.9e9)),
    "l4": Card("NVIDIA L4", 89, 58, int(23.1e9)),
    "4090": Card("NVIDIA GeForce RTX 4090", 89, 128, int(24.8e9)),
    "l40s": Card("NVIDIA L40S", 89, 142, int(47.1e9)),
    "a10": Card("NVIDIA A10", 86, 72, int(23.1e9)),
}


def card(name: str) -> Card:
    """The card of that name in CARDS; `auto`: the GPU at hand, an H100 where there is none."""
    if name == "auto" and torch.cuda.is_available():
        return card_at(torch.device("cuda:0"))
    return CARDS[name if name != "auto" else "h100"]


def card_at(device: torch.device) -> Card:
    p = torch.cuda.get_device_properties(device)
    return Card(p.name, 10 * p.major + p.minor, p.multi_processor_count, torch.cuda.mem_get_info(device)[0])


def data_sheet(name: str) -> DataSheet | None:
    """The data sheet of the GPU with this torch.cuda.get_device_name(); None if it is not known here."""
    return next((sheet for sheet in DATA_SHEETS if sheet.name == name.strip().removeprefix("NVIDIA ")), None)


def device_name(device: torch.device) -> str:
    """What the device is called, for the console and the logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return f"{device.type} ({platform.processor() or platform.machine()})"


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """The dense matmul peak of one device in `dtype`: its data sheet's, or measured if the table lacks it."""
    name = device_name(device)
    if device.type == "cuda" and (sheet := data_sheet(name)):
        return sheet.peak(dtype)
    where = f"this CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else name
    precision = str(dtype).removeprefix("torch.")
    return Peak(measure_flops(device, dtype), f"measured {precision} matmul peak of {where}")


def measure_flops(device: torch.device, dtype: torch.dtype, budget: float = 0.5) -> float:
    """The best FLOP/s of square matmuls of three sizes, in about `budget` seconds, in which nothing else should run."""
    sizes = (256, 512, 1024) if device.type == "cpu" else (1024, 2048, 4096)
    best = 0.0
    for size in sizes:
        if best and 2 * size**3 / best > budget:
            break  # a slow device, that a larger matmul would hold for longer
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / _least_seconds(lambda a=a, b=b: a @ b, device, budget / len(sizes)))
    return best


def measure_bandwidth(device: torch.device, budget: float = 0.5, size: int = 2**28) -> float:
    """The best rate of copying `size` bytes from memory to memory, in about `budget` seconds; bytes/s, both ways.

    An H100 caches 50 MB, a B200 126 MB, a CPU seldom more than `size`.
    """
    source = torch.ones(size // 4, device=device)  # written: pages that nobody wrote to may all be one
    target = torch.empty_like(source)
    return 2 * size / _least_seconds(lambda: target.copy_(source), device, budget)


def _least_seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """The shortest time of a call, of those made in about `budget` seconds."""
    # On a CPU a longer timing only catches more of what else runs there. A GPU needs its queue filled.
    repeats = 1 if device.type == "cpu" else 8
    call()  # chooses and loads the kernel
    best, deadline = float("inf"), time.perf_counter() + budget
    while True:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        now = time.perf_counter()
        best = min(best, (now - start) / repeats)
        if now > deadline:
            return best


def use_device(device: torch.device) -> torch.device:
    """Make `device` the current one, and return it. On CUDA, let float32 matmuls run in TF32, as nanoGPT does.

    UserError for a GPU that cannot be used: this torch has no kernels for it, it has no memory left, another process
    has it for itself.

    Streams, graph captures and events belong to the current device, wherever their tensors lie: without this,
    `--device=cuda:1` captures an empty graph on device 0. TF32 is not set by
    `torch.backends.cuda.matmul.fp32_precision`: after it `torch.get_float32_matmul_precision()` raises, which Inductor
    asks under max-autotune. Both understand this setting.

    On a CPU, have glibc keep the memory that tensors free, for the next ones. Otherwise it asks the system for large
    ones at every step. Each page of them costs an interruption and is filled with zeros: a third of the time of
    `shakespeare_char`'s step on two cores.
    """
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.ones(1, device=device)  # launches a kernel
        except RuntimeError as error:
            raise UserError(f"device: {device} cannot be used: {first_line(error)}; --device=cpu runs") from None
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never
    return device


@contextmanager
def memory_suffices(less: str) -> Iterator[None]:
    """Inside, a device without memory left is a RunError, whose message ends with `less`. Of a run's step there is an
    estimate. It knows nothing of gaps between an allocator's blocks, of what other processes take later, of mps."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or str(error).startswith("MPS backend out of memory")):
            raise
        raise RunError(f"memory: {first_line(error)}; {less}") from error


def unused_gpu() -> str:
    """Why this machine's NVIDIA GPU cannot be used, if torch was built without CUDA. Else empty."""
    if torch.version.cuda or torch.version.hip or shutil.which("nvidia-smi") is None:
        return ""
    return f"; torch {torch.__version__}, which was built without CUDA, cannot use this machine's NVIDIA GPU"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def resolve_device(name: str) -> torch.device:
    """The device that auto (the best there is), cpu, cuda (the first), cuda:N or mps names. UserError for any other."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    devices += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    wanted = {"auto": devices[0], "cuda": "cuda:0"}.get(name, name)
    if wanted not in devices:
        raise UserError(f"device: got {name!r}, expected one of: auto, {', '.join(devices)}{unused_gpu()}")
    return torch.device(wanted)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype that auto, float32, bfloat16 or float16 means on `device`. auto is the first of those that it
    offers. UserError for others.

    bfloat16 runs on every CPU, slowly where the instructions are missing: good enough to try things out. float16 is
    refused on a CPU: no faster there, and it costs loss scaling. Both are refused on mps: torch's causal attention lets
    16-bit queries see later keys (pytorch #195910), and its AdamW makes updates that overflowed (pytorch #186360).
    """
    offered = ["float32"]  # mps
    if device.type == "cuda":
        # not torch.cuda.is_bf16_supported(): it counts emulation
        new = torch.cuda.get_device_capability(device) >= (8, 0)
        offered = ["bfloat16", "float16", "float32"] if new else ["float16", "float32"]
    elif device.type == "cpu":
        # Private names, but stable since torch 2.6. Every CPU with AMX tiles multiplies bfloat16 with them.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        offered = ["bfloat16", "float32"] if fast else ["float32", "bfloat16"]
    if name not in ("auto", *offered):
        raise UserError(f"dtype: got {name!r}, expected one of: auto, {', '.join(offered)} (on {device})")
    return DTYPES[offered[0] if name == "auto" else name]


def resolve_stream(name: str, dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The residual stream's dtype that auto, float32 or bfloat16 means for a compute dtype.

    bfloat16 halves most of a LayerNorm's bytes. Its validation losses after 800 iterations on Shakespeare's characters
    differ by 0.002 or less from float32's, for three seeds of a model of 6 layers and of one of 24. The seeds' own
    spread is 0.037 and 0.046 (`bench/results/residual-stream-2026-11-25.jsonl`, bfloat16 on a CPU).
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device_type == "cuda" and dtype == torch.bfloat16 else torch.float32
