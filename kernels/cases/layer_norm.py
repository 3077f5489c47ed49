"""Cases of LayerNorm, alone and with the residual addition."""

from typing import Any

import torch

from kernels import layer_norm, reference, traffic
from kernels.cases.case import Case, Shape, Traffic, draw
from kernels.launch import INTERPRETER, Device

SHAPES = (
    (1, 64),  # one row; a width that fills its block
    (37, 37),  # neither fills a block; rows not a multiple of a tile
    (3, 1600),  # gpt2-xl: two fifths of the block masked
    (130, 24),  # every backward program takes several tiles of rows, the last one ragged
    (5, 2100),  # more warps
)
GPT_SHAPES = ((32 * 1024, 768), (64 * 256, 384), (8 * 1024, 1600))


def _inputs(*, bias: bool, add: bool, stream: torch.dtype | None):
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        randn, C = draw(device), shape[-1]
        inputs = {"x": randn(*shape, dtype=dtype)}
        if add:
            inputs["residual"] = randn(*shape, dtype=stream or dtype, scale=3.0)
        inputs["weight"] = randn(C, dtype=torch.float32)
        inputs["bias"] = randn(C, dtype=torch.float32) if bias else None
        return {**inputs, "dtype": dtype}

    return make_inputs


def _forward_bytes(*, bias: bool, add: bool, stream: torch.dtype | None):
    def forward_bytes(shape: Shape, dtype: torch.dtype, device: Device = INTERPRETER) -> Traffic:
        (M, C), b = shape, dtype.itemsize
        s = (stream or dtype).itemsize if add else b
        vectors = 4 * C * (1 + bias)
        programs = -(-M // layer_norm._block(C)[0])
        dram = traffic.layer_norm_forward(M, C, b, s, bias=bias, add=add)
        return Traffic(dram, (programs - 1) * vectors)

    return forward_bytes


def _backward_bytes(*, bias: bool, add: bool, stream: torch.dtype | None):
    def backward_bytes(shape: Shape, dtype: torch.dtype, device: Device = INTERPRETER) -> Traffic:
        (M, C), b = shape, dtype.itemsize
        s = (stream or dtype).itemsize if add else b
        P = layer_norm.backward_programs(device, M, C)
        dram = traffic.layer_norm_backward(M, C, b, s, bias=bias, add=add, partials=P)
        return Traffic(dram, 4 * C * (P - 1))

    return backward_bytes


def _case(name: str, *, bias: bool, add: bool, stream: torch.dtype | None = None) -> Case:
    settings = dict(bias=bias, add=add, stream=stream)
    function = "add_layer_norm" if add else "layer_norm"
    return Case(
        name=name,
        fused=getattr(layer_norm, function),
        reference=getattr(reference, function),
        make_inputs=_inputs(**settings),
        shapes=SHAPES,
        gpt_shapes=GPT_SHAPES,
        forward_bytes=_forward_bytes(**settings),
        backward_bytes=_backward_bytes(**settings),
    )


CASES = [
    _case("layer_norm", bias=True, add=False),
    _case("layer_norm without bias", bias=False, add=False),
    _case("add_layer_norm", bias=True, add=True),
    _case("add_layer_norm, float32 stream", bias=True, add=True, stream=torch.float32),
    _case("add_layer_norm without bias, float32 stream", bias=False, add=True, stream=torch.float32),
]
