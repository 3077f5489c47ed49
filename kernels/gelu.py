"""GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), alone and with a bias added before it.

    erf:    gelu(x) = x Phi(x),   gelu'(x) = Phi(x) + x phi(x)            phi, Phi: the normal density, its integral
    tanh:   gelu(x) = x s(x),     gelu'(x) = s(x) + x s'(x),   s(x) = sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
    bias:   y = gelu(x + bias),   dx = dy gelu'(x + bias),   dbias = sum over rows of dx

Saved for backward: x, from which everything is cheap to compute again. Bytes an element: forward reads x and writes y,
backward reads dy and x and writes dx; 4 and 6 of them in bfloat16. An H100's memory brings 4 bytes in the time of some
38 instructions, so the functions have to be cheap. Phi and s are alike, symmetric and falling fast: with a = |x|,

    Phi(-a) = 2^P(a),   s(-a) = 2^Q(a),   their values at a are 1 less these

where P and Q, of degree 10 and 11, are minimax fits of the logarithms on [0, 6], the error weighted by max(2^P, 1e-4).
The fits are off by 1.5e-9 and 1.3e-8, less than a float32 rounding of Phi; down the tail the relative error stays below
2e-5 and 2e-4, where 1 + erf(x / sqrt(2)) has lost all its digits. Past 6 they fall on, and gelu goes to its limits, 0
and x: there is a value at both infinities. NaN stays NaN.

dbias is summed in registers by a fixed number of programs, each taking every P-th tile of rows, then over the P partial
rows: no atomics, the same bits every run. Occupancy: at 32 registers a thread (64 where dbias is summed), 8 (4)
programs of 256 threads are on a multiprocessor at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Device, Launch, check, custom_op, device_of, packed, rows, run

FORMS = ("erf", "tanh")


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
    bias_ptr,  # (C,) or None
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
    if bias_ptr is not None:
        x += tl.load(bias_ptr + o_col, mask=o_col < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row64 * C + o_col[None, :], gelu_of(x, TANH).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_bwd_kernel(
    dy_ptr,  # (M, C)
    x_ptr,  # (M, C)
    bias_ptr,  # (C,) or None
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
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(tiles_per_program):
        o_row = (i * groups + group) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (o_row < M)[:, None] & m_col[None, :]
        row64 = o_row.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + row64 * dy_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row64 * x_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += bias
        dx = dy * gelu_slope_of(x, TANH)
        tl.store(dx_ptr + row64 * C + o_col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += dx  # nought where masked: dy is
    if dbias_ptr is not None:
        tl.store(dbias_ptr + group * C + o_col, tl.sum(dbias, axis=0), mask=m_col)


def _tiles(M: int, C: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, row tiles, column tiles): 8 elements a thread of 8 warps, 128 bits of 2-byte elements."""
    BLOCK_N = min(256, max(16, triton.next_power_of_2(C)))
    BLOCK_M = 2048 // BLOCK_N
    return BLOCK_M, BLOCK_N, triton.cdiv(M, BLOCK_M), triton.cdiv(C, BLOCK_N)


def plan_forward(device: Device, x: Tensor, bias: Tensor | None, approximate: str, y: Tensor) -> list[Launch]:
    """x (M, C) with unit last stride; y (M, C) is written, and may be x."""
    M, C = x.shape
    BLOCK_M, BLOCK_N, row_tiles, column_tiles = _tiles(M, C)
    args = dict(x_ptr=x, bias_ptr=bias, y_ptr=y, x_stride=x.stride(0), M=M, C=C, column_tiles=column_tiles)
    constants = dict(TANH=approximate == "tanh", BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return [Launch(gelu_fwd_kernel, (row_tiles * column_tiles,), args, constants, num_warps=8)]


def partial_rows(device: Device, M: int, C: int) -> int:
    """P, the rows of the bias gradient's partial sums: of programs, 4 a multiprocessor, which all run at once."""
    _, _, row_tiles, column_tiles = _tiles(M, C)
    return min(row_tiles, max(1, 4 * device.multiprocessors // column_tiles))


def plan_backward(
    device: Device,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    approximate: str,
    dx: Tensor,
    dbias: Tensor | None,
) -> list[Launch]:
    """dy, x (M, C) with unit last stride; dx (M, C) and, where wanted, dbias (P, C) are written."""
    M, C = x.shape
    BLOCK_M, BLOCK_N, row_tiles, column_tiles = _tiles(M, C)
    groups = row_tiles if dbias is None else dbias.shape[0]
    args = dict(
        dy_ptr=dy, x_ptr=x, bias_ptr=bias, dx_ptr=dx, dbias_ptr=dbias, dy_stride=dy.stride(0), x_stride=x.stride(0),
        M=M, C=C, column_tiles=column_tiles, tiles_per_program=triton.cdiv(row_tiles, max(groups, 1)),
    )  # fmt: skip
    constants = dict(TANH=approximate == "tanh", BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return [Launch(gelu_bwd_kernel, (groups * column_tiles,), args, constants, num_warps=8)]


@custom_op("nanofuse::gelu")
def _forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """x (M, C) of any strides."""
    x, y = rows(x), x.new_empty(x.shape)
    run(x, *plan_forward(device_of(x), x, packed(bias), approximate, y))
    return y


@_forward.register_fake
def _(x, bias, approximate):
    return x.new_empty(x.shape)


@custom_op("nanofuse::gelu_backward")
def gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, wants_dbias: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dbias) of dy, x (M, C) of any strides; dbias (C,) in x's dtype, empty unless wanted.

    dbias is the sum of dx over the rows, which is also the gradient of a bias that x already holds.
    """
    dy, x, dx = rows(dy), rows(x), x.new_empty(x.shape)
    (M, C), device = x.shape, device_of(x)
    partial = x.new_empty(partial_rows(device, M, C), C, dtype=torch.float32) if wants_dbias else None
    run(x, *plan_backward(device, dy, x, packed(bias), approximate, dx, partial))
    return dx, x.new_empty(0) if partial is None else partial.sum(0).to(x.dtype)


@gelu_backward.register_fake
def _(dy, x, bias, approximate, wants_dbias):
    return x.new_empty(x.shape), x.new_empty(x.shape[1] if wants_dbias else 0)


def _save(ctx, inputs, output):
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = gelu_backward(dy, x, bias, ctx.approximate, ctx.needs_input_grad[1])
    return dx, dbias if ctx.needs_input_grad[1] else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def check_form(approximate: str) -> None:
    if approximate not in FORMS:
        raise ValueError(f"approximate: got {approximate!r}, expected 'erf' or 'tanh'")


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU of every element; the meaning of `reference.gelu`.

    x (..., C): float32, bfloat16 or float16; approximate: "erf" or "tanh". Returns (..., C) in x's dtype. ValueError
    for what cannot be served.
    """
    return bias_gelu(x, None, approximate)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias); the meaning of `reference.bias_gelu`.

    x (..., C) and bias (C,) or None: float32, bfloat16 or float16, of one dtype; approximate: "erf" or "tanh". Returns
    (..., C) in x's dtype. ValueError for what cannot be served.
    """
    check_form(approximate)
    check("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., C) with C of 1 or more")
    if bias is not None:
        check("bias", bias, shape=x.shape[-1:], dtypes=(x.dtype,), device=x.device)
    return _forward(x.reshape(-1, x.shape[-1]), bias, approximate).view(x.shape)
