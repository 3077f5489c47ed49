"""Results that nobody measured, for tests of what reads results: three devices, every kind of row. Fake variants."""

import random
from collections.abc import Callable
from itertools import count

import torch
from msgspec.structs import replace

from bench.results import Ceiling, Commit, Failure, Kernel, Machine, Results, Software, Tests
from bench.variants import WORKLOADS, Setting, StepFunction, Variant
from train.hardware import Peak

GPU_STEPS = {  # variant: seconds
    "reference eager": 0.089,
    "reference compiled": 0.068,
    "ours eager": 0.076,
    "ours graphed": 0.070,
    "flat state, no casts": 0.059,
    "cross-entropy": 0.0525,
    "ours compiled": 0.053,
    "ours compiled + graphed": 0.052,
}
CPU_STEPS = {
    "nanoGPT eager": 0.037,
    "nanoGPT compiled": 0.035,
    "reference eager": 0.038,
    "reference compiled": 0.036,
    "reference autocast eager": 0.022,
    "reference autocast compiled": 0.021,
    "ours eager": 0.020,
    "ours compiled": 0.018,
}
RUNGS = ("flat state, no casts", "cross-entropy", "reference autocast eager", "reference autocast compiled")
MARKUP = "<b>|`*$x$"  # in a reason; it stays words
SHAPES = {"linear_cross_entropy": [32768, 768, 50304], "mlp": [32768, 768, 3072]}


def samples(rng: random.Random, middle: float, count: int = 40) -> list[float]:
    return [middle * (1 + abs(rng.gauss(0, 0.01))) for _ in range(count)]


def kernels(rng: random.Random, copy: float, matmul: float) -> list[Kernel]:
    rows = []
    for case, shape in SHAPES.items():
        for direction, times in (("forward", 1), ("backward", 2)):
            moved = times * 2 * shape[0] * shape[-1] * 2
            flops = times * 2 * shape[0] * shape[1] * shape[2] if case == "mlp" else None
            for variant, share in (("fused", 0.85), ("reference", 0.3), ("compiled", 0.7), ("liger", 0.5)):
                seconds = samples(rng, max(moved / copy, (flops or 0) / matmul) / share, 20)
                rows.append(Kernel(case, shape, "bfloat16", direction, variant, seconds, moved, flops))
    return rows


def made(device: Machine, workload: str, times: dict[str, float], peak: Peak, copy: float, seed: int) -> Results:
    """A complete run. times: seconds of its steps."""
    rng, steps, matmul = random.Random(seed), [], 0.75 * peak.flops
    for variant, time in times.items():
        row = WORKLOADS[workload].row(variant, compares=variant not in RUNGS, seconds=samples(rng, time))
        if device.type == "cuda":
            row = replace(row, host_seconds=samples(rng, time / 50), peak_memory=int(4e11 * time))
        steps.append(replace(row, losses=[10.9, 10.2]))
    return Results(
        device,
        Software("3.12.1", "2.11.0", "3.6.0", "13.0", "9.1"),
        Commit("0123456789abcdef", clean=True),
        "2026-11-22T10:00:00+00:00",
        "python -m bench --minutes=8",
        peak,
        ceilings=[
            Ceiling("matmul", "bfloat16", [0.98 * matmul, matmul, 0.99 * matmul]),
            Ceiling("copy", "float32", [copy, 0.99 * copy]),
        ],
        kernels=kernels(rng, copy, matmul),
        steps=steps,
        complete=True,
    )


def h100(seed: int = 0, name: str = "NVIDIA H100 80GB HBM3") -> Results:
    peak = Peak(989e12, "data sheet, dense bf16")
    return replace(made(Machine(name, "cuda", "580.95"), "gpt2", GPU_STEPS, peak, 3e12, seed), tests=Tests(120, 0, 2))


def a100_partial() -> Results:
    """Stopped early: no kernels, three steps, one of which failed its check, tests that failed."""
    whole = h100(1, "NVIDIA A100-SXM4-80GB")
    reference, ours, failed = (whole.steps[i] for i in (1, 2, 3))
    why = f"its losses are off by 3.1e-01 {MARKUP}"
    return replace(
        whole,
        commit=Commit("fedcba9876543210", clean=False),
        date="2026-11-20T09:30:00+00:00",
        tests=Tests(118, 2, 2, ["tests/train/test_gpu.py::test_one", "test_two"]),
        kernels=[],
        steps=[reference, ours, replace(failed, seconds=[], host_seconds=[], skipped=why)],
        failures=[Failure("kernels", "CUDA error: an illegal memory access was encountered")],
        complete=False,
    )


def cpu(seed: int = 2) -> Results:
    """Without Triton: of kernels only the fused rows, which are skipped; nothing tells memory."""
    peak = Peak(8.6e11, "measured bfloat16 matmul peak of this CPU, 2 threads")
    found = made(Machine("AMD EPYC 9B14", "cpu", threads=2), "cpu", CPU_STEPS, peak, 2e10, seed)
    fused = [row for row in found.kernels if row.variant == "fused"]
    return replace(
        found,
        software=Software("3.11.2", "2.13.0", None, None, None),
        kernels=[replace(row, seconds=[], skipped="Triton's interpreter is no benchmark") for row in fused],
    )


def all_devices() -> dict[str, Results]:
    return {"h100-2026-11-22.json": h100(), "a100-2026-11-20.json": a100_partial(), "cpu-2026-11-22.json": cpu()}


def fake(
    name: str,
    loss: Callable[[int], float] = lambda call: 1.0,
    built: Callable[[Setting], object] = lambda setting: None,
    **fields: bool,
) -> Variant:
    """A step that computes nothing. loss: of the number of its call. built: its result lives as long as the step."""

    def build(setting: Setting) -> StepFunction:
        calls, held = count(), built(setting)
        return lambda batch, held=held: torch.tensor(loss(next(calls)))

    return Variant(name, build, **fields)
