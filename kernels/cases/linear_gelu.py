"""Cases of the linear layer with a GELU, and of the MLP, on either path."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import gelu, linear_gelu, matmul, reference, traffic
from kernels.cases.case import Case, Shape, Traffic, draw
from kernels.launch import INTERPRETER, Device

# (M, K, N); tiles are 16 x 32 of 16 in the interpreter, whose two programs share them
SHAPES = (
    (16, 32, 32),  # one whole tile
    (1, 16, 64),  # one row
    (37, 37, 53),  # nothing fills its tile; three tiles for each program
    (130, 16, 40),  # more rows of tiles than are taken together
)
GPT_SHAPES = (
    (32 * 1024, 768, 4 * 768),
    (64 * 256, 384, 4 * 384),
    (16 * 1024, 1024, 4 * 1024),
    (8 * 1024, 1600, 4 * 1600),
)


def _linear_inputs(*, bias: bool, approximate: str) -> Callable[[Shape, torch.dtype, torch.device], dict[str, Any]]:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        (M, K, N), randn = shape, draw(device)
        return {
            "x": randn(M, K, dtype=dtype),
            "weight": randn(N, K, dtype=dtype, scale=2 * K**-0.5),
            "bias": randn(N, dtype=dtype) if bias else None,
            "approximate": approximate,
        }

    return make_inputs


def _mlp_inputs(*, bias: bool, approximate: str) -> Callable[[Shape, torch.dtype, torch.device], dict[str, Any]]:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        (M, K, N), randn = shape, draw(device)
        return {
            "x": randn(M, K, dtype=dtype),
            "fc_weight": randn(N, K, dtype=dtype, scale=2 * K**-0.5),
            "fc_bias": randn(N, dtype=dtype) if bias else None,
            "proj_weight": randn(K, N, dtype=dtype, scale=N**-0.5),
            "proj_bias": randn(K, dtype=dtype) if bias else None,
            "approximate": approximate,
        }

    return make_inputs


def _product_bytes(M: int, N: int, K: int, b: int, tiles: matmul.Tiles) -> Traffic:
    """Both operands: once for each column, or row, of tiles of the output."""
    once = (M * K + N * K) * b
    return Traffic(once, M * K * b * -(-N // tiles.BLOCK_N) + N * K * b * -(-M // tiles.BLOCK_M) - once)


def _forward_bytes(*, bias: bool, path: str) -> Callable[..., Traffic]:
    def forward_bytes(shape: Shape, dtype: torch.dtype, device: Device = INTERPRETER) -> Traffic:
        (M, K, N), b = shape, dtype.itemsize
        if path != "triton":
            return Traffic(traffic.gelu_forward(M, N, b))
        tiles = matmul.tiles_for(matmul.FORWARD_TILES, device, dtype)[0]
        once, again = _product_bytes(M, N, K, b, tiles)
        vector, row_tiles = N * b * bias, -(-M // tiles.BLOCK_M)
        return Traffic(once + vector + 2 * M * N * b, again + vector * (row_tiles - 1))

    return forward_bytes


def _elementwise_bytes(*, bias: bool) -> Callable[..., Traffic]:
    def backward_bytes(shape: Shape, dtype: torch.dtype, device: Device = INTERPRETER) -> Traffic:
        M, _, N = shape
        partial = 4 * N * gelu.partial_rows(device, M, N) * bias
        return Traffic(traffic.gelu_backward(M, N, dtype.itemsize) + partial)

    return backward_bytes


def _mlp_backward_bytes(*, bias: bool) -> Callable[..., Traffic]:
    def backward_bytes(shape: Shape, dtype: torch.dtype, device: Device = INTERPRETER) -> Traffic:
        (M, K, N), b = shape, dtype.itemsize
        tiles = matmul.tiles_for(matmul.BACKWARD_TILES, device, dtype)[0]
        once, again = _product_bytes(M, N, K, b, tiles)
        return Traffic(once + 2 * M * N * b + 4 * N * matmul.partial_rows(M, tiles) * bias, again)

    return backward_bytes


def _linear_case(approximate: str, *, bias: bool, path: str) -> Case:
    def fused(**inputs: Any) -> Tensor:
        return linear_gelu.linear_gelu(**inputs, path=path)

    return Case(
        name=f"linear_gelu, {approximate}{'' if bias else ', no bias'}, {path}",
        fused=fused,
        reference=reference.linear_gelu,
        make_inputs=_linear_inputs(bias=bias, approximate=approximate),
        shapes=SHAPES,
        gpt_shapes=GPT_SHAPES,
        forward_bytes=_forward_bytes(bias=bias, path=path),
        backward_bytes=_elementwise_bytes(bias=bias),
        flops=lambda shape: 2 * shape[0] * shape[1] * shape[2],
    )


def _mlp_case(approximate: str, *, bias: bool, path: str) -> Case:
    def fused(**inputs: Any) -> Tensor:
        return linear_gelu.mlp(**inputs, path=path)

    backward_bytes = _mlp_backward_bytes if path == "triton" else _elementwise_bytes
    return Case(
        name=f"mlp, {approximate}{'' if bias else ', no bias'}, {path}",
        fused=fused,
        reference=reference.mlp,
        make_inputs=_mlp_inputs(bias=bias, approximate=approximate),
        shapes=SHAPES,
        gpt_shapes=GPT_SHAPES,
        forward_bytes=_forward_bytes(bias=bias, path=path),
        backward_bytes=backward_bytes(bias=bias),
        flops=lambda shape: 4 * shape[0] * shape[1] * shape[2],
    )


CASES = [
    _linear_case("erf", bias=True, path="triton"),
    _linear_case("tanh", bias=False, path="triton"),
    _mlp_case("erf", bias=True, path="triton"),
    _mlp_case("tanh", bias=False, path="triton"),
    _mlp_case("erf", bias=True, path="auto"),
]
