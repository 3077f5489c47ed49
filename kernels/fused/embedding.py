"""The start of the residual stream: token plus position embedding and dropout, one pass.

    x[b, t] = keep * (wte[idx[b, t]] + wpe[t]) / (1 - p)

Backward, with g = keep * dx / (1 - p): dwte[v] = sum of g over the rows that hold token v, dwpe[t] = sum of g over b.
Saved: the tokens and the dropout seed; the mask is drawn again.

Both sums are taken in float32 in an order that the tokens alone decide: no atomics, the same bits every run. The rows
are sorted by token (stably), so that a token's rows are one segment. One program per vocabulary row would do, if tokens
were spread evenly; but one letter in six is a space: 2,500 rows for one program, an estimated 150 us. So the
sorted rows are cut at every 32nd, a first kernel sums each piece that holds one token only, and the program of a token
adds those sums to what is left of its segment at both ends: at most 62 rows and one partial sum for each 32.

Bytes, C wide, M = B * T rows: forward reads 2 and writes 1 row of C for each of M (the position rows come out of the
cache). Backward reads M rows for dwte and again for dwpe, and writes V + T; what is summed in pieces costs another 8 in
128 of float32. A row whose token is not one of 0 … V - 1 reads nothing and comes out as NaN: a kernel cannot raise, and
a loss that is NaN at once is better than one that is a little wrong.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.dropout import dropout_args, keep_mask, new_seed
from kernels.launch import Launch, check, check_dtype, custom_op, rows, run

MAX_WIDTH = 8192  # a row is held in one block's registers
PIECE = 32  # sorted rows that are summed in advance where they hold one token


@triton.jit
def embedding_fwd_kernel(
    idx_ptr,  # (M,) int64 or int32
    wte_ptr,  # (V, C)
    wpe_ptr,  # (T, C)
    seed_ptr,  # (1,) int64, or None: nothing is dropped
    x_ptr,  # out (M, C)
    wte_stride,
    wpe_stride,
    M,
    T,
    V,
    C,
    threshold,
    scale,  # 1 / (1 - p)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    m_row = o_row < M
    token = tl.load(idx_ptr + o_row, mask=m_row, other=-1).to(tl.int64)
    known = (token >= 0) & (token < V)
    mask = m_row[:, None] & (o_col < C)[None, :]
    m_known = mask & known[:, None]
    position = (o_row % T).to(tl.int64)
    wte = tl.load(wte_ptr + token[:, None] * wte_stride + o_col[None, :], mask=m_known, other=float("nan"))
    wpe = tl.load(wpe_ptr + position[:, None] * wpe_stride + o_col[None, :], mask=m_known, other=0.0)
    x = wte.to(tl.float32) + wpe.to(tl.float32)
    if seed_ptr is not None:
        kept = keep_mask(tl.load(seed_ptr), o_row, threshold, BLOCK_N)
        x = tl.where(kept, x * scale, 0.0)
    row64 = o_row.to(tl.int64)[:, None]
    tl.store(x_ptr + row64 * C + o_col[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(dx_ptr, seed_ptr, o_row, m_row, dx_stride, C, threshold, scale, BLOCK_N: tl.constexpr):
    """g of rows o_row (BLOCK_M,), 0 where m_row is false: (BLOCK_M, BLOCK_N) float32."""
    o_col = tl.arange(0, BLOCK_N)
    mask = m_row[:, None] & (o_col < C)[None, :]
    offset = o_row.to(tl.int64)[:, None] * dx_stride + o_col[None, :]
    g = tl.load(dx_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        g = tl.where(keep_mask(tl.load(seed_ptr), o_row.to(tl.int32), threshold, BLOCK_N), g * scale, 0.0)
    return g


@triton.jit
def _sum_sorted(
    dx_ptr,
    order_ptr,
    seed_ptr,
    first,
    count,
    head,
    gap,
    dx_stride,
    C,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """g summed over `count` sorted rows from `first` on, of which all after `head` lie `gap` further on.

    (BLOCK_M, BLOCK_N) float32, of which every row is a part of the sum.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    done = 0
    while done < count:
        o_summed = done + tl.arange(0, BLOCK_M)
        m_row = o_summed < count
        o_sorted = first + o_summed + tl.where(o_summed < head, 0, gap)
        o_row = tl.load(order_ptr + o_sorted, mask=m_row, other=0)
        total += _gradient(dx_ptr, seed_ptr, o_row, m_row, dx_stride, C, threshold, scale, BLOCK_N)
        done += BLOCK_M
    return total


@triton.jit
def embedding_bwd_pieces_kernel(
    dx_ptr,  # (M, C)
    tokens_ptr,  # (M,), sorted
    order_ptr,  # (M,) int64: the row that each came from
    seed_ptr,  # (1,) int64, or None
    pieces_ptr,  # out (M // PIECE, C) float32: the sum of every piece of one token; the others stay unwritten
    dx_stride,
    C,
    threshold,
    scale,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    first = pid * PIECE
    if tl.load(tokens_ptr + first) == tl.load(tokens_ptr + first + PIECE - 1):
        total = _sum_sorted(
            dx_ptr, order_ptr, seed_ptr, first, PIECE, PIECE, 0, dx_stride, C, threshold, scale, BLOCK_M, BLOCK_N
        )
        o_col = tl.arange(0, BLOCK_N)
        tl.store(pieces_ptr + pid.to(tl.int64) * C + o_col, tl.sum(total, axis=0), mask=o_col < C)


@triton.jit
def embedding_bwd_wte_kernel(
    dx_ptr,  # (M, C)
    starts_ptr,  # (V + 1,) int32: where each token's segment begins in the sorted order
    order_ptr,  # (M,) int64
    seed_ptr,  # (1,) int64, or None
    pieces_ptr,  # (M // PIECE, C) float32
    dwte_ptr,  # out (V, C)
    dx_stride,
    C,
    threshold,
    scale,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first, end = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
    first_piece = (first + PIECE - 1) // PIECE
    end_piece = tl.maximum(end // PIECE, first_piece)
    gap = (end_piece - first_piece) * PIECE  # rows summed already
    total = _sum_sorted(
        dx_ptr, order_ptr, seed_ptr, first, end - first - gap, first_piece * PIECE - first, gap,
        dx_stride, C, threshold, scale, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    o_col = tl.arange(0, BLOCK_N)
    while first_piece < end_piece:
        o_piece = first_piece + tl.arange(0, BLOCK_M)
        mask = (o_piece < end_piece)[:, None] & (o_col < C)[None, :]
        total += tl.load(pieces_ptr + o_piece.to(tl.int64)[:, None] * C + o_col[None, :], mask=mask, other=0.0)
        first_piece += BLOCK_M
    dwte = tl.sum(total, axis=0).to(dwte_ptr.dtype.element_ty)
    tl.store(dwte_ptr + token * C + o_col, dwte, mask=o_col < C)


@triton.jit
def embedding_bwd_wpe_kernel(
    dx_ptr,  # (M, C)
    seed_ptr,  # (1,) int64, or None
    dwpe_ptr,  # out (T, C)
    dx_stride,
    B,
    T,
    C,
    threshold,
    scale,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    position = tl.program_id(0)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(tiles):
        o_sequence = i * BLOCK_M + tl.arange(0, BLOCK_M)
        o_row = o_sequence * T + position
        total += _gradient(dx_ptr, seed_ptr, o_row, o_sequence < B, dx_stride, C, threshold, scale, BLOCK_N)
    o_col = tl.arange(0, BLOCK_N)
    dwpe = tl.sum(total, axis=0).to(dwpe_ptr.dtype.element_ty)
    tl.store(dwpe_ptr + position.to(tl.int64) * C + o_col, dwpe, mask=o_col < C)


def _block(C: int, elements: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps): whole rows, so many elements a thread, more warps where rows are wide.

    Rows whose stride is no multiple of 16 are read element by element, with an address each: 8 at once, or registers
    spill.
    """
    elements = elements if C % 16 == 0 else 8
    BLOCK_N = max(16, triton.next_power_of_2(C))
    num_warps = min(16, max(4, BLOCK_N // 256))
    return max(1, elements * 32 * num_warps // BLOCK_N), BLOCK_N, num_warps


def sort_by_token(idx: Tensor, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """idx (M,) sorted, the rows that its elements came from, and where each token's segment starts, (V + 1,)."""
    narrow = torch.int16 if V < 2**15 else torch.int32  # a radix sort passes over the keys once a byte
    tokens, order = torch.sort(idx.to(narrow), stable=True)
    starts = torch.searchsorted(tokens, torch.arange(V + 1, dtype=narrow, device=idx.device), out_int32=True)
    return tokens, order, starts


@custom_op("nanofuse::embedding")
def _embedding(idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype, seed: Tensor | None, p: float) -> Tensor:
    """x (M, C) of idx (M,); wte (V, C) and wpe (T, C) with unit last stride."""
    x = wte.new_empty(len(idx), wte.shape[1], dtype=dtype)
    M, C = x.shape
    BLOCK_M, BLOCK_N, num_warps = _block(C, 16)
    args = dict(
        idx_ptr=idx, wte_ptr=wte, wpe_ptr=wpe, x_ptr=x, wte_stride=wte.stride(0), wpe_stride=wpe.stride(0),
        M=M, T=wpe.shape[0], V=wte.shape[0], C=C, **dropout_args(seed, p),
    )  # fmt: skip
    constants = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    run(wte, Launch(embedding_fwd_kernel, (triton.cdiv(M, BLOCK_M),), args, constants, num_warps))
    return x


@custom_op("nanofuse::embedding_backward")
def _embedding_backward(
    dx: Tensor,
    idx: Tensor,
    seed: Tensor | None,
    p: float,
    V: int,
    T: int,
    dtype: torch.dtype,
    need_dwte: bool,
    need_dwpe: bool,
) -> tuple[Tensor, Tensor]:
    """(dwte (V, C), dwpe (T, C)) of dx (M, C) with unit last stride and idx (M,); each empty unless needed."""
    M, C = dx.shape
    dwte, dwpe = (dx.new_empty(n if needed else 0, C, dtype=dtype) for n, needed in ((V, need_dwte), (T, need_dwpe)))
    BLOCK_M, BLOCK_N, num_warps = _block(C, 32)
    args = dict(dx_ptr=dx, dx_stride=dx.stride(0), C=C, **dropout_args(seed, p))
    constants = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    if need_dwte:
        tokens, order, starts = sort_by_token(idx, V)
        pieces = dx.new_empty(M // PIECE, C, dtype=torch.float32)
        sums, sorts = args | dict(order_ptr=order, pieces_ptr=pieces), constants | dict(PIECE=PIECE)
        run(
            dx,
            Launch(embedding_bwd_pieces_kernel, (len(pieces),), sums | dict(tokens_ptr=tokens), sorts, num_warps),
            Launch(embedding_bwd_wte_kernel, (V,), sums | dict(starts_ptr=starts, dwte_ptr=dwte), sorts, num_warps),
        )
    if need_dwpe:
        B = M // max(T, 1)
        args |= dict(dwpe_ptr=dwpe, B=B, T=T, tiles=triton.cdiv(B, BLOCK_M))
        run(dx, Launch(embedding_bwd_wpe_kernel, (T,), args, constants, num_warps))
    return dwte, dwpe


def _save_embedding(ctx, inputs, output):
    idx, wte, wpe, _, seed, p = inputs
    ctx.save_for_backward(idx, seed)
    ctx.numbers = p, len(wte), len(wpe), wte.dtype


def _differentiate_embedding(ctx, dx):
    _, need_dwte, need_dwpe, *_ = ctx.needs_input_grad
    dwte, dwpe = _embedding_backward(rows(dx), *ctx.saved_tensors, *ctx.numbers, need_dwte, need_dwpe)
    return None, dwte if need_dwte else None, dwpe if need_dwpe else None, None, None, None


_embedding.register_autograd(_differentiate_embedding, setup_context=_save_embedding)


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype, p: float = 0.0) -> Tensor:
    """Token plus position embedding, then dropout; the meaning of `reference.embedding`.

    idx (B, T) int64 or int32, wte (V, C), wpe (T, C), both float32, bfloat16 or float16, C up to 8192; 0 <= p < 1.
    Returns (B, T, C) in `dtype`, NaN where idx is not one of 0 … V - 1. The mask's seed is drawn from torch's
    generator of wte's device. ValueError for what cannot be served.
    """
    check("wte", wte, shape=(None, None))
    check("idx", idx, shape=(None, None), dtypes=(torch.int64, torch.int32), device=wte.device)
    (B, T), C = idx.shape, wte.shape[1]
    if not 1 <= C <= MAX_WIDTH:
        raise ValueError(f"wte: got {C} channels, expected 1 to {MAX_WIDTH}")
    check("wpe", wpe, shape=(T, C), dtypes=(wte.dtype,), device=wte.device)
    check_dtype("dtype", dtype)
    x = _embedding(idx.reshape(-1), rows(wte), rows(wpe), dtype, new_seed(wte, p), p)
    return x.view(B, T, C)
