"""Measure the fused matmul kernels against cuBLAS on this device, and write what wins into `tuned.json`.

    python -m kernels.tune [--shapes 32768x768 …] [--dtypes bfloat16 …]

A shape is rows x width of an MLP that widens four times. Both of its fused kernels, in each of the device's
configurations, are checked against float64 first: one that is further off than twice cuBLAS's own error, and one
rounding, is never timed, and makes the exit status 1. Times are medians over replays of a CUDA graph of the kernel, as
training makes them: what the host does to launch it is not counted. The L2 cache is emptied before each; the better of
two turns counts. A kernel wins where it saves 1 % or more.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from kernels import reference
from kernels.fused.matmul import BACKWARD_TILES, FORWARD_TILES, Tiles, tiles_for
from kernels.fused.mlp import backward, forward
from kernels.launch import INTERPRETED, device_of
from kernels.timing import milliseconds
from kernels.tuned import CUBLAS, Problem, record

# (rows, width): gpt2 at 32, 12, 4 and 1 sequences of 1024 tokens, shakespeare_char, gpt2-medium, gpt2-xl
GPT_SHAPES = ((32768, 768), (12288, 768), (4096, 768), (1024, 768), (16384, 384), (16384, 1024), (8192, 1600))
CHUNK = 4096  # rows that are checked at once: float64 is large
APPROXIMATE = "erf"  # both forms cost the same
GAIN = 0.01  # what two measurements of one thing may differ by


@dataclass(frozen=True)
class Work:
    """One of the two kernels at one shape. `run(tiles)` gives its outputs; tiles: None for cuBLAS.

    `exact(first, last)` gives those outputs in float64: rows first … last, or their sum where the output is one.
    """

    problem: Problem
    tiles: tuple[Tiles, ...]
    run: Callable[[Tiles | None], tuple[Tensor, Tensor]]
    exact: Callable[[int, int], tuple[Tensor, Tensor]]


def works(rows: int, width: int, dtype: torch.dtype, on: torch.device) -> tuple[Work, Work]:
    """The forward and the backward kernel of an MLP, with biases, on random inputs."""
    M, K, N = rows, width, 4 * width
    generator = torch.Generator(on).manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=on) * scale).to(dtype)

    x, weight, bias, dy, pre = randn(M, K), randn(N, K, scale=K**-0.5), randn(N), randn(M, K), randn(M, N)
    device = device_of(x)

    def exact_forward(first: int, last: int) -> tuple[Tensor, Tensor]:
        exact = torch.nn.functional.linear(x[first:last].double(), weight.double(), bias.double())
        return reference.gelu(exact, APPROXIMATE), exact

    def exact_backward(first: int, last: int) -> tuple[Tensor, Tensor]:
        leaf = pre[first:last].double().requires_grad_()
        act = reference.gelu(leaf, APPROXIMATE)
        (dpre,) = torch.autograd.grad(act, leaf, dy[first:last].double() @ weight.double().t())
        return dpre, dpre.sum(0)

    proj_weight = weight.t().contiguous()
    return (
        Work(
            Problem("linear_gelu", dtype, M, N, K),
            tiles_for(FORWARD_TILES, device, dtype),
            lambda tiles: forward(x, weight, bias, APPROXIMATE, True, tiles),
            exact_forward,
        ),
        Work(
            Problem("mlp_dpre", dtype, M, N, K),
            tiles_for(BACKWARD_TILES, device, dtype),
            lambda tiles: backward(dy, proj_weight, pre, APPROXIMATE, True, tiles),
            exact_backward,
        ),
    )


@contextmanager
def _poisoned() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel does not store is not what another one left there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def errors(work: Work, tiles: Tiles | None, eps: float = 0.0) -> list[float]:
    """For each output the largest distance from the exact one, less eps times that one; infinite where there is NaN."""
    with _poisoned():
        outputs = work.run(tiles)
    worst, sums = [-math.inf] * len(outputs), {}

    def compare(i: int, got: Tensor, exact: Tensor) -> None:
        distance = (got.double() - exact).abs() - eps * exact.abs()
        worst[i] = max(worst[i], distance.nan_to_num(nan=math.inf).max().item())

    for first in range(0, work.problem.M, CHUNK):
        last = min(first + CHUNK, work.problem.M)
        for i, exact in enumerate(work.exact(first, last)):
            if outputs[i].ndim == 1:
                sums[i] = sums.get(i, 0.0) + exact
            else:
                compare(i, outputs[i][first:last], exact)
    for i, exact in sums.items():
        compare(i, outputs[i], exact)
    return worst


def measure(work: Work, on: str, time: Callable[[Callable[[], object]], float]) -> bool:
    """Check, time and record one kernel on the device of that name; whether all its configurations were right."""
    plain = errors(work, None)
    contenders: dict[str, Tiles | None] = {CUBLAS: None}
    for tiles in work.tiles:
        off = errors(work, tiles, torch.finfo(work.problem.dtype).eps)
        if all(got <= 2 * allowed for got, allowed in zip(off, plain, strict=True)):
            contenders[str(tiles)] = tiles
        else:
            print(f"{work.problem}: {tiles}: WRONG, off by {off}, cuBLAS by {plain}")
    ms = dict.fromkeys(contenders, math.inf)
    for _ in range(2):
        for name, tiles in contenders.items():
            ms[name] = min(ms[name], time(lambda tiles=tiles: work.run(tiles)))
    best = min(ms, key=ms.__getitem__)
    use = contenders[best] if ms[best] <= (1 - GAIN) * ms[CUBLAS] else None
    record(on, work.problem, use, ms, f"torch {torch.__version__}, triton {triton.__version__}")
    for name in sorted(ms, key=ms.__getitem__):
        chosen = "*" if contenders[name] == use else " "
        print(f"{work.problem}: {chosen} {ms[name]:8.4f} ms, {ms[CUBLAS] / ms[name]:.3f} of cuBLAS's speed, {name}")
    return len(contenders) == len(work.tiles) + 1


def _shape(text: str) -> tuple[int, int]:
    rows, _, width = text.partition("x")
    if not (rows.isdecimal() and width.isdecimal() and int(rows) and int(width)):
        raise argparse.ArgumentTypeError(f"got {text}, expected ROWSxWIDTH, as 32768x768")
    return int(rows), int(width)


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a kernel was wrong; 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, default=GPT_SHAPES, metavar="ROWSxWIDTH")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16"), default=("bfloat16",))
    arguments = parser.parse_args(argv)
    if INTERPRETED or not torch.cuda.is_available():
        print("kernels.tune: got no CUDA device, expected one to measure on", file=sys.stderr)
        return 2
    right, device = True, torch.device("cuda")
    for dtype in arguments.dtypes:
        for rows, width in arguments.shapes:
            for work in works(rows, width, getattr(torch, dtype), device):
                right &= measure(work, torch.cuda.get_device_name(), partial(milliseconds, device=device))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
