"""LayerNorm, alone and fused with the dropout and the residual addition before it.

    residual' = residual + keep * x / (1 - p)                       (add_layer_norm; without x, residual' = residual)
    xhat = (residual' - mean) * rstd,   y = xhat * weight + bias     statistics over the last dimension, C wide

Backward, with g = dy * weight and the stream's own gradient dresidual' (Ba et al. 2016, arXiv:1607.06450):

    dresidual = dresidual' + rstd * (g - mean(g) - xhat * mean(g * xhat)),   dx = keep * dresidual / (1 - p)
    dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy

Saved for it: residual', which exists anyway as the stream, and mean and rstd, 8 bytes a row. The mask is drawn again.

Bytes with a float32 stream and bfloat16 x and y: forward reads x and residual (6 bytes an element) and writes residual'
and y (6). Backward reads dy, dresidual' and residual' (10) and writes dresidual and dx (6). weight and bias come out of
the cache. Both kernels are bound by memory. A multiprocessor should hold 32 warps of the forward kernel, and 12 of the
backward kernel, which keeps its sums over rows in registers.

A fixed number of programs P makes those sums. Each takes every P-th tile of rows and writes one partial row, and the P
partial rows are summed afterwards. There are no atomics, so every run gives the same bits. The second sum takes
microseconds, but GPT-2 has 25 LayerNorms. So a caller can keep the partial rows of all of them in one buffer
(`partial_rows` is their number), and one launch sums them all (`sum_partials`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.dropout import dropout_args, keep_mask, seed_for
from kernels.launch import Launch, check, check_dtype, custom_op, device_of, packed, refusal, rows, run
from kernels.reference import LAYER_NORM_EPS, Grads

MAX_WIDTH = 4096  # a row is held in one block's registers


@triton.jit
def add_layer_norm_fwd_kernel(
    x_ptr,  # (M, C), None: nothing is added
    residual_ptr,  # (M, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    seed_ptr,  # int64, or None: nothing is dropped
    stream_ptr,  # out: residual' (M, C), or None
    y_ptr,  # out (M, C)
    mean_ptr,  # out (M,)
    rstd_ptr,  # out (M,)
    x_stride,
    residual_stride,
    M,
    C,
    inv_C,  # 1 / C: a division costs a slow path
    threshold,
    scale,  # 1 / (1 - p)
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    m_col = o_col < C
    mask = (o_row < M)[:, None] & m_col[None, :]
    row64 = o_row.to(tl.int64)[:, None]
    r = tl.load(residual_ptr + row64 * residual_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
    if x_ptr is not None:
        x = tl.load(x_ptr + row64 * x_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            x = tl.where(keep_mask(tl.load(seed_ptr), o_row, threshold, BLOCK_N), x * scale, 0.0)
        r += x
    if stream_ptr is not None:
        stream = r.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + row64 * C + o_col[None, :], stream, mask=mask)
        r = stream.to(tl.float32)  # what is normalised is what the stream holds, rounded
    mean = tl.sum(r, axis=1) * inv_C
    centred = tl.where(mask, r - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) * inv_C + eps)
    weight = tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row64 * C + o_col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + o_row, mean, mask=o_row < M)
    tl.store(rstd_ptr + o_row, rstd, mask=o_row < M)


@triton.jit
def add_layer_norm_bwd_kernel(
    dy_ptr,  # (M, C)
    dstream_ptr,  # (M, C), None: residual' has no gradient of its own
    stream_ptr,  # (M, C): residual'
    weight_ptr,  # (C,)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    seed_ptr,  # int64, or None
    dresidual_ptr,  # out (M, C)
    dx_ptr,  # out (M, C); None if it equals dresidual
    dweight_ptr,  # out (P, C) float32: each program's sum over its rows
    dbias_ptr,  # out (P, C) float32, or None
    dy_stride,
    dstream_stride,
    stream_stride,
    M,
    C,
    inv_C,
    threshold,
    scale,
    tiles_per_program,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    o_col = tl.arange(0, BLOCK_N)
    m_col = o_col < C
    weight = tl.load(weight_ptr + o_col, mask=m_col, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(tiles_per_program):
        o_row = (i * tl.num_programs(0) + pid) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_row = o_row < M
        mask = m_row[:, None] & m_col[None, :]
        row64 = o_row.to(tl.int64)[:, None]
        stream = tl.load(stream_ptr + row64 * stream_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row64 * dy_stride + o_col[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + o_row, mask=m_row, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + o_row, mask=m_row, other=0.0)[:, None]
        xhat = tl.where(mask, (stream - mean) * rstd, 0.0)
        dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        g = dy * weight[None, :]
        mean_g = tl.sum(g, axis=1)[:, None] * inv_C
        mean_gx = tl.sum(g * xhat, axis=1)[:, None] * inv_C
        dresidual = rstd * (g - mean_g - xhat * mean_gx)
        if dstream_ptr is not None:
            offset = row64 * dstream_stride + o_col[None, :]
            dresidual += tl.load(dstream_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        out = row64 * C + o_col[None, :]
        tl.store(dresidual_ptr + out, dresidual.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            dx = dresidual
            if seed_ptr is not None:
                dx = tl.where(keep_mask(tl.load(seed_ptr), o_row, threshold, BLOCK_N), dx * scale, 0.0)
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + pid * C + o_col, tl.sum(dweight, axis=0), mask=m_col)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid * C + o_col, tl.sum(dbias, axis=0), mask=m_col)


@triton.jit
def sum_partials_kernel(
    partials_ptr,  # (L, P, C) float32
    offsets_ptr,  # (L,) int64: where in out each sum begins
    out_ptr,
    P,
    C,
    column_tiles,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    layer = (tl.program_id(0) // column_tiles).to(tl.int64)
    o_col = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_col = o_col < C
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, P, BLOCK_M):
        o_row = start + tl.arange(0, BLOCK_M)
        mask = (o_row < P)[:, None] & m_col[None, :]
        total += tl.load(partials_ptr + (layer * P + o_row)[:, None] * C + o_col[None, :], mask=mask, other=0.0)
    gradient = tl.sum(total, axis=0)
    out = out_ptr + tl.load(offsets_ptr + layer) + o_col
    if ACCUMULATE:
        gradient += tl.load(out, mask=m_col, other=0.0).to(tl.float32)
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=m_col)


def _block(C: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps): 16 elements a thread up to 1024 wide, so that 128-bit accesses of 2-byte elements
    stay whole; wider rows get more warps, then more elements a thread."""
    BLOCK_N = max(16, triton.next_power_of_2(C))
    num_warps = min(8, max(4, BLOCK_N // 512))
    return max(1, 16 * 32 * num_warps // BLOCK_N), BLOCK_N, num_warps


def partial_rows(C: int, device: torch.device) -> int:
    """As many programs of the backward kernel as run at once, so that none is left over for a second round: registers
    decide how many fit. Each writes one partial row of dweight, C wide."""
    _, BLOCK_N, _ = _block(C)
    return (4 if BLOCK_N < 2048 else 3 if BLOCK_N == 2048 else 1) * device_of(device).multiprocessors


@custom_op("nanofuse::add_layer_norm")
def _add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    dtype: torch.dtype,
    returns_stream: bool,
    partials: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual', y, mean, rstd) of x, residual (..., C). residual' is empty unless it is asked for; with x it must be.

    partials: only for the backward pass.
    """
    stream = residual.new_empty(residual.shape if returns_stream else 0)
    y = residual.new_empty(residual.shape, dtype=dtype)
    x, residual = None if x is None else rows(x), rows(residual)
    M, C = residual.shape
    mean, rstd = (residual.new_empty(M, dtype=torch.float32) for _ in range(2))
    BLOCK_M, BLOCK_N, num_warps = _block(C)
    args = dict(
        x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias, **dropout_args(seed, p),
        stream_ptr=stream if returns_stream else None, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
        x_stride=0 if x is None else x.stride(0), residual_stride=residual.stride(0),
        M=M, C=C, inv_C=1 / C, eps=LAYER_NORM_EPS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    run(residual, Launch(add_layer_norm_fwd_kernel, (triton.cdiv(M, BLOCK_M),), args, num_warps))
    return stream, y, mean, rstd


@custom_op("nanofuse::add_layer_norm_backward", mutates_args=("partials",))
def _add_layer_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    dx_dtype: torch.dtype | None,
    has_bias: bool,
    partials: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dresidual, dx, the gradients of weight and bias) of dy, dstream, stream (..., C).

    dx is empty if dx_dtype is None. partials (1 or with a bias 2, P, C) float32: what gets the partial rows of all P
    programs; then the last result is empty. If it is empty (torch 2.11 takes no None for what is written to), as many
    programs run as have work and fit, and the rows are summed: (1 or with a bias 2, C).
    """
    dresidual, dx = stream.new_empty(stream.shape), dy.new_empty(dy.shape if dx_dtype else 0, dtype=dx_dtype)
    dy, stream, dstream = rows(dy), rows(stream), None if dstream is None else rows(dstream)
    M, C = dy.shape
    BLOCK_M, BLOCK_N, num_warps = _block(C)
    tiles, given = triton.cdiv(M, BLOCK_M), partials.numel() > 0
    if not given:
        partials = dy.new_empty(1 + has_bias, min(tiles, partial_rows(C, dy.device)), C, dtype=torch.float32)
    (_, P, _), (dweight, *dbias) = partials.shape, partials
    args = dict(
        dy_ptr=dy, dstream_ptr=dstream, stream_ptr=stream, weight_ptr=weight, mean_ptr=mean, rstd_ptr=rstd,
        **dropout_args(seed, p), dresidual_ptr=dresidual, dx_ptr=dx if dx_dtype else None,
        dweight_ptr=dweight, dbias_ptr=dbias[0] if has_bias else None,
        dy_stride=dy.stride(0), dstream_stride=0 if dstream is None else dstream.stride(0),
        stream_stride=stream.stride(0), M=M, C=C, inv_C=1 / C, tiles_per_program=triton.cdiv(tiles, max(P, 1)),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    run(dy, Launch(add_layer_norm_bwd_kernel, (P,), args, num_warps))
    return dresidual, dx, weight.new_empty(0) if given else partials.sum(1).to(weight.dtype)


def _save_add_layer_norm(ctx, inputs, output):
    x, residual, weight, bias, seed, p, _, ctx.returns_stream, partials = inputs
    stream, _, mean, rstd = output
    ctx.set_materialize_grads(False)  # the last residual' is used by nobody: no zeros are made up for it, nor read
    ctx.save_for_backward(stream if ctx.returns_stream else residual, weight, mean, rstd, seed, partials)
    ctx.p, ctx.x_dtype, ctx.has_bias = p, None if x is None else x.dtype, bias is not None


def _differentiate_add_layer_norm(ctx, dstream, dy, dmean, drstd):
    stream, weight, mean, rstd, seed, partials = ctx.saved_tensors
    dy = torch.zeros_like(stream) if dy is None else dy
    dstream = dstream if ctx.returns_stream else None
    same = ctx.x_dtype == stream.dtype and seed is None  # then dx is dresidual: written once
    dx_dtype = None if same else ctx.x_dtype
    into = dy.new_empty(0, dtype=torch.float32) if partials is None else partials
    dresidual, dx, sums = _add_layer_norm_backward(
        dy, dstream, stream, weight, mean, rstd, seed, ctx.p, dx_dtype, ctx.has_bias, into
    )
    dx = None if ctx.x_dtype is None else dresidual if same else dx
    dweight, dbias = (*sums, None, None)[:2]
    return dx, dresidual, dweight, dbias, *(None,) * 5


_add_layer_norm.register_autograd(_differentiate_add_layer_norm, setup_context=_save_add_layer_norm)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """ValueError unless LayerNorm can take x (..., C), which the caller calls so."""
    check(name, x, (*x.shape[:-1], "C > 0"))
    C = x.shape[-1]
    if C > MAX_WIDTH:
        raise refusal(name, f"{C} channels", f"1 to {MAX_WIDTH}")
    check("weight", weight, (C,), on=x)
    check("bias", bias, (C,), weight.dtype, on=x)
    check_dtype("dtype", dtype)


@custom_op("nanofuse::sum_partials", mutates_args=("out",))
def sum_partials(partials: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """out[offsets[i] : offsets[i] + C] = sum of partials[i]'s rows, or += it, for every i, in one launch.

    partials (L, P, C) float32, offsets (L,) int64, out (n,) float32, bfloat16 or float16.
    """
    L, P, C = partials.shape
    BLOCK_M, BLOCK_N = 32, 64
    column_tiles = triton.cdiv(C, BLOCK_N)
    args = dict(
        partials_ptr=partials, offsets_ptr=offsets, out_ptr=out, P=P, C=C, column_tiles=column_tiles,
        ACCUMULATE=accumulate, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    run(out, Launch(sum_partials_kernel, (L * column_tiles,), args))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension; the meaning of `reference.layer_norm`.

    x (..., C), C up to 4096, weight and bias (C,): float32, bfloat16 or float16. Returns y (..., C) in `dtype`.
    ValueError for what cannot be served.
    """
    _check("x", x, weight, bias, dtype)
    return _add_layer_norm(None, x, weight.contiguous(), packed(bias), None, 0.0, dtype, False)[1]


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    p: float = 0.0,
    seed: Tensor | None = None,
    grads: Grads | None = None,
) -> tuple[Tensor, Tensor]:
    """residual' = residual + dropout(x) and y = LayerNorm(residual'); the meaning of `reference.add_layer_norm`.

    x and residual (..., C), C up to 4096, weight and bias (C,): float32, bfloat16 or float16; 0 <= p < 1. Returns
    residual' in residual's dtype and y in `dtype`. seed: one of `seeds`, for the mask; None: drawn here, from torch's
    generator of x's device. grads: its weight, (1 or with a bias 2, P, C) float32, gets the partial rows of dweight and
    dbias, for `sum_partials`; None: the gradients are autograd's. ValueError for what cannot be served.

    Without x, residual' is a copy of residual. So its gradient comes here, and the kernel adds it to LayerNorm's. If
    both uses read one tensor, autograd would add the two gradients, which moves more bytes than the copy.
    """
    _check("residual", residual, weight, bias, dtype)
    check("x", x, residual.shape, on=residual)
    seed = None if x is None else seed_for(x, p, seed)
    partials = None if grads is None else grads.weight
    new_stream = x is not None or (torch.is_grad_enabled() and residual.requires_grad)
    stream, y, _, _ = _add_layer_norm(
        x, residual, weight.contiguous(), packed(bias), seed, p, dtype, new_stream, partials
    )
    return stream if new_stream else residual, y
