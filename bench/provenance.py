"""Where a number comes from: the device, the software, the commit, the clocks."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.schema import Clocks, Commit, Device, Software
from train.hardware import device_name


def device(where: torch.device) -> Device:
    if where.type != "cuda":
        return Device(device_name(where), where.type, memory=_host_memory(), threads=torch.get_num_threads())
    properties = torch.cuda.get_device_properties(where)
    return Device(
        device_name(where),
        "cuda",
        memory=properties.total_memory,
        capability=[properties.major, properties.minor],
        multiprocessors=properties.multi_processor_count,
        l2=properties.L2_cache_size,
        driver=_smi("driver_version", where),
    )


def software() -> Software:
    try:
        import triton
    except ImportError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return Software(
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton and triton.__version__,
        cuda=torch.version.cuda,
        cudnn=cudnn and str(cudnn),
    )


def commit() -> Commit:
    """The commit of this file's checkout, and whether the tree is as committed."""
    root = Path(__file__).parents[1]
    try:
        name = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
        return Commit(name, clean=not _output("git", "-C", str(root), "status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return Commit("unknown", clean=False)


def clocks(where: torch.device) -> Clocks | None:
    """A CUDA device's clocks and power now; None for other devices."""
    if where.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    numbers = [_number(_smi(field, where)) for field in fields]
    return Clocks(*numbers, throttle=_smi("clocks_event_reasons.active", where))


def now() -> str:
    """The date and time, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def command(module: str, hidden: tuple[str, ...] = ()) -> str:
    """This process's command line; folders of the user's, named by the settings `hidden`, are left out."""
    shown = [a for a in sys.argv[1:] if a.partition("=")[0].lstrip("-") not in hidden]
    return " ".join([f"python -m {module}", *shown])


def _smi(field: str, where: torch.device) -> str | None:
    """What nvidia-smi says of the device; None where it is not there, or does not know the field."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", _bus(where)]
    try:
        answer = _output(*query)
    except (OSError, subprocess.SubprocessError):
        return None
    return None if not answer or "not" in answer.lower() else answer


def _bus(where: torch.device) -> str:
    """The device as nvidia-smi knows it: CUDA_VISIBLE_DEVICES renumbers what torch sees."""
    return f"GPU-{torch.cuda.get_device_properties(where).uuid}"


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _host_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    total = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:"))
    return int(total.split()[1]) * 1024


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
