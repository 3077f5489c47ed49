"""Results that nobody measured, for tests of what reads results: three devices, every kind of row."""

import random

from msgspec.structs import replace

from bench.results import Ceiling, Commit, Failure, Kernel, Machine, Results, Software, Step, Tests
from bench.variants import WORKLOADS
from train.hardware import Peak

LADDER = (  # variant, whether it compares, its time in reference times
    ("reference eager", True, 1.65),
    ("reference compiled", True, 1.25),
    ("ours eager", True, 1.4),
    ("ours graphed", True, 1.3),
    ("flat state, no casts", False, 1.1),
    ("cross-entropy", False, 0.97),
    ("ours compiled", True, 0.98),
    ("ours compiled + graphed", True, 0.96),
)
SHAPES = {"linear_cross_entropy": [32768, 768, 50304], "mlp": [32768, 768, 3072]}


def samples(rng: random.Random, middle: float, count: int = 40) -> list[float]:
    return [middle * (1 + abs(rng.gauss(0, 0.01))) for _ in range(count)]


def step(rng: random.Random, workload: str, variant: str, compares: bool, seconds: float, memory: int | None) -> Step:
    row = WORKLOADS[workload].row(variant, compares=compares, seconds=samples(rng, seconds))
    host = samples(rng, seconds / 50) if memory else []
    return replace(row, host_seconds=host, peak_memory=memory, losses=[10.9, 10.2])


def kernels(rng: random.Random, copy: float, matmul: float) -> list[Kernel]:
    rows = []
    for case, shape in SHAPES.items():
        moved = 2 * shape[0] * shape[-1] * 2
        flops = 2 * shape[0] * shape[1] * shape[2] if case == "mlp" else None
        for direction, times in (("forward", 1), ("backward", 2)):
            for variant, share in (("fused", 0.85), ("reference", 0.3), ("compiled", 0.7), ("liger", 0.5)):
                least = max(times * moved / copy, times * (flops or 0) / matmul)
                seconds = samples(rng, least / share, 20)
                rows.append(
                    Kernel(case, shape, "bfloat16", direction, variant, seconds, times * moved, flops and times * flops)
                )
    return rows


def gpu(name: str, copy: float, peak: float, seconds: float, seed: int = 0) -> Results:
    rng = random.Random(seed)
    steps = [
        step(rng, "gpt2", variant, compares, seconds * times, int(2**30 * (8 + 12 * times)))
        for variant, compares, times in LADDER
    ]
    return Results(
        Machine(name, "cuda", "580.95"),
        Software("3.12.1", "2.11.0", "3.6.0", "13.0", "9.1"),
        Commit("0123456789abcdef", clean=True),
        "2026-11-22T10:00:00+00:00",
        "python -m bench --minutes=8",
        Peak(peak, f"{name} data sheet, dense bf16"),
        tests=Tests(120, 0, 2),
        ceilings=[
            Ceiling("matmul", "bfloat16", [0.74 * peak, 0.75 * peak, 0.745 * peak]),
            Ceiling("copy", "bfloat16", [copy, 0.99 * copy]),
        ],
        kernels=kernels(rng, copy, 0.75 * peak),
        steps=steps,
        complete=True,
    )


def h100(seed: int = 0) -> Results:
    return gpu("NVIDIA H100 80GB HBM3", 3.0e12, 989e12, 0.054, seed)


def a100_partial() -> Results:
    """Stopped early: no kernels, three steps, one of which failed its check, tests that failed."""
    whole = gpu("NVIDIA A100-SXM4-80GB", 1.7e12, 312e12, 0.14, 1)
    steps = [
        replace(one, seconds=[], host_seconds=[], skipped="its losses are off by 3.1e-01, expected 2e-02 at most")
        if one.variant == "ours graphed"
        else one
        for one in whole.steps
        if one.variant in ("reference compiled", "ours eager", "ours graphed")
    ]
    return replace(
        whole,
        commit=Commit("fedcba9876543210", clean=False),
        date="2026-11-20T09:30:00+00:00",
        tests=Tests(118, 2, 2, ["tests/train/test_gpu.py::test_one", "<b>::test_two"]),
        kernels=[],
        steps=steps,
        failures=[Failure("kernels", "CUDA error: an illegal memory access was encountered")],
        complete=False,
    )


def cpu(seed: int = 2) -> Results:
    """Without Triton: of kernels only the fused rows, which are skipped; nothing tells memory."""
    rng = random.Random(seed)
    steps = [
        step(rng, "cpu", variant, compares, seconds, None)
        for variant, compares, seconds in (
            ("nanoGPT eager", True, 0.037),
            ("nanoGPT compiled", True, 0.035),
            ("reference eager", True, 0.038),
            ("reference compiled", True, 0.036),
            ("reference autocast eager", False, 0.022),
            ("reference autocast compiled", False, 0.021),
            ("ours eager", True, 0.020),
            ("ours compiled", True, 0.018),
        )
    ]
    rows = [
        replace(one, seconds=[], skipped="Triton's interpreter is no benchmark")
        for one in kernels(rng, 2e10, 8.5e11)
        if one.variant == "fused"
    ]
    return Results(
        Machine("AMD EPYC 9B14", "cpu", threads=2),
        Software("3.11.2", "2.13.0", None, None, None),
        Commit("0123456789abcdef", clean=True),
        "2026-11-22T12:00:00+00:00",
        "python -m bench --minutes=3",
        Peak(8.6e11, "measured bfloat16 matmul peak of this CPU, 2 threads"),
        ceilings=[
            Ceiling("matmul", "bfloat16", [8.5e11, 8.4e11]),
            Ceiling("copy", "float32", [2e10]),
        ],
        kernels=rows,
        steps=steps,
        complete=True,
    )


def all_devices() -> dict[str, Results]:
    return {"h100-2026-11-22.json": h100(), "a100-2026-11-20.json": a100_partial(), "cpu-2026-11-22.json": cpu()}
