"""Cases of the cross-entropy, of logits at hand and of a head's, all rows at once and in chunks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import cross_entropy, linear_cross_entropy, reference, traffic
from kernels.cases.case import Case, Shape, Traffic, draw
from kernels.launch import INTERPRETER

SHAPES = (
    (1, 37),  # one row, which fills no block; rows that are not aligned
    (70, 65),  # characters: several rows a program, the last program ragged
    (5, 8192),  # one block, filled
    (3, 16400),  # three blocks, the last one ragged
    (2, 10007),  # the same, not aligned
)
LINEAR_SHAPES = (
    (1, 16, 37),  # one row
    (70, 24, 65),  # several rows a program, three chunks, all ragged
    (2, 8, 16400),  # several blocks a row; one chunk, not filled
)
GPT_SHAPES = ((32 * 1024, 50304), (64 * 256, 65))
LINEAR_GPT_SHAPES = ((32 * 1024, 768, 50304), (64 * 256, 384, 65), (8 * 1024, 1600, 50304))

PLAIN: dict[str, Any] = {}
ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "reduction": "sum"}  # and padding


def _counted(M: int, ignored: bool) -> int:
    """Rows that count: every fourth is ignored, or all."""
    return 0 if ignored else M - M // 4


def _targets(M: int, n_vocab: int, ignored: bool, device: torch.device) -> Tensor:
    targets = torch.randint(n_vocab, (M,), generator=torch.Generator().manual_seed(2))
    targets[0 if ignored else 3 :: 1 if ignored else 4] = -1
    return targets.to(device)


def _options(V: int, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "n_vocab": V - 3} if options else {}


def _sweeps(M: int, width: int, b: int, ignored: bool, *, gradient: bool) -> Traffic:
    """The forward kernel on rows of `width` logits of b bytes: it saves statistics, or writes the gradient."""
    counted = _counted(M, ignored)
    dram = traffic.cross_entropy_forward(M, width, b, counted=counted, gradient=gradient)
    again = counted * width * b if gradient else 0
    return Traffic(dram, counted * b + again)


# Logits at hand


def _case(name: str, options: dict[str, Any], ignored: bool = False) -> Case:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        M, V = shape
        kept = _options(V, options)
        logits = draw(device)(M, V, dtype=dtype, scale=3.0)
        return {"logits": logits, "targets": _targets(M, kept.get("n_vocab", V), ignored, device), **kept}

    def forward_bytes(shape: Shape, dtype: torch.dtype) -> Traffic:
        return _sweeps(*shape, dtype.itemsize, ignored, gradient=False)

    def backward_bytes(shape: Shape, dtype: torch.dtype) -> Traffic:
        (M, V), b = shape, dtype.itemsize
        ROWS, *_ = cross_entropy.tile(torch.empty(M, V, dtype=dtype, device="meta"))
        programs = -(-M // ROWS)
        return Traffic((_counted(M, ignored) + M) * V * b + 8 * M + 8 * M + 4, 4 * (programs - 1))

    return Case(
        name=name,
        fused=cross_entropy.cross_entropy,
        reference=reference.cross_entropy,
        make_inputs=make_inputs,
        shapes=SHAPES,
        gpt_shapes=GPT_SHAPES,
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
    )


# Head and loss


def _loss(**inputs: Any) -> Tensor:
    return reference.linear_cross_entropy(**inputs)[0]


def _chunk_rows(M: int) -> int:
    return 4096 if M > 4096 else 32


def _linear_case(name: str, options: dict[str, Any], *, chunked: bool, ignored: bool = False) -> Case:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        M, C, V = shape
        randn, kept = draw(device), _options(V, options)
        inputs = {"x": randn(M, C, dtype=dtype), "weight": randn(V, C, dtype=dtype, scale=3 * C**-0.5)}
        targets = _targets(M, kept.get("n_vocab", V), ignored, device)
        return {**inputs, "targets": targets, **kept, "chunk_rows": _chunk_rows(M) if chunked else 0}

    def forward_bytes(shape: Shape, dtype: torch.dtype) -> Traffic:
        M, _, V = shape
        return _sweeps(M, linear_cross_entropy.padded(V), dtype.itemsize, ignored, gradient=True)

    return Case(
        name=name,
        fused=linear_cross_entropy.linear_cross_entropy,
        reference=_loss,
        make_inputs=make_inputs,
        shapes=LINEAR_SHAPES,
        gpt_shapes=LINEAR_GPT_SHAPES,
        forward_bytes=forward_bytes,
        backward_bytes=_backward_bytes(chunked),
        flops=lambda shape: 2 * shape[0] * shape[1] * shape[2],
    )


def _backward_bytes(chunked: bool) -> Callable[[Shape, torch.dtype], Traffic]:
    """Two scalings: of dx and x; in chunks, of dx and dweight."""

    def backward_bytes(shape: Shape, dtype: torch.dtype) -> Traffic:
        M, C, V = shape
        dx = torch.empty(M, C, dtype=dtype, device="meta")
        other = torch.empty(V, C, device="meta") if chunked else dx
        dram, programs = 0, 0
        for x in (dx, other):
            dram += x.numel() * (x.element_size() + dtype.itemsize) + 4
            (launch,) = linear_cross_entropy.plan_scale(INTERPRETER, x, x, x)
            programs += math.prod(launch.grid)
        return Traffic(dram, 4 * (programs - 2))

    return backward_bytes


CASES = [
    _case("cross_entropy", PLAIN),
    _case("cross_entropy, all options", ALL),
    _case("cross_entropy, all ignored", PLAIN, ignored=True),
    _linear_case("linear_cross_entropy", PLAIN, chunked=False),
    _linear_case("linear_cross_entropy, all options", ALL, chunked=False),
    _linear_case("linear_cross_entropy, all ignored", PLAIN, chunked=False, ignored=True),
    _linear_case("linear_cross_entropy in chunks", PLAIN, chunked=True),
    _linear_case("linear_cross_entropy in chunks, all options", ALL, chunked=True),
]
