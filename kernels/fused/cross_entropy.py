"""Cross-entropy over the vocabulary, of logits that the caller has. `linear_cross_entropy.py` makes them itself.

    lse = log sum_j exp(x_j),   loss = mean of (lse - x_target) over the rows that count
    dx_j = (exp(x_j - lse) - [j = target]) / (rows that count)

The first pass over a row finds its maximum, its sum and its target's logit. A second pass writes the gradient. Where
both are made in one launch, the second one reads the row out of the caches. `cross_entropy` makes them apart, and saves
the row's statistics in between: the logits are read once for the loss, and read and written once for the gradient.

A row's tile is (LANES, WIDTH). WIDTH neighbours are one 16-byte access of one thread. Every lane keeps its own running
maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867), and lanes meet once, at the end of the row. So a block
of columns needs no barrier, and one exponential for each element and one for each lane.

The statistics are two numbers: the maximum m, and log2 of the sum of exp(x - m). For large logits x - m is exact, and
lse is not. An ignored row is not read. For a target outside the vocabulary nothing is read, and its row's loss and
gradient are NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch, address, check, custom_op, rows, run

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's: a maximum that -inf may join without a NaN


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr,  # (M, columns)
    targets_ptr,  # (M,) int64
    count_ptr,  # () float32: the rows that count
    dloss_ptr,  # () float32: the gradient of the mean loss; or None: that of every row's loss is taken to be 1
    losses_ptr,  # out (M,) float32: the row's part of the mean loss, 0 where ignored; or None: stats_ptr knows the row
    stats_ptr,  # (2, M) float32: top and log2_total; written with the losses, read without them; or None
    dlogits_ptr,  # out (M, columns): the gradient of the row's loss; or None. May be logits_ptr
    logits_stride,
    dlogits_stride,
    M,
    V,
    columns,  # V, and padding: not read as logits, and without a gradient
    ignore_index,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # V < columns
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < M
    target = tl.load(targets_ptr + o_row, mask=m_row, other=ignore_index)
    counted = target != ignore_index
    first = logits_ptr + o_row.to(tl.int64) * logits_stride
    o_col = tl.arange(0, LANES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    row = first[:, None, None] + o_col
    m_read = counted[:, None, None]
    count = tl.load(count_ptr)
    if losses_ptr is None:
        top = tl.load(stats_ptr + o_row, mask=m_row, other=0.0)
        log2_total = tl.load(stats_ptr + M + o_row, mask=m_row, other=0.0)
    else:
        m_target = counted & (target >= 0) & (target < V)
        x_target = tl.load(first + target, mask=m_target, other=float("nan")).to(tl.float32)
        lane_top = tl.full((ROWS, LANES), LOWEST, dtype=tl.float32)
        lane_total = tl.zeros((ROWS, LANES), dtype=tl.float32)
        for start in range(0, columns, LANES * WIDTH):
            x = tl.load(row + start, mask=m_read & (o_col < columns - start), other=float("-inf")).to(tl.float32)
            if PADDED:
                x = tl.where(o_col < V - start, x, float("-inf"))
            new_top = tl.maximum(lane_top, tl.max(x, axis=2))
            total = tl.sum(tl.exp2((x - new_top[:, :, None]) * LOG2E), axis=2)
            lane_total = lane_total * tl.exp2((lane_top - new_top) * LOG2E) + total
            lane_top = new_top
        top = tl.max(lane_top, axis=1)
        log2_total = tl.log2(tl.sum(lane_total * tl.exp2((lane_top - top[:, None]) * LOG2E), axis=1))
        loss = (top - x_target) + LN2 * log2_total
        tl.store(losses_ptr + o_row, tl.where(counted, loss, 0.0) / count, mask=m_row)  # 0 / 0 where nothing counts
        if stats_ptr is not None:
            tl.store(stats_ptr + o_row, top, mask=m_row)
            tl.store(stats_ptr + M + o_row, log2_total, mask=m_row)
    if dlogits_ptr is not None:
        upstream = 1.0
        if dloss_ptr is not None:
            upstream = tl.load(dloss_ptr) / tl.maximum(count, 1.0)
        tl.debug_barrier()  # the gradient may overwrite the target's logit: first, every warp has read it
        known = ~counted | ((target >= 0) & (target < V))
        upstream = tl.where(counted, upstream, 0.0)
        log2_total = tl.where(counted, log2_total, 0.0)[:, None, None]  # -inf there, as is every x: no difference
        miss = tl.where(known, 0.0, float("nan"))[:, None, None]
        hit = tl.where(known, -upstream, float("nan"))[:, None, None]
        upstream = upstream[:, None, None]
        top = top[:, None, None]
        o_target = target.to(tl.int32)[:, None, None]
        out = (dlogits_ptr + o_row.to(tl.int64) * dlogits_stride)[:, None, None] + o_col
        for start in range(0, columns, LANES * WIDTH):
            m_col = o_col < columns - start
            # nobody reads these logits again
            x = tl.load(row + start, mask=m_read & m_col, other=float("-inf"), eviction_policy="evict_first")
            p = tl.exp2((x.to(tl.float32) - top) * LOG2E - log2_total)
            dx = p * upstream + tl.where(o_col == o_target - start, hit, miss)
            if PADDED:
                dx = tl.where(o_col < V - start, dx, 0.0)
            tl.store(out + start, dx.to(dlogits_ptr.dtype.element_ty), mask=m_row[:, None, None] & m_col)


@triton.jit
def count_kernel(targets_ptr, count_ptr, M, ignore_index, BLOCK: tl.constexpr):
    """count () float32: the targets (M,) int64 that are not ignore_index. One program."""
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, M, BLOCK):
        o_row = start + tl.arange(0, BLOCK)
        count += (tl.load(targets_ptr + o_row, mask=o_row < M, other=ignore_index) != ignore_index).to(tl.int32)
    tl.store(count_ptr, tl.sum(count, axis=0).to(tl.float32))


def tile(logits: Tensor) -> tuple[int, int, int, int]:
    """(ROWS, LANES, WIDTH, num_warps) for logits (M, V): 16 elements a thread, 16 bytes of them at a time, if rows are
    aligned; else 8, each a lane of its own, which takes more registers. Narrow rows, of 65 characters, share a program.
    """
    aligned = address(logits) % 16 == 0 and logits.stride(0) % 16 == 0  # what Triton's specialisation sees
    WIDTH, thread = (16 // logits.element_size(), 16) if aligned else (1, 8)
    columns = min(512 * thread, max(16, triton.next_power_of_2(logits.shape[1])))
    ROWS = max(1, 128 * thread // columns)
    return ROWS, columns // WIDTH, WIDTH, ROWS * columns // (32 * thread)


def counted(targets: Tensor, ignore_index: int) -> Tensor:
    """How many of targets (M,) count, () float32."""
    M = targets.shape[0]
    count = targets.new_empty((), dtype=torch.float32)
    args = dict(targets_ptr=targets, count_ptr=count, M=M, ignore_index=ignore_index, BLOCK=4096)
    run(targets, Launch(count_kernel, (1,), args, num_warps=8))
    return count


def row_losses(
    logits: Tensor,
    V: int,
    targets: Tensor,
    ignore_index: int,
    count: Tensor,
    losses: Tensor | None,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    stats: Tensor | None = None,
) -> None:
    """Write `losses` (M,), whose sum is the mean loss over `count` rows, and, where wanted, the gradient dlogits,
    perhaps over the logits: that of the loss times dloss (), or without dloss that of each row's loss. logits, dlogits
    (M, V and padding) with unit last stride; targets (M,). stats (2, M) float32: written with the losses, read without.
    """
    M, columns = logits.shape
    ROWS, LANES, WIDTH, num_warps = tile(logits)
    args = dict(
        logits_ptr=logits, targets_ptr=targets, count_ptr=count, dloss_ptr=dloss, losses_ptr=losses,
        stats_ptr=stats, dlogits_ptr=dlogits, logits_stride=logits.stride(0),
        dlogits_stride=0 if dlogits is None else dlogits.stride(0),
        M=M, V=V, columns=columns, ignore_index=ignore_index,
        ROWS=ROWS, LANES=LANES, WIDTH=WIDTH, PADDED=columns > V,
    )  # fmt: skip
    run(logits, Launch(cross_entropy_fwd_kernel, (triton.cdiv(M, ROWS),), args, num_warps))


def room_for_losses(logits: Tensor, M: int) -> Tensor:
    """(M,) float32, or one NaN: the mean loss of no rows."""
    return logits.new_empty(M, dtype=torch.float32) if M else logits.new_full((1,), float("nan"), dtype=torch.float32)


@custom_op("nanofuse::cross_entropy")
def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, how many rows count, stats)"""
    M, V = logits.shape
    count, losses = counted(targets, ignore_index), room_for_losses(logits, M)
    stats = logits.new_empty(2, M, dtype=torch.float32)
    row_losses(logits, V, targets, ignore_index, count, losses, None, None, stats)
    return losses.sum(), count, stats


@custom_op("nanofuse::cross_entropy_backward")
def _cross_entropy_backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, count: Tensor, stats: Tensor, ignore_index: int
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    row_losses(logits, logits.shape[1], targets, ignore_index, count, None, dloss, dlogits, stats)
    return dlogits


def _save_cross_entropy(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    ctx.set_materialize_grads(False)  # only the loss has a gradient: no zeros are made up for the other results
    ctx.save_for_backward(logits, targets, *output[1:])


def _differentiate_cross_entropy(ctx, dloss, *_):
    return _cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignore_index), None, None


_cross_entropy.register_autograd(_differentiate_cross_entropy, setup_context=_save_cross_entropy)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """The mean loss of logits against targets; the meaning of `reference.cross_entropy`.

    logits (M, V) float32, bfloat16 or float16, targets (M,) int64. Returns a float32 scalar. A target that is neither
    ignore_index nor in [0, V) makes the loss NaN, and its row's gradient: no error is raised, since that would take a
    wait for the GPU. ValueError for what cannot be served.
    """
    check("logits", logits, (None, "V > 0"))
    check("targets", targets, logits.shape[:1], torch.int64, on=logits)
    loss, *_ = _cross_entropy(rows(logits), targets.contiguous(), ignore_index)
    return loss
