"""What a results file holds. One file is one run on one device; it is written by `bench` and read by everything else.

Every time is in seconds, every sample is kept: medians are for the reader to take. A part that was not measured is
absent, with its reason where one is known; nothing is ever filled in.
"""

import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from train.files import replacing

FORMAT, VERSION = "nanofuse-bench", 1
WRONG = "wrong: "  # how a row's `skipped` begins where its check failed


@dataclass(frozen=True)
class Device:
    name: str  # "NVIDIA H100 80GB HBM3", "AMD EPYC ..."
    type: str  # "cuda", "cpu"
    memory: int | None = None  # bytes
    capability: list[int] | None = None  # [9, 0]; CUDA only, as is what follows
    multiprocessors: int | None = None
    l2: int | None = None  # bytes
    driver: str | None = None
    threads: int | None = None  # of torch, on a CPU


@dataclass(frozen=True)
class Software:
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    cudnn: str | None


@dataclass(frozen=True)
class Commit:
    id: str  # "unknown" outside a checkout
    clean: bool  # whether the tree was as committed


@dataclass(frozen=True)
class Clocks:
    """A moment's state of a CUDA device, as nvidia-smi tells it; None where it does not."""

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature: float | None = None  # degrees Celsius
    throttle: str | None = None  # what slows the clocks, as it calls it


@dataclass(frozen=True)
class Ceiling:
    """The best that this device did in this run at one simple thing, a large matmul or a large copy."""

    what: str  # "matmul" or "copy"
    dtype: str
    rates: list[float]  # FLOP/s, or bytes/s read and written: each the best of a fraction of a second

    @property
    def rate(self) -> float:
        return max(self.rates)


@dataclass(frozen=True)
class Peak:
    flops: float  # FLOP/s, dense, in the dtype of the matmuls
    source: str  # data sheet, or measured


@dataclass(frozen=True)
class Kernel:
    """One case, shape and dtype, one direction, one variant: its samples, or why there are none."""

    case: str
    shape: list[int]
    dtype: str
    direction: str  # "forward", "backward", "both"
    variant: str  # "fused", "reference", "compiled", "liger", "flash_attn"
    seconds: list[float] = field(default_factory=list)
    bytes: int | None = None  # that the operation must move, at least
    flops: int | None = None
    skipped: str = ""  # why there are no samples


@dataclass(frozen=True)
class Step:
    """A whole training step: one workload, one variant."""

    workload: str  # "gpt2", "shakespeare_char", "cpu", ...
    variant: str  # as bench/variants.py names them
    compares: bool  # False: only a rung of the ladder from the reference's step to ours, of either's code
    dtype: str
    tokens: int  # an iteration, on this device
    flops: dict[str, float] = field(default_factory=dict)  # an iteration, by formula: "nanogpt", "6n"
    seconds: list[float] = field(default_factory=list)
    turn: int = 1  # samples that were taken at a time, before the workload's next variant had its turn
    # of the workload's rounds of turns, the one that the first sample is of: variants that do not fit into memory
    # together have their rounds one group after the other, the reference with each
    first_round: int = 0
    host_seconds: list[float] = field(default_factory=list)  # until the call returned, the device perhaps still at work
    peak_memory: int | None = None  # bytes on the device; CUDA only
    losses: list[float] = field(default_factory=list)  # of the first steps, by which it was checked
    # n_layer, n_head, n_embd, block_size, vocab_size, bias (0 or 1), batch_size, accumulation
    shape: dict[str, int] = field(default_factory=dict)
    skipped: str = ""


@dataclass(frozen=True)
class Tests:
    command: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: list[str] = field(default_factory=list)  # names of tests


@dataclass(frozen=True)
class Failure:
    part: str  # "tests", "ceilings", "kernels", "steps"
    error: str  # one line


@dataclass(frozen=True)
class Results:
    device: Device
    software: Software
    commit: Commit
    date: str  # ISO 8601, UTC, at the start
    command: str
    peak: Peak | None = None
    clocks_before: Clocks | None = None
    clocks_after: Clocks | None = None
    tests: Tests | None = None
    ceilings: list[Ceiling] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    complete: bool = False  # False: stopped, by hand or by its time, or a part of those asked for failed
    format: str = FORMAT
    version: int = VERSION

    def ceiling(self, what: str) -> float | None:
        """The rate of the best ceiling of that kind, None where it was not measured."""
        return max((ceiling.rate for ceiling in self.ceilings if ceiling.what == what), default=None)


def beside(reference: Step, row: Step) -> list[float]:
    """The reference's samples of the rounds that the row took part in: what the row is compared with."""
    first = (row.first_round - reference.first_round) * reference.turn
    return reference.seconds[first:][: len(row.seconds) // row.turn * reference.turn] if first >= 0 else []


def median(samples: list[float]) -> float:
    ordered, n = sorted(samples), len(samples)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def write(path: Path, results: Results) -> None:
    """The file appears whole or not at all. AssertionError for results that `read` would refuse."""
    text = json.dumps(asdict(results), indent=1, allow_nan=False)
    assert decode(Results, json.loads(text), "") == results
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def read(path: Path) -> Results:
    """Results of a file. ValueError, one line without the file's name, for what is none; OSError for none at all."""
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"is not a results file: it has no format {FORMAT!r}")
    if raw.get("version") != VERSION:
        raise ValueError(f"has version {raw.get('version')!r}, expected {VERSION}")
    return decode(Results, raw, "")


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, out of JSON, as the annotated type `kind`. ValueError naming the field, what came, what was expected."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        present = next(a for a in arguments if a is not type(None))
        return None if value is None else decode(present, value, where)
    if is_dataclass(kind):
        return _record(kind, value, where)
    if origin is list and isinstance(value, list):
        return [decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    wanted = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise ValueError(f"{where}: got {value!r:.60}, expected {wanted}")


def _record(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'file'}: got {value!r:.60}, expected an object")
    hints = typing.get_type_hints(kind)
    unknown = value.keys() - hints.keys()
    if unknown:
        raise ValueError(f"{where or 'file'}: got the unknown field {min(unknown)!r}")
    missing = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING} - value.keys()
    if missing:
        raise ValueError(f"{where or 'file'}: the field {min(missing)!r} is missing")
    return kind(**{name: decode(hints[name], item, f"{where}.{name}".lstrip(".")) for name, item in value.items()})
