"""The contents of a results file. One file is one run on one device. `bench` writes it, and all other programs read it.

Every time is in seconds. Every sample is kept; readers compute the medians. A part that was not measured is absent,
with its reason if that is known. No value is made up. msgspec reads and writes the classes below.
"""

import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
import torch
from msgspec import Meta, Struct
from msgspec.structs import replace

from model.config import GPTConfig
from train.errors import one_line
from train.files import read_regular, replacing
from train.hardware import Peak, data_sheet, device_name, measure_bandwidth, measure_flops, peak_flops

FORMAT, VERSION = "nanofuse-bench", 1
MAX_BYTES = 1 << 28  # of a results file
WRONG = "wrong: "  # a row's `skipped` begins with this if its check failed

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")  # of a model

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1, le=1 << 40)]
Layers = Annotated[int, Meta(ge=1, le=1 << 16)]  # work is summed over them
Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Machine(Struct, frozen=True):
    name: str  # "NVIDIA H100 80GB HBM3", "AMD EPYC ..."
    type: str  # "cuda", "cpu"
    driver: str | None = None  # CUDA only
    threads: int | None = None  # of torch, on a CPU


class Software(Struct, frozen=True):
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    cudnn: str | None


class Commit(Struct, frozen=True):
    id: str  # "unknown" outside a checkout
    clean: bool  # whether the tree had no changes


class Ceiling(Struct, frozen=True):
    """The device's best rates, measured."""

    what: Literal["matmul", "copy"]  # a large one
    dtype: str
    rates: Annotated[list[Positive], Meta(min_length=1)]  # FLOP/s, or bytes/s read and written together


class Measured(Struct, frozen=True):
    """What rows of kernels and of steps have in common: their samples, or why there are none."""

    turn: ClassVar[int] = 1  # samples of one turn, before the next variant's turn
    first_round: ClassVar[int] = 0  # the round of the first sample

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    @property
    def missing(self) -> str:
        """Why there are no samples."""
        return f"not measured: {self.skipped or 'no reason given'}"

    def beside(self, row: Self) -> list[float]:
        """Its samples of the rounds in which `row` took part."""
        first = (row.first_round - self.first_round) * self.turn
        return self.seconds[first:][: len(row.seconds) // row.turn * self.turn] if first >= 0 else []


class Kernel(Measured, frozen=True):
    """One case, shape and dtype, one direction, one variant."""

    case: str
    shape: list[Count]
    dtype: str
    direction: str  # "forward", "backward", "both"
    variant: str  # "fused", "reference", "compiled", "liger", "flash_attn"
    seconds: list[Positive] = []
    bytes: Natural | None = None  # least bytes that the operation must move
    flops: Natural | None = None
    skipped: str = ""  # why there are no samples

    @property
    def ours(self) -> bool:
        return self.variant == "fused"

    @property
    def sizes(self) -> str:
        """The shape, in words."""
        return "×".join(map(str, self.shape))

    @property
    def group(self) -> str:
        """The same for all variants that took turns."""
        return f"{self.case} {self.sizes} {self.dtype} {self.direction}"

    @property
    def name(self) -> str:
        return f"{self.group} {self.variant}"


class Shape(Struct, frozen=True):
    """The shape of a training step. ValueError for one that cannot be built."""

    n_layer: Layers
    n_head: Count
    n_embd: Count
    block_size: Count
    vocab_size: Count
    bias: int  # 0 or 1
    batch_size: Count
    accumulation: Count

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**{name: getattr(self, name) for name in SIZES}, bias=bool(self.bias))

    def __post_init__(self) -> None:
        _ = self.config


class Step(Measured, frozen=True):
    """A whole training step: one workload, one variant."""

    workload: str  # "gpt2", "shakespeare_char", "cpu", ...
    variant: str  # as bench/variants.py names them
    compares: bool  # False: a rung, a step between the reference's and ours
    dtype: str
    tokens: Count  # of an iteration, on this device
    flops: dict[Literal["nanogpt", "6n"], Positive]  # of an iteration, by formula
    shape: Shape
    seconds: list[Positive] = []
    turn: Count = 1
    # counted over the workload's groups; variants that do not fit into memory together are measured in groups, one
    # after the other, each with the reference
    first_round: Natural = 0
    host_seconds: list[Annotated[float, Meta(ge=0)]] = []  # until the call returned; the device may still be working
    peak_memory: Natural | None = None  # bytes on the device; CUDA only
    losses: list[float | None] = []  # of the first steps, for the check; None: not a finite number
    skipped: str = ""

    def __post_init__(self) -> None:
        if len(self.seconds) % self.turn:
            raise ValueError(f"turn: got {self.turn}, expected a divisor of the {len(self.seconds)} samples")

    @property
    def ours(self) -> bool:
        """Whether it runs our code."""
        return not self.variant.startswith(("reference ", "nanoGPT "))

    @property
    def group(self) -> str:
        return self.workload

    @property
    def name(self) -> str:
        return f"{self.workload} {self.variant} {self.dtype}"


class Tests(Struct, frozen=True):
    passed: Natural  # GPU tests
    failed: Natural
    skipped: Natural
    failures: list[str] = []  # names of tests


class Failure(Struct, frozen=True):
    part: str  # "tests", "ceilings", "kernels", "steps"
    error: str  # one line


class Results(Struct, frozen=True):
    device: Machine
    software: Software
    commit: Commit
    date: str  # ISO 8601, UTC, at the start
    command: str
    peak: Peak  # dense, in the dtype of the matmuls
    clocks_before: dict[str, str] | None = None  # clocks, power and temperature, from nvidia-smi; CUDA only
    clocks_after: dict[str, str] | None = None
    tests: Tests | None = None
    ceilings: list[Ceiling] = []
    kernels: list[Kernel] = []
    steps: list[Step] = []
    failures: list[Failure] = []
    complete: bool = False  # False: stopped, by hand or by its time, or a requested part failed
    format: Literal[FORMAT] = FORMAT
    version: Literal[VERSION] = VERSION

    def __post_init__(self) -> None:
        if not self.peak.flops > 0:
            raise ValueError(f"peak: got {self.peak.flops} FLOP/s, expected more than 0")

    def ceiling(self, what: str, dtype: str = "") -> float | None:
        """The rate of the best ceiling of that kind, None if it was not measured. dtype: of a matmul; empty: of any."""
        found = (each for each in self.ceilings if each.what == what and (what == "copy" or dtype in ("", each.dtype)))
        return max((max(each.rates) for each in found), default=None)


def encoded(results: Results) -> bytes:
    """The contents of the file. ValueError for results that `read` would refuse."""
    text = msgspec.json.encode(results)
    msgspec.json.decode(text, type=Results)
    return msgspec.json.format(text, indent=1)


def write(path: Path, results: Results) -> None:
    """Write the whole file or nothing. ValueError for results that `read` would refuse; OSError."""
    text = encoded(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text)


def read(path: Path) -> Results:
    """The results in a file; control characters in its words are escaped. If they cannot be read: ValueError, one line
    that names the file and the field."""
    try:
        return msgspec.convert(_printable(msgspec.json.decode(read_regular(path, MAX_BYTES))), Results)
    except OSError as error:
        raise ValueError(one_line(f"{path}: cannot be read: {error.strerror}")) from error
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        message = f"{path}: is no results file of {FORMAT}, version {VERSION}: {error}"
        raise ValueError(one_line(message)) from error


def _printable(value: Any) -> Any:
    """The same, with every text on one line that a terminal does not act upon."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, dict):
        return {key: _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list) else value


# Where the numbers come from


class Session:
    """A measurement in progress: its device, the dtype of its matmuls, and its results so far."""

    def __init__(self, device: torch.device, dtype: torch.dtype, command: str) -> None:
        """Nothing is measured yet, except the peak, if no data sheet gives it."""
        self.device, self.dtype = device, dtype
        try:
            from triton import __version__ as triton
        except ImportError:
            triton = None
        cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
        torch_version = str(torch.__version__)  # it is no plain str
        driver = self._nvidia_smi("driver_version").get("driver_version")
        threads = None if device.type == "cuda" else torch.get_num_threads()
        self.results = Results(
            device=Machine(device_name(device), device.type, driver, threads),
            software=Software(
                platform.python_version(), torch_version, triton, torch.version.cuda, cudnn and str(cudnn)
            ),
            commit=_commit(),
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=command,
            peak=peak_flops(device, dtype),
            clocks_before=self.clocks(),
        )

    def add(self, **found: object) -> None:
        self.results = replace(self.results, **found)

    def ceilings(self, seconds: float) -> None:
        """Add the device's ceilings, measured in about `seconds`."""
        each, peak = max(0.1, min(0.5, seconds / 6)), self.results.peak
        matmuls = [measure_flops(self.device, self.dtype, each) for _ in range(3)]
        copies = [measure_bandwidth(self.device, each) for _ in range(3)]
        if data_sheet(self.results.device.name) is None:  # then its peak is the best matmul measured
            peak = Peak(max(peak.flops, *matmuls), peak.source)
        dtype = str(self.dtype).removeprefix("torch.")
        self.add(peak=peak, ceilings=[Ceiling("matmul", dtype, matmuls), Ceiling("copy", "float32", copies)])

    def clocks(self) -> dict[str, str] | None:
        """A CUDA device's clocks, power, temperature and what slows it, now; None for other devices."""
        fields = ["clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"]
        return self._nvidia_smi(*fields, "clocks_event_reasons.active") or None

    def _nvidia_smi(self, *fields: str) -> dict[str, str]:
        """What nvidia-smi says of a CUDA device, with units, without the fields that it does not know."""
        found = {}
        for field in fields if self.device.type == "cuda" else ():
            # CUDA_VISIBLE_DEVICES changes torch's numbers of devices, but not their UUIDs
            uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            with suppress(OSError, subprocess.SubprocessError):
                answer = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", uuid)
                if answer and "not" not in answer.lower():
                    found[field] = answer
        return found


def _commit() -> Commit:
    """The commit of this file's checkout, and whether the tree has no changes."""
    git = ("git", "-C", str(Path(__file__).parents[1]))
    try:
        name = _output(*git, "rev-parse", "--short=12", "HEAD")
        return Commit(name, clean=not _output(*git, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return Commit("unknown", clean=False)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
