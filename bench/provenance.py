"""Where a number comes from: the device and its ceilings, the software, the commit, the clocks."""

import dataclasses
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from msgspec.structs import replace

from bench.results import Ceiling, Clocks, Commit, Device, Peak, Results, Software
from train.hardware import device_name, lookup, measure_bandwidth, measure_flops, peak_flops


def started(where: torch.device, dtype: torch.dtype, command: str) -> Results:
    """Results without measurements. Only the peak is measured, if no data sheet gives it."""
    return Results(
        device=_device(where),
        software=_software(),
        commit=_commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command,
        peak=Peak(**dataclasses.asdict(peak_flops(where, dtype))),
        clocks_before=clocks(where),
    )


def with_ceilings(results: Results, where: torch.device, dtype: torch.dtype, seconds: float) -> Results:
    """The results with the device's ceilings, measured in about `seconds`."""
    each = max(0.1, min(0.5, seconds / 6))
    matmuls = [measure_flops(where, dtype, each) for _ in range(3)]
    copies = [measure_bandwidth(where, each) for _ in range(3)]
    name = str(dtype).removeprefix("torch.")
    peak = results.peak
    if lookup(results.device.name) is None:  # no data sheet: its peak is the best matmul measured
        peak = replace(peak, flops=max(peak.flops, *matmuls))
    return replace(results, peak=peak, ceilings=[Ceiling("matmul", name, matmuls), Ceiling("copy", "float32", copies)])


def clocks(where: torch.device) -> Clocks | None:
    """A CUDA device's clocks and power now; None for other devices."""
    if where.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "clocks_event_reasons.active")
    *numbers, throttle = (_nvidia_smi(field, where) for field in fields)
    return Clocks(*(_number(text) for text in numbers), throttle)


def command(module: str, hidden: tuple[str, ...] = ()) -> str:
    """This process's command line, without the settings in `hidden`, which name the user's folders."""
    shown = [a for a in sys.argv[1:] if a.partition("=")[0].lstrip("-") not in hidden]
    return " ".join([f"python -m {module}", *shown])


def _device(where: torch.device) -> Device:
    if where.type != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(device_name(where), where.type, memory=memory, threads=torch.get_num_threads())
    properties = torch.cuda.get_device_properties(where)
    return Device(
        device_name(where),
        "cuda",
        memory=properties.total_memory,
        capability=[properties.major, properties.minor],
        multiprocessors=properties.multi_processor_count,
        l2=properties.L2_cache_size,
        driver=_nvidia_smi("driver_version", where),
    )


def _software() -> Software:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    versions = platform.python_version(), str(torch.__version__), triton, torch.version.cuda  # torch's is no plain str
    return Software(*versions, cudnn and str(cudnn))


def _commit() -> Commit:
    """The commit of this file's checkout, and whether the tree has no changes."""
    root = str(Path(__file__).parents[1])
    try:
        name = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
        return Commit(name, clean=not _output("git", "-C", root, "status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return Commit("unknown", clean=False)


def _nvidia_smi(field: str, where: torch.device) -> str | None:
    """A field of the device, from nvidia-smi; None if there is no nvidia-smi, or it does not know the field."""
    # CUDA_VISIBLE_DEVICES changes torch's numbers of devices, but not their UUIDs
    uuid = f"GPU-{torch.cuda.get_device_properties(where).uuid}"
    try:
        answer = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", uuid)
    except (OSError, subprocess.SubprocessError):
        return None
    return None if not answer or "not" in answer.lower() else answer


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
