"""GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): the exact form, and the form that GPT-2 was trained with.

    erf:    gelu(x) = x Phi(x),   gelu'(x) = Phi(x) + x phi(x)            phi, Phi: the normal density, its integral
    tanh:   gelu(x) = x s(x),     gelu'(x) = s(x) + x s'(x),   s(x) = sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))

Only x is saved for the backward pass. Forward reads x and writes y: 4 bytes an element in bfloat16. Backward reads dy
and x and writes dx: 6 bytes. An H100's memory moves 4 bytes in the time of about 38 instructions, so the functions must
be cheap. Phi and s are symmetric, and both fall fast. With a = |x|,

    Phi(-a) = 2^P(a),   s(-a) = 2^Q(a),   and at a they are 1 minus these

P and Q have degree 10 and 11. They are minimax fits of the logarithms on [0, 6], with the error weighted by
max(2^P, 1e-4). The fits are off by 1.5e-9 and 1.3e-8, which is less than float32 rounds Phi. In the tail the relative
error stays below 2e-5 and 2e-4; there 1 + erf(x / sqrt(2)) has no correct digit. Past 6 the fits keep falling, so gelu
reaches its limits, 0 and x, also at both infinities. NaN stays NaN.

In an MLP, x holds the bias already, and the bias's gradient is the sum of dx over the rows. The backward kernel can sum
it in registers: a fixed number of programs P each take every P-th tile of rows, and the P partial rows are summed
afterwards. There are no atomics, so every run gives the same bits. A multiprocessor holds 8 programs of 256 threads at
32 registers a thread, or 4 with the sum, at 64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, check, custom_op, device_of, refusal, rows, run


@triton.jit
def tail_of(a, TANH: tl.constexpr):
    """Phi(-a), or the tanh form's s(-a), of float32 a >= 0."""
    if TANH:
        p = -2.4265634e-07 * a + 6.8403219e-06
        p = p * a - 7.8122655e-05
        p = p * a + 4.5008751e-04
        p = p * a - 1.2858162e-03
        p = p * a + 1.4476844e-03
        p = p * a - 1.7210601e-03
        p = p * a + 8.5628573e-03
        p = p * a - 5.1731348e-02
        p = p * a - 4.5919001e-01
        p = p * a - 1.1511054e00
    else:
        p = -3.4201431e-08 * a + 9.8526925e-07
        p = p * a - 1.2167541e-05
        p = p * a + 8.2351849e-05
        p = p * a - 2.9570048e-04
        p = p * a + 2.4091549e-05
        p = p * a + 6.9281659e-03
        p = p * a - 5.2435055e-02
        p = p * a - 4.5922112e-01
        p = p * a - 1.1511043e00
    return tl.exp2(p * a - 1.0)


@triton.jit
def gelu_of(x, TANH: tl.constexpr):
    """gelu(x) of float32 x: x - x tail(x) where x > 0, x tail(-x) elsewhere."""
    a = tl.abs(x)
    return tl.maximum(x, 0.0) - tl.minimum(a, 3.0e38) * tail_of(a, TANH)  # the minimum: no inf * 0


@triton.jit
def gelu_slope_of(x, TANH: tl.constexpr):
    """gelu'(x) of float32 x; past 16 it is 0 or 1 to the last bit."""
    a = tl.minimum(tl.abs(x), 16.0, propagate_nan=tl.PropagateNan.ALL)
    tail = tail_of(a, TANH)
    if TANH:
        density = tail * (1.0 - tail) * (0.21406445 * (a * a) + 1.5957691)  # s'
    else:
        density = tl.exp2(-0.72134752 * (a * a) - 1.3257481)  # phi: log2(e) / 2, log2(2 pi) / 2
    below = tail - a * density  # gelu'(-a)
    return tl.where(x < 0.0, below, 1.0 - below)


@triton.jit
def gelu_fwd_kernel(
    x_ptr,  # (M, C)
    y_ptr,  # out (M, C)
    x_stride,
    M,
    C,
    column_tiles,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    o_row = pid // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_col = pid % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (o_row < M)[:, None] & (o_col < C)[None, :]
    row64 = o_row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row64 * x_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row64 * C + o_col[None, :], gelu_of(x, TANH).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_bwd_kernel(
    dy_ptr,  # (M, C)
    x_ptr,  # (M, C)
    dx_ptr,  # out (M, C)
    dbias_ptr,  # out (P, C) float32: each program's sum over its rows; or None
    dy_stride,
    x_stride,
    M,
    C,
    column_tiles,
    tiles_per_program,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group = tl.program_id(0) // column_tiles
    groups = tl.num_programs(0) // column_tiles
    o_col = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_col = o_col < C
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(tiles_per_program):
        o_row = (i * groups + group) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (o_row < M)[:, None] & m_col[None, :]
        row64 = o_row.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + row64 * dy_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row64 * x_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
        dx = dy * gelu_slope_of(x, TANH)
        tl.store(dx_ptr + row64 * C + o_col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += dx  # 0 where masked: dy is
    if dbias_ptr is not None:
        tl.store(dbias_ptr + group * C + o_col, tl.sum(dbias, axis=0), mask=m_col)


def _tiles(M: int, C: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, row tiles, column tiles): 8 elements a thread of 8 warps, 128 bits of 2-byte elements."""
    BLOCK_N = min(256, max(16, triton.next_power_of_2(C)))
    BLOCK_M = 2048 // BLOCK_N
    return BLOCK_M, BLOCK_N, triton.cdiv(M, BLOCK_M), triton.cdiv(C, BLOCK_N)


def gelu_forward(x: Tensor, approximate: str, y: Tensor) -> None:
    """Write gelu(x) into y (M, C), which may be x. x (M, C) with unit last stride."""
    M, C = x.shape
    BLOCK_M, BLOCK_N, row_tiles, column_tiles = _tiles(M, C)
    args = dict(
        x_ptr=x, y_ptr=y, x_stride=x.stride(0), M=M, C=C, column_tiles=column_tiles,
        TANH=approximate == "tanh", BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    run(x, Launch(gelu_fwd_kernel, (row_tiles * column_tiles,), args, num_warps=8))


def gelu_backward(dy: Tensor, x: Tensor, approximate: str, dx: Tensor, wants_dbias: bool = False) -> Tensor | None:
    """Write dy * gelu'(x) into dx (M, C), which may be dy. dy, x (M, C) with unit last stride.

    Returns, if it is wanted, float32 rows whose sum is that of dx's rows: (P, C).
    """
    M, C = x.shape
    BLOCK_M, BLOCK_N, row_tiles, column_tiles = _tiles(M, C)
    groups, dbias = row_tiles, None
    if wants_dbias:  # 4 programs a multiprocessor, which all run at once
        groups = min(row_tiles, max(1, 4 * device_of(x).multiprocessors // column_tiles))
        dbias = x.new_empty(groups, C, dtype=torch.float32)
    args = dict(
        dy_ptr=dy, x_ptr=x, dx_ptr=dx, dbias_ptr=dbias, dy_stride=dy.stride(0), x_stride=x.stride(0),
        M=M, C=C, column_tiles=column_tiles, tiles_per_program=triton.cdiv(row_tiles, max(groups, 1)),
        TANH=approximate == "tanh", BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    run(x, Launch(gelu_bwd_kernel, (groups * column_tiles,), args, num_warps=8))
    return dbias


@custom_op("nanofuse::gelu")
def _gelu(x: Tensor, approximate: str) -> Tensor:
    """x (M, C) of any strides."""
    y = x.new_empty(x.shape)
    gelu_forward(rows(x), approximate, y)
    return y


@custom_op("nanofuse::gelu_backward")
def _gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dx of dy, x (M, C) of any strides."""
    dx = x.new_empty(x.shape)
    gelu_backward(rows(dy), rows(x), approximate, dx)
    return dx


def _save_gelu(ctx, inputs, output):
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _differentiate_gelu(ctx, dy):
    return _gelu_backward(dy, *ctx.saved_tensors, ctx.approximate), None


_gelu.register_autograd(_differentiate_gelu, setup_context=_save_gelu)


def check_form(approximate: str) -> None:
    """ValueError unless it names a form of GELU."""
    if approximate not in ("erf", "tanh"):
        raise refusal("approximate", repr(approximate), "'erf' or 'tanh'")


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU of every element; the meaning of `reference.gelu`.

    x (..., C): float32, bfloat16 or float16; approximate: "erf" or "tanh". Returns (..., C) in x's dtype. ValueError
    for what cannot be served.
    """
    check_form(approximate)
    check("x", x, (*x.shape[:-1], "C > 0"))
    return _gelu(x.reshape(-1, x.shape[-1]), approximate).view(x.shape)
