"""Cases of the elementwise GELU, alone and with a bias."""

from collections.abc import Callable
from typing import Any

import torch

from kernels import gelu, reference, traffic
from kernels.cases.case import Case, Shape, Traffic, draw
from kernels.launch import INTERPRETER, Device

SHAPES = (
    (1, 64),  # one row
    (37, 37),  # neither rows nor columns fill a tile
    (8, 256),  # one whole tile
    (150, 300),  # two columns of tiles; every backward program takes several tiles, the last one ragged
)
GPT_SHAPES = ((32 * 1024, 4 * 768), (64 * 256, 4 * 384), (8 * 1024, 4 * 1600))


def _inputs(*, bias: bool, approximate: str) -> Callable[[Shape, torch.dtype, torch.device], dict[str, Any]]:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        randn = draw(device)
        inputs = {"x": randn(*shape, dtype=dtype, scale=2.0)}
        if bias:
            inputs["bias"] = randn(shape[-1], dtype=dtype)
        return inputs | {"approximate": approximate}

    return make_inputs


def _forward_bytes(*, bias: bool) -> Callable[..., Traffic]:
    def forward_bytes(shape: Shape, dtype: torch.dtype, device: Device = INTERPRETER) -> Traffic:
        (M, C), b = shape, dtype.itemsize
        vector = C * b * bias
        return Traffic(traffic.gelu_forward(M, C, b) + vector, vector * (gelu._tiles(M, C)[2] - 1))

    return forward_bytes


def _backward_bytes(*, bias: bool) -> Callable[..., Traffic]:
    def backward_bytes(shape: Shape, dtype: torch.dtype, device: Device = INTERPRETER) -> Traffic:
        (M, C), b = shape, dtype.itemsize
        P, vector = gelu.partial_rows(device, M, C), C * b
        if not bias:
            return Traffic(traffic.gelu_backward(M, C, b))
        return Traffic(traffic.gelu_backward(M, C, b) + vector + 4 * P * C, vector * (P - 1))

    return backward_bytes


def _case(approximate: str, *, bias: bool) -> Case:
    function = "bias_gelu" if bias else "gelu"
    return Case(
        name=f"{function}, {approximate}",
        fused=getattr(gelu, function),
        reference=getattr(reference, function),
        make_inputs=_inputs(bias=bias, approximate=approximate),
        shapes=SHAPES,
        gpt_shapes=GPT_SHAPES,
        forward_bytes=_forward_bytes(bias=bias),
        backward_bytes=_backward_bytes(bias=bias),
    )


CASES = [_case(approximate, bias=bias) for bias in (False, True) for approximate in gelu.FORMS]
