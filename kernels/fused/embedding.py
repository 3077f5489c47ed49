"""The start of the residual stream: token plus position embedding and dropout, in one pass.

    x[b, t] = keep * (wte[idx[b, t]] + wpe[t]) / (1 - p)

Backward, with g = keep * dx / (1 - p): dwte[v] = sum of g over the rows that hold token v, dwpe[t] = sum of g over b.
Saved: the tokens, in a dtype that sorts fast, and the dropout seed. The mask is drawn again.

Both sums are float32, in an order that only the tokens decide. There are no atomics, so every run gives the same bits.
The rows are sorted by token, stably, so that a token's rows are neighbours: a segment. The program of a segment's first
row adds the segment's sum to dwte. The other rows' programs end at once, and tokens that do not occur cost nothing.

But one letter in six is a space: 2,500 rows for one program, an estimated 150 us. So the sorted rows are cut into
pieces of 32. A first kernel sums each piece that holds only one token. The segment's program adds these sums to the
rows that are left at its two ends: at most 62 rows, and one sum for each 32.

Bytes, C wide, M = B * T rows: forward reads 2 rows of C and writes 1 for each of M (the position rows come out of the
cache). Backward reads M rows for dwte and again for dwpe, reads and writes a row of dwte for each token that occurs,
and writes T rows of dwpe. What is summed in pieces costs another 8 in 128 of float32. A row whose token is not one of
0 … V - 1 reads nothing and becomes NaN. A kernel cannot raise an error, and a loss that is NaN at once is better than
one that is a little wrong.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.dropout import dropout_args, keep_mask, seed_for
from kernels.launch import Launch, check, check_dtype, custom_op, refusal, rows, run
from kernels.reference import Grads

MAX_WIDTH = 8192  # a row is held in one block's registers
PIECE = 32  # sorted rows that are summed in advance where they hold one token


@triton.jit
def embedding_fwd_kernel(
    idx_ptr,  # (M,) int64 or int32
    wte_ptr,  # (V, C)
    wpe_ptr,  # (T, C)
    seed_ptr,  # int64, or None: nothing is dropped
    x_ptr,  # out (M, C)
    tokens_ptr,  # out (M,): idx in a narrower dtype, -1 where it is not known; or None
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
    if tokens_ptr is not None:
        tl.store(tokens_ptr + o_row, tl.where(known, token, -1).to(tokens_ptr.dtype.element_ty), mask=m_row)


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
    seed_ptr,  # int64, or None
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
    tokens_ptr,  # (M,), sorted
    order_ptr,  # (M,) int64
    seed_ptr,  # int64, or None
    pieces_ptr,  # (M // PIECE, C) float32
    dwte_ptr,  # in and out (V, C): the rows of the tokens that occur are added to
    dx_stride,
    M,
    V,
    C,
    threshold,
    scale,
    PIECE: tl.constexpr,
    SCAN: tl.constexpr,  # pieces that are looked at together
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0)
    token = tl.load(tokens_ptr + first).to(tl.int64)
    before = tl.load(tokens_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (token != before) & (token >= 0) & (token < V):  # a segment begins here
        first_piece = (first + PIECE - 1) // PIECE
        end_piece = first_piece
        found = SCAN
        while found == SCAN:  # pieces of this token only: their last rows tell
            o_piece = end_piece + tl.arange(0, SCAN)
            last = tl.load(tokens_ptr + o_piece * PIECE + PIECE - 1, mask=o_piece < M // PIECE, other=-1)
            found = tl.sum((last.to(tl.int64) == token).to(tl.int32), axis=0)
            end_piece += found
        gap = (end_piece - first_piece) * PIECE  # rows summed already
        o_near = tl.arange(0, 2 * PIECE)
        o_sorted = first + o_near + tl.where(o_near < first_piece * PIECE - first, 0, gap)
        near = tl.load(tokens_ptr + o_sorted, mask=o_sorted < M, other=-1).to(tl.int64) == token
        count = tl.sum(near.to(tl.int32), axis=0)  # the rest of the segment: less than a piece at either end
        total = _sum_sorted(
            dx_ptr, order_ptr, seed_ptr, first, count, first_piece * PIECE - first, gap,
            dx_stride, C, threshold, scale, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        o_col = tl.arange(0, BLOCK_N)
        while first_piece < end_piece:
            o_piece = first_piece + tl.arange(0, BLOCK_M)
            mask = (o_piece < end_piece)[:, None] & (o_col < C)[None, :]
            total += tl.load(pieces_ptr + o_piece.to(tl.int64)[:, None] * C + o_col[None, :], mask=mask, other=0.0)
            first_piece += BLOCK_M
        out = dwte_ptr + token * C + o_col
        dwte = tl.sum(total, axis=0) + tl.load(out, mask=o_col < C, other=0.0).to(tl.float32)
        tl.store(out, dwte.to(dwte_ptr.dtype.element_ty), mask=o_col < C)


@triton.jit
def embedding_bwd_wpe_kernel(
    dx_ptr,  # (M, C)
    seed_ptr,  # int64, or None
    dwpe_ptr,  # out (T or more, C), the rows after T are 0
    dx_stride,
    B,
    T,
    C,
    threshold,
    scale,
    tiles,
    ACCUMULATE: tl.constexpr,  # add to dwpe
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    position = tl.program_id(0)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(tiles):
        o_sequence = i * BLOCK_M + tl.arange(0, BLOCK_M)
        o_row = o_sequence * T + position
        m_row = (o_sequence < B) & (position < T)
        total += _gradient(dx_ptr, seed_ptr, o_row, m_row, dx_stride, C, threshold, scale, BLOCK_N)
    o_col = tl.arange(0, BLOCK_N)
    dwpe = tl.sum(total, axis=0)
    out = dwpe_ptr + position.to(tl.int64) * C + o_col
    if ACCUMULATE:
        dwpe += tl.load(out, mask=o_col < C, other=0.0).to(tl.float32)
    tl.store(out, dwpe.to(dwpe_ptr.dtype.element_ty), mask=o_col < C)


def _block(C: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps): whole rows, 32 elements a thread, more warps where rows are wide.

    Rows whose stride is no multiple of 16 are read element by element, with an address each: 8 at once, or registers
    spill.
    """
    elements = 32 if C % 16 == 0 else 8
    BLOCK_N = max(16, triton.next_power_of_2(C))
    num_warps = min(16, max(4, BLOCK_N // 256))
    return max(1, elements * 32 * num_warps // BLOCK_N), BLOCK_N, num_warps


@custom_op("nanofuse::embedding")
def _embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    dtype: torch.dtype,
    seed: Tensor | None,
    p: float,
    sorts: bool,
    dwte: Tensor | None = None,
    dwpe: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x, tokens) of idx (M,): x (M, C); wte (V, C) and wpe (T, C) with unit last stride. The last three: only for the
    backward pass. So is tokens (M,), a copy of idx, empty if no gradient will be asked for."""
    x = wte.new_empty(len(idx), wte.shape[1], dtype=dtype)
    narrow = torch.int16 if len(wte) < 2**15 else torch.int32  # a radix sort passes over its keys once a byte
    tokens = wte.new_empty(len(idx) if sorts else 0, dtype=narrow)
    M, C = x.shape
    BLOCK_M, BLOCK_N, num_warps = _block(C)
    args = dict(
        idx_ptr=idx, wte_ptr=wte, wpe_ptr=wpe, x_ptr=x, tokens_ptr=tokens if sorts else None,
        wte_stride=wte.stride(0), wpe_stride=wpe.stride(0),
        M=M, T=wpe.shape[0], V=wte.shape[0], C=C, **dropout_args(seed, p), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    run(wte, Launch(embedding_fwd_kernel, (triton.cdiv(M, BLOCK_M),), args, num_warps))
    return x, tokens


# One operation for each table: torch.compile copies both gradients where one operation changes two views of a buffer.


@custom_op("nanofuse::embedding_dwte", mutates_args=("dwte",))
def _add_dwte(dx: Tensor, tokens: Tensor, seed: Tensor | None, p: float, dwte: Tensor) -> None:
    """Add the gradient of wte to dwte (V, C), packed, of dx (M, C) with unit last stride and tokens (M,)."""
    (M, C), V = dx.shape, len(dwte)
    BLOCK_M, BLOCK_N, num_warps = _block(C)
    tokens, order = torch.sort(tokens, stable=True)
    pieces = dx.new_empty(M // PIECE, C, dtype=torch.float32)
    args = dict(
        dx_ptr=dx, tokens_ptr=tokens, order_ptr=order, pieces_ptr=pieces, dx_stride=dx.stride(0), C=C,
        **dropout_args(seed, p), PIECE=PIECE, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    more = dict(dwte_ptr=dwte, M=M, V=V, SCAN=128)
    run(
        dx,
        Launch(embedding_bwd_pieces_kernel, (len(pieces),), args, num_warps),
        Launch(embedding_bwd_wte_kernel, (M,), args | more, num_warps),
    )


@custom_op("nanofuse::embedding_dwpe", mutates_args=("dwpe",))
def _put_dwpe(dx: Tensor, seed: Tensor | None, p: float, T: int, dwpe: Tensor, accumulate: bool) -> None:
    """Put the gradient of wpe into the first T rows of dwpe, packed, and zeros into its other rows; or add it.
    dx (M, C) with unit last stride."""
    M, C = dx.shape
    BLOCK_M, BLOCK_N, num_warps = _block(C)
    B = M // max(T, 1)
    args = dict(
        dx_ptr=dx, dwpe_ptr=dwpe, dx_stride=dx.stride(0), C=C, B=B, T=T, tiles=triton.cdiv(B, BLOCK_M),
        **dropout_args(seed, p), ACCUMULATE=accumulate, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    run(dx, Launch(embedding_bwd_wpe_kernel, (len(dwpe),), args, num_warps))


def _save_embedding(ctx, inputs, output):
    _, wte, wpe, _, seed, ctx.p, _, ctx.dwte, dwpe, ctx.accumulate = inputs
    ctx.set_materialize_grads(False)  # else zeros are made for the gradient of tokens
    # dwte is not saved as the others are: the head's backward pass writes there first, as it must
    ctx.save_for_backward(output[1], seed, dwpe)
    ctx.tables = wte.shape, wpe.shape, wte.dtype


def _differentiate_embedding(ctx, dx, _):
    tokens, seed, dwpe = ctx.saved_tensors
    wte_shape, wpe_shape, dtype = ctx.tables
    _, need_dwte, need_dwpe, *_ = ctx.needs_input_grad
    dx, T, put = rows(dx), wpe_shape[0], dwpe is not None
    dwte = ctx.dwte if put else dx.new_zeros(wte_shape, dtype=dtype)
    dwpe = dwpe if put else dx.new_empty(wpe_shape, dtype=dtype)
    if need_dwte:
        _add_dwte(dx, tokens, seed, ctx.p, dwte)
    if need_dwpe:
        _put_dwpe(dx, seed, ctx.p, T, dwpe, ctx.accumulate)
    return None, dwte if need_dwte and not put else None, dwpe if need_dwpe and not put else None, *(None,) * 7


_embedding.register_autograd(_differentiate_embedding, setup_context=_save_embedding)


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    dtype: torch.dtype,
    p: float = 0.0,
    seed: Tensor | None = None,
    grads: tuple[Grads, Grads] | None = None,
) -> Tensor:
    """Token plus position embedding, then dropout; the meaning of `reference.embedding`.

    C up to 8192; 0 <= p < 1. NaN where idx, int64 or int32, is not one of 0 … V - 1. seed: as in `add_layer_norm`.
    ValueError for what cannot be served.

    grads: where the gradients are put, wte's (V, C) and wpe's (T or more rows, C). The head shares wte's, and its
    backward pass, which comes first, has written there: wte's is always added to.
    """
    check("wte", wte, (None, "C > 0"))
    check("idx", idx, (None, None), torch.int64, torch.int32, on=wte)
    (B, T), C = idx.shape, wte.shape[1]
    if C > MAX_WIDTH:
        raise refusal("wte", f"{C} channels", f"1 to {MAX_WIDTH}")
    check("wpe", wpe, (T, C), wte.dtype, on=wte)
    check_dtype("dtype", dtype)
    into = (None, None, False) if grads is None else (grads[0].weight, grads[1].weight, grads[1].accumulate)
    sorts = torch.is_grad_enabled() and wte.requires_grad
    idx = idx.reshape(-1).contiguous()  # a column of a table becomes a view with a stride
    x, _ = _embedding(idx, rows(wte), rows(wpe), dtype, seed_for(wte, p, seed), p, sorts, *into)
    return x.view(B, T, C)
