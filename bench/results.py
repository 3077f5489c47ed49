"""The contents of a results file. One file is one run on one device. `bench` writes it, and all other programs read it.

Every time is in seconds. Every sample is kept; readers compute the medians. A part that was not measured is absent,
with its reason if that is known. No value is made up. msgspec reads and writes the classes below.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from model.config import GPTConfig
from train.errors import one_line
from train.files import read_regular, replacing

FORMAT, VERSION = "nanofuse-bench", 1
MAX_BYTES = 1 << 28  # of a results file
WRONG = "wrong: "  # a row's `skipped` begins with this if its check failed

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1, le=1 << 40)]
Layers = Annotated[int, Meta(ge=1, le=1 << 16)]  # work is summed over them
Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the file. A field that is unknown, missing or of another type is an error."""


class Device(Strict):
    name: str  # "NVIDIA H100 80GB HBM3", "AMD EPYC ..."
    type: str  # "cuda", "cpu"
    memory: Natural | None = None  # bytes
    capability: list[int] | None = None  # [9, 0]; this and the next three: CUDA only
    multiprocessors: int | None = None
    l2: int | None = None  # bytes
    driver: str | None = None
    threads: int | None = None  # of torch, on a CPU


class Software(Strict):
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    cudnn: str | None


class Commit(Strict):
    id: str  # "unknown" outside a checkout
    clean: bool  # whether the tree had no changes


class Clocks(Strict):
    """State of a CUDA device at one moment, from nvidia-smi; None for values that it does not give."""

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature: float | None = None  # degrees Celsius
    throttle: str | None = None  # what slows the clocks, in nvidia-smi's words


class Ceiling(Strict):
    """The device's best rates, measured."""

    what: Literal["matmul", "copy"]  # a large one
    dtype: str
    rates: Annotated[list[Positive], Meta(min_length=1)]  # FLOP/s, or bytes/s read and written together

    @property
    def rate(self) -> float:
        return max(self.rates)


class Peak(Strict):
    flops: Positive  # FLOP/s, dense, in the dtype of the matmuls
    source: str  # data sheet, or measured


class Kernel(Strict):
    """One case, shape and dtype, one direction, one variant: its samples, or why there are none."""

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
    def group(self) -> tuple:
        """The same for all variants of one comparison."""
        return self.case, tuple(self.shape), self.dtype, self.direction


class Shape(Strict):
    """The shape of a training step."""

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
        """The model's. ValueError if no such model can be built."""
        sizes = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        return GPTConfig(**sizes, bias=bool(self.bias))

    def __post_init__(self) -> None:
        _ = self.config  # ValueError for a shape that cannot be built


class Step(Strict):
    """A whole training step: one workload, one variant."""

    workload: str  # "gpt2", "shakespeare_char", "cpu", ...
    variant: str  # as bench/variants.py names them
    compares: bool  # False: a rung, a step between the reference's and ours
    dtype: str
    tokens: Count  # of an iteration, on this device
    flops: dict[Literal["nanogpt", "6n"], Positive]  # of an iteration, by formula
    shape: Shape
    seconds: list[Positive] = []
    turn: Count = 1  # samples of one turn, before the next variant's turn
    # the round of the first sample, counted over the workload's groups; variants that do not fit into memory together
    # are measured in groups, one after the other, each with the reference
    first_round: Natural = 0
    host_seconds: list[Annotated[float, Meta(ge=0)]] = []  # until the call returned; the device may still be working
    peak_memory: Natural | None = None  # bytes on the device; CUDA only
    losses: list[float | None] = []  # of the first steps, for the check; None: not a finite number
    skipped: str = ""

    def __post_init__(self) -> None:
        if len(self.seconds) % self.turn:
            raise ValueError(f"turn: got {self.turn}, expected a divisor of the {len(self.seconds)} samples")

    @property
    def is_reference(self) -> bool:
        """Whether it runs none of our code."""
        return self.variant.startswith(("reference ", "nanoGPT "))

    def beside(self, row: "Step") -> list[float]:
        """Its samples of the rounds in which `row` took part. `row` is compared with these."""
        first = (row.first_round - self.first_round) * self.turn
        return self.seconds[first:][: len(row.seconds) // row.turn * self.turn] if first >= 0 else []


class Tests(Strict):
    command: str
    passed: Natural
    failed: Natural
    skipped: Natural
    seconds: Annotated[float, Meta(ge=0)]
    failures: list[str] = []  # names of tests


class Failure(Strict):
    part: str  # "tests", "ceilings", "kernels", "steps"
    error: str  # one line


class Results(Strict):
    device: Device
    software: Software
    commit: Commit
    date: str  # ISO 8601, UTC, at the start
    command: str
    peak: Peak
    clocks_before: Clocks | None = None
    clocks_after: Clocks | None = None
    tests: Tests | None = None
    ceilings: list[Ceiling] = []
    kernels: list[Kernel] = []
    steps: list[Step] = []
    failures: list[Failure] = []
    complete: bool = False  # False: stopped, by hand or by its time, or a requested part failed
    format: Literal[FORMAT] = FORMAT
    version: Literal[VERSION] = VERSION

    def ceiling(self, what: str) -> float | None:
        """The rate of the best ceiling of that kind, None if it was not measured."""
        return max((ceiling.rate for ceiling in self.ceilings if ceiling.what == what), default=None)


class Header(msgspec.Struct):
    """The fields that every version of the file has."""

    format: str = ""
    version: int = 0


def quantile(samples: Iterable[float], share: float) -> float:
    """The sample at position `share` of the sorted samples, from 0 (the least) to 1 (the largest)."""
    ordered = sorted(samples)
    return ordered[round(share * (len(ordered) - 1))]


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
        raw = read_regular(path, MAX_BYTES)
        header = msgspec.json.decode(raw, type=Header)
        if (header.format, header.version) != (FORMAT, VERSION):
            raise ValueError(f"got format {header.format[:80]!r}, version {header.version}")
        return msgspec.convert(_printable(msgspec.to_builtins(msgspec.json.decode(raw, type=Results))), Results)
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
