"""The MLP's two matmul kernels with GELU in their epilogues, and the sizes of their tiles.

    linear_gelu_fwd:   pre = x @ weight.T + bias,   act = gelu(pre)
    linear_gelu_bwd:   dpre = (dy @ weight) * gelu'(pre),   dbias = sum over rows of dpre

A kernel is persistent: all its P programs are on the device at once, and each takes every P-th tile of the output. If a
multiprocessor has two programs, one computes while the other is in its epilogue. If it has one, the next tile's loads
are under way meanwhile (`FLATTEN`). Tiles are taken in groups of rows, so that their operands stay in the L2 cache. On
sm_90 and later, tiles move by tensor descriptors (TMA) if addresses and strides are multiples of 16 bytes, else by
pointers and masks. An epilogue takes one half of its tile after the other, which needs fewer registers and less shared
memory.

Sums are float32 and rounded once. float32 operands are multiplied in float32 ("ieee", without tensor cores): right, and
slow. Operands are read once for each tile, mostly out of L2. pre, act and dpre are moved once. dbias is summed tile by
tile into float32 partial rows, one for each row of tiles, which the caller adds up. There are no atomics, so every run
gives the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fused.gelu import gelu_of, gelu_slope_of
from kernels.launch import INTERPRETED, Device, Launch, address, device_of, packed, run

GROUP = tl.constexpr(8)  # rows of tiles that are taken together
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's tl.dot is wrong for bfloat16


@triton.jit
def tile_at(tile, row_tiles, column_tiles):
    """(row, column) of a tile: GROUP rows at a time, down each column of the group in turn."""
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def tile_product(
    a_ptr,  # (M, K), or its descriptor
    b_ptr,  # (N, K) if TRANSPOSED, else (K, N); or its descriptor
    a_stride,
    b_stride,
    o_m,
    o_n,
    M,
    N,
    K,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows o_m … and columns o_n … of a @ b, or of a @ b.T if TRANSPOSED: (BLOCK_M, BLOCK_N) float32, 0 outside."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    o_row = o_m + tl.arange(0, BLOCK_M)
    o_col = o_n + tl.arange(0, BLOCK_N)
    m_row = (o_row < M)[:, None]
    row64 = o_row.to(tl.int64)[:, None]
    for i in tl.range(0, tl.cdiv(K, BLOCK_K)):
        o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        if TMA:
            a = a_ptr.load([o_m, i * BLOCK_K])
            b = b_ptr.load([o_n, i * BLOCK_K]).T if TRANSPOSED else b_ptr.load([i * BLOCK_K, o_n])
        else:
            a = tl.load(a_ptr + row64 * a_stride + o_k[None, :], mask=m_row & (o_k < K)[None, :], other=0.0)
            m_b = (o_k < K)[:, None] & (o_col < N)[None, :]
            if TRANSPOSED:
                b = tl.load(b_ptr + o_col.to(tl.int64)[None, :] * b_stride + o_k[:, None], mask=m_b, other=0.0)
            else:
                b = tl.load(b_ptr + o_k.to(tl.int64)[:, None] * b_stride + o_col[None, :], mask=m_b, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def load_tile(ptr, o_m, o_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows o_m … and columns o_n … of a contiguous (M, N) matrix, 0 outside."""
    o_row = o_m + tl.arange(0, BLOCK_M)
    o_col = o_n + tl.arange(0, BLOCK_N)
    mask = (o_row < M)[:, None] & (o_col < N)[None, :]
    return tl.load(ptr + o_row.to(tl.int64)[:, None] * N + o_col[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, tile, o_m, o_n, M, N, TMA: tl.constexpr):
    """Store a tile, rounded, at rows o_m … and columns o_n … of a contiguous (M, N) matrix."""
    if TMA:
        ptr.store([o_m, o_n], tile.to(ptr.dtype))
    else:
        o_row = o_m + tl.arange(0, tile.shape[0])
        o_col = o_n + tl.arange(0, tile.shape[1])
        mask = (o_row < M)[:, None] & (o_col < N)[None, :]
        tl.store(ptr + o_row.to(tl.int64)[:, None] * N + o_col[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def halves(tile):
    """A tile's left and right columns: what an epilogue holds in registers and shared memory is half a tile's."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def linear_gelu_fwd_kernel(
    x_ptr,  # (M, K), or its descriptor
    weight_ptr,  # (N, K), or its descriptor
    bias_ptr,  # (N,) or None
    pre_ptr,  # out (M, N), or its descriptor; None: not wanted
    act_ptr,  # out (M, N), or its descriptor
    x_stride,
    weight_stride,
    M,
    N,
    K,
    row_tiles,
    column_tiles,
    TANH: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tl.assume(K > 0)
    pid, programs = tl.program_id(0), tl.num_programs(0)
    stored = pid - programs  # the epilogue's own count: flattened, the loop has moved on to the next tile's loads
    for i in tl.range(0, tl.cdiv(row_tiles * column_tiles - pid, programs), flatten=FLATTEN):
        row, column = tile_at(pid + i * programs, row_tiles, column_tiles)
        acc = tile_product(
            x_ptr, weight_ptr, x_stride, weight_stride, row * BLOCK_M, column * BLOCK_N, M, N, K,
            True, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        stored += programs
        row, column = tile_at(stored, row_tiles, column_tiles)
        o_m, o_n = row * BLOCK_M, column * BLOCK_N
        left, right = halves(acc)
        _forward_half(left, bias_ptr, pre_ptr, act_ptr, o_m, o_n, M, N, TANH, TMA)
        _forward_half(right, bias_ptr, pre_ptr, act_ptr, o_m, o_n + BLOCK_N // 2, M, N, TANH, TMA)


@triton.jit
def _forward_half(pre, bias_ptr, pre_ptr, act_ptr, o_m, o_n, M, N, TANH: tl.constexpr, TMA: tl.constexpr):
    if bias_ptr is not None:
        o_col = o_n + tl.arange(0, pre.shape[1])
        pre += tl.load(bias_ptr + o_col, mask=o_col < N, other=0.0).to(tl.float32)[None, :]
    if pre_ptr is not None:
        store_tile(pre_ptr, pre, o_m, o_n, M, N, TMA)
    store_tile(act_ptr, gelu_of(pre, TANH), o_m, o_n, M, N, TMA)


@triton.jit
def linear_gelu_bwd_kernel(
    dy_ptr,  # (M, K), or its descriptor
    weight_ptr,  # (K, N), or its descriptor
    pre_ptr,  # (M, N)
    dpre_ptr,  # out (M, N), or its descriptor
    dbias_ptr,  # out (row_tiles, N) float32: sums over the rows of each tile; or None
    dy_stride,
    weight_stride,
    M,
    N,
    K,
    row_tiles,
    column_tiles,
    TANH: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tl.assume(K > 0)
    pid, programs = tl.program_id(0), tl.num_programs(0)
    for i in tl.range(0, tl.cdiv(row_tiles * column_tiles - pid, programs)):
        row, column = tile_at(pid + i * programs, row_tiles, column_tiles)
        o_m, o_n, o_right = row * BLOCK_M, column * BLOCK_N, column * BLOCK_N + BLOCK_N // 2
        # on their way while the product is made; through pointers, since a descriptor's load would be waited for
        pre_left = load_tile(pre_ptr, o_m, o_n, M, N, BLOCK_M, BLOCK_N // 2)
        pre_right = load_tile(pre_ptr, o_m, o_right, M, N, BLOCK_M, BLOCK_N // 2)
        acc = tile_product(
            dy_ptr, weight_ptr, dy_stride, weight_stride, o_m, o_n, M, N, K, False, TMA, BLOCK_M, BLOCK_N, BLOCK_K
        )
        left, right = halves(acc)
        _backward_half(left, pre_left, dpre_ptr, dbias_ptr, row, o_m, o_n, M, N, TANH, TMA)
        _backward_half(right, pre_right, dpre_ptr, dbias_ptr, row, o_m, o_right, M, N, TANH, TMA)


@triton.jit
def _backward_half(dact, pre, dpre_ptr, dbias_ptr, row, o_m, o_n, M, N, TANH: tl.constexpr, TMA: tl.constexpr):
    dpre = dact * gelu_slope_of(pre.to(tl.float32), TANH)
    store_tile(dpre_ptr, dpre, o_m, o_n, M, N, TMA)
    if dbias_ptr is not None:
        o_col = o_n + tl.arange(0, dpre.shape[1])
        tl.store(dbias_ptr + row.to(tl.int64) * N + o_col, tl.sum(dpre, axis=0), mask=o_col < N)


@dataclass(frozen=True)
class Tiles:
    """How a matmul kernel is cut up."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    programs: int  # on a multiprocessor at once, as registers and shared memory allow

    def __str__(self) -> str:
        return f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} ({self.num_warps} warps)"


# Bounds: shared memory a block of 227 KB on sm_90 and sm_100, 163 on sm_80, 99 elsewhere; 64K registers. The backward
# kernel's tile of pre waits in registers beside the sums: smaller tiles or more warps where operands need some too.
FORWARD_TILES = {
    80: (Tiles(128, 128, 32, 4, 4, 2), Tiles(128, 256, 32, 8, 4, 1)),
    86: (Tiles(128, 128, 32, 4, 4, 2), Tiles(128, 128, 32, 8, 4, 1)),
    90: (Tiles(128, 256, 64, 8, 4, 1), Tiles(128, 128, 64, 4, 3, 2)),
    120: (Tiles(128, 128, 32, 4, 3, 2), Tiles(128, 128, 64, 8, 2, 1)),
}
BACKWARD_TILES = {
    80: (Tiles(128, 128, 32, 8, 4, 1), Tiles(128, 64, 32, 4, 4, 2)),
    86: (Tiles(128, 128, 32, 8, 4, 1), Tiles(128, 64, 32, 4, 4, 2)),
    90: (Tiles(128, 256, 64, 8, 3, 1), Tiles(128, 128, 64, 4, 3, 2)),
    120: (Tiles(128, 128, 64, 8, 2, 1), Tiles(128, 64, 32, 4, 4, 2)),
}
FLOAT32 = (Tiles(64, 64, 16, 8, 2, 1),)
INTERPRETED_TILES = (Tiles(16, 32, 16, 4, 2, 1), Tiles(16, 32, 16, 8, 2, 2))


def tiles_for(table: dict[int, tuple[Tiles, ...]], device: Device, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """What a kernel may be cut into on a device, the likeliest best first.

    table: for 2-byte elements, by the lowest compute capability that the tiles are for.
    """
    if device.capability == 0:
        return INTERPRETED_TILES
    if dtype == torch.float32:
        return FLOAT32
    return table[max((known for known in table if known <= device.capability), default=min(table))]


def check_rows(N: int, *operands: Tensor) -> None:
    """ValueError for operands, or an output N wide, with which a fused matmul could not keep its sums in registers.

    Triton knows that an address is aligned only if the row's stride is a multiple of 16 elements. For other rows of
    2-byte elements it keeps an address for each: on every target from sm_80 to sm_90, 132 to thousands of instructions
    spill.
    """
    if device_of(operands[0]).capability == 0 or operands[0].element_size() == 4:
        return
    if N % 16 or any(address(x) % 16 or x.stride(0) % 16 for x in operands):
        raise ValueError(
            "tiles: got rows that do not begin at multiples of 16 elements, which only cuBLAS multiplies: the fused "
            "matmul would spill"
        )


def has_descriptors(device: Device, *matrices: Tensor | None) -> bool:
    """Whether TMA can move tiles of all these matrices of unit last stride."""
    return device.capability >= 90 and all(
        x.numel() > 0
        and address(x) % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(0) >= x.shape[1]  # rows that overlap, as an expanded tensor's, are beyond it
        for x in matrices
        if x is not None
    )


def operand(x: Tensor | None, rows: int, columns: int, descriptors: bool) -> Any:
    """x, or the descriptor of its (rows, columns) tiles."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if descriptors and x is not None else x


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_pre: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """(gelu(x @ weight.T + bias), what GELU is taken of): (M, N) each; the second is None unless it is kept.

    x (M, K), weight (N, K) with unit last stride; bias (N,) or None.
    """
    (M, K), N = x.shape, weight.shape[0]
    check_rows(N, x, weight)
    act = x.new_empty(M, N)
    pre = torch.empty_like(act) if keep_pre else None
    TMA = has_descriptors(device_of(x), x, weight, pre, act)
    args = dict(
        x_ptr=operand(x, tiles.BLOCK_M, tiles.BLOCK_K, TMA),
        weight_ptr=operand(weight, tiles.BLOCK_N, tiles.BLOCK_K, TMA),
        bias_ptr=packed(bias),
        pre_ptr=operand(pre, tiles.BLOCK_M, tiles.BLOCK_N // 2, TMA),
        act_ptr=operand(act, tiles.BLOCK_M, tiles.BLOCK_N // 2, TMA),
        x_stride=x.stride(0),
        weight_stride=weight.stride(0),
        TANH=approximate == "tanh",
        TMA=TMA,
    )
    _run(linear_gelu_fwd_kernel, x, tiles, M, N, K, args | dict(FLATTEN=tiles.programs == 1))
    return act, pre


def linear_gelu_backward(
    dy: Tensor, weight: Tensor, pre: Tensor, approximate: str, wants_dbias: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """(dpre = (dy @ weight) * gelu'(pre), (M, N) in pre's dtype; float32 rows whose sum is that of dpre's rows, or None
    unless wanted).

    dy (M, K), weight (K, N) with unit last stride, pre (M, N) contiguous.
    """
    (M, K), N = dy.shape, weight.shape[1]
    check_rows(N, dy, weight)
    dpre = torch.empty_like(pre)
    row_tiles = triton.cdiv(M, tiles.BLOCK_M)
    dbias = pre.new_empty(row_tiles, N, dtype=torch.float32) if wants_dbias else None
    TMA = has_descriptors(device_of(dy), dy, weight, dpre)
    args = dict(
        dy_ptr=operand(dy, tiles.BLOCK_M, tiles.BLOCK_K, TMA),
        weight_ptr=operand(weight, tiles.BLOCK_K, tiles.BLOCK_N, TMA),
        pre_ptr=pre,
        dpre_ptr=operand(dpre, tiles.BLOCK_M, tiles.BLOCK_N // 2, TMA),
        dbias_ptr=dbias,
        dy_stride=dy.stride(0),
        weight_stride=weight.stride(0),
        TANH=approximate == "tanh",
        TMA=TMA,
    )
    _run(linear_gelu_bwd_kernel, dy, tiles, M, N, K, args)
    return dpre, dbias


def _run(kernel: Any, x: Tensor, tiles: Tiles, M: int, N: int, K: int, args: dict[str, Any]) -> None:
    """What both kernels are told of the problem's size and its tiles."""
    row_tiles, column_tiles = triton.cdiv(M, tiles.BLOCK_M), triton.cdiv(N, tiles.BLOCK_N)
    args = args | dict(M=M, N=N, K=K, row_tiles=row_tiles, column_tiles=column_tiles)
    args = args | dict(BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, BLOCK_K=tiles.BLOCK_K)
    programs = min(row_tiles * column_tiles, tiles.programs * device_of(x).multiprocessors)
    run(x, Launch(kernel, (programs,), args, tiles.num_warps, tiles.num_stages))
