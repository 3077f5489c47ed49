"""What devices could do at best: the roofline of a step, `model/work.py`'s parts against FLOP/s and bytes/s. Estimates.

Two rooflines. The floor takes a device's data sheet, or the ceilings that a run measured, at their word: no step is
faster, unless a cache hands on what one part leaves for the next. The attainable time takes what good kernels
reach of a data sheet: ATTAINED. Those shares were reached on an H100; that other devices reach them too is assumed.
"""

from dataclasses import dataclass
from math import inf

from bench.devices import DEVICES, short_name
from bench.schema import Results, Step
from bench.workloads import WORKLOADS, Workload
from model.config import GPTConfig
from model.flops import FORMULAS, flops_per_token
from model.work import Work, floor, step_work
from train.hardware import Device, lookup
from train.metrics import mfu

ESTIMATED = ("gpt2", "shakespeare_char")  # of `bench/workloads.py`
BFLOAT16 = {"compute": 2, "stream": 2, "gradients": 2}  # bytes of an element: the least that a step moves


@dataclass(frozen=True)
class Shares:
    """Of a data sheet's figures."""

    matmul: float = 1.0
    attention: float = 1.0  # its products are small, and half of each diagonal tile is thrown away
    bandwidth: float = 1.0


SHEET = Shares()
ATTAINED = Shares(matmul=0.81, attention=0.34, bandwidth=0.9)


@dataclass(frozen=True)
class Estimate:
    device: str
    workload: str
    tokens: int  # an iteration
    peak: float  # FLOP/s, dense, bfloat16
    bandwidth: float  # bytes/s
    source: str
    floor: float  # seconds
    attainable: float  # seconds
    floor_mfu: dict[str, float]  # by formula
    attainable_mfu: dict[str, float]


def estimates(measured: set[tuple[str, str]]) -> list[Estimate]:
    """For every device and workload that nobody measured; `measured`: (torch's name of the device, workload)."""
    found = {(row, workload) for name, workload in measured if (row := lookup(name))}
    rows = {short_name(name): lookup(name) for name in DEVICES.values()}
    return [
        _estimate(label, row, WORKLOADS[name])
        for name in ESTIMATED
        for label, row in rows.items()
        if (row, name) not in found
    ]


def _estimate(label: str, row: Device, workload: Workload) -> Estimate:
    sizes = {"accumulation": workload.accumulation, **BFLOAT16}
    parts = step_work(workload.config, workload.batch_size, **sizes, fused_gelu=True)
    peak, bandwidth = row.bf16 * 1e12, row.bandwidth * 1e9
    least, attainable = (roofline(parts, peak, bandwidth, shares) for shares in (SHEET, ATTAINED))
    flops = {formula: flops_per_token(workload.config, formula) * workload.tokens for formula in FORMULAS}
    shares = [{formula: mfu(flops[formula], t, peak) for formula in FORMULAS} for t in (least, attainable)]
    return Estimate(label, workload.name, workload.tokens, peak, bandwidth, row.source, least, attainable, *shares)


def roofline(parts: dict[str, Work], peak: float, bandwidth: float, shares: Shares = SHEET) -> float:
    """Seconds that the parts take one after the other, each at the slower of its FLOPs and its bytes."""
    return sum(
        floor(
            work,
            peak * (shares.attention if name in ("attention forward", "attention backward") else shares.matmul),
            bandwidth * shares.bandwidth,
        )
        for name, work in parts.items()
    )


def step_floor(step: Step, results: Results) -> float | None:
    """Seconds that a measured step takes at least, at the ceilings of its own run; None where the file cannot tell.

    On a CPU only the FLOPs count: its caches hold what the parts of a small step hand to each other.
    """
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    flops, bandwidth = results.ceiling("matmul"), results.ceiling("copy")
    if results.device.type != "cuda":
        bandwidth = inf
    if not flops or not bandwidth or any(name not in step.shape for name in (*names, "batch_size")):
        return None
    try:
        config = GPTConfig(**{name: step.shape[name] for name in names}, bias=bool(step.shape.get("bias", 0)))
    except ValueError:  # no such model can be built
        return None
    size = 4 if step.dtype == "float32" else 2
    sizes = dict.fromkeys(BFLOAT16, size)
    accumulation = step.shape.get("accumulation", 1)
    parts = step_work(config, step.shape["batch_size"], accumulation=accumulation, **sizes, fused_gelu=True)
    seconds = roofline(parts, flops, bandwidth)
    return seconds if seconds > 0 else None
