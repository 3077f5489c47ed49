"""Cross-entropy over the vocabulary: softmax, log and pick in one pass, and its gradient in a second one.

    lse = log sum_j exp(x_j),   nll = lse - x_target         over the columns j < n_vocab; those after it are padding
    loss = (1 - a) nll + a (lse - mean_j x_j) + z lse^2
    dx_j = (1 + 2 z lse) exp(x_j - lse) - a / n_vocab - (1 - a) [j = target]

with label smoothing a (Szegedy et al. 2016, arXiv:1512.00567) and z-loss z (PaLM, arXiv:2204.02311, section 5).

A row's tile is (LANES, WIDTH): WIDTH neighbours are one 16-byte access of one thread, and every lane keeps its own
running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867), so that a block of columns costs no barrier,
and one exponential an element and one a lane; lanes meet once, at the end of the row. The sum is saved as two numbers,
the maximum m and log2 of the sum of exp(x - m): x - m is exact where lse, of large logits, is not.

`cross_entropy_fwd_kernel` can write the gradient of the unscaled row losses in a second sweep over the row, over the
logits themselves: `linear_cross_entropy` has it so. The row, 100 KB of bfloat16 at GPT-2's vocabulary, is read again
from the caches: two blocks of 16 warps on a multiprocessor (at most 64 registers a thread) keep no more rows in flight
than an H100 holds. Bytes of DRAM: one read and one write an element. `cross_entropy` alone, whose logits belong to its
caller, reads once for the loss and reads and writes once for the gradient.

A row that is ignored is not read. A target outside the vocabulary is not followed: its row's loss and gradient are NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Device, Launch, address, check, custom_op, device_of, rows, run

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's: a maximum that -inf may join without a NaN


@triton.jit
def _target_logit(target_logit_ptr, mask):
    return tl.load(target_logit_ptr, mask=mask, other=float("nan")).to(tl.float32)


@triton.jit
def _columns(LANES: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, LANES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _write_gradient(
    logits_ptr,
    dlogits_ptr,
    logits_stride,
    dlogits_stride,
    o_row,  # (ROWS,)
    target,
    top,  # the row's maximum
    log2_total,  # log2 of its sum of exp(x - top)
    upstream,  # the gradient of the row's loss
    M,
    V,
    n_vocab,
    ignore_index,
    smoothing,
    z_loss,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    counted = target != ignore_index
    known = ~counted | ((target >= 0) & (target < n_vocab))
    upstream = tl.where(counted, upstream, 0.0)
    log2_total = tl.where(counted, log2_total, 0.0)  # -inf there, as is every x: their difference is no number
    penalty = (upstream * 2.0 * z_loss * (top + LN2 * log2_total))[:, None, None]
    miss = tl.where(known, -upstream * smoothing / n_vocab, float("nan"))
    hit = (miss - upstream * (1.0 - smoothing))[:, None, None]
    miss = miss[:, None, None]
    upstream = upstream[:, None, None]
    top = top[:, None, None]
    log2_total = log2_total[:, None, None]
    target = target.to(tl.int32)[:, None, None]
    o_col = _columns(LANES, WIDTH)
    m_row = (o_row < M)[:, None, None]
    m_read = counted[:, None, None]
    row = (logits_ptr + o_row.to(tl.int64) * logits_stride)[:, None, None] + o_col
    out = (dlogits_ptr + o_row.to(tl.int64) * dlogits_stride)[:, None, None] + o_col
    for start in range(0, V, LANES * WIDTH):
        m_col = o_col < V - start
        # nobody reads these logits again
        x = tl.load(row + start, mask=m_read & m_col, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        p = tl.exp2((x - top) * LOG2E - log2_total)
        dx = p * upstream + tl.where(o_col == target - start, hit, miss)
        dx += p * penalty  # last: p - 1 may be all but nothing, and exact
        if PADDED:
            dx = tl.where(o_col < n_vocab - start, dx, 0.0)
        tl.store(out + start, dx.to(dlogits_ptr.dtype.element_ty), mask=m_row & m_col)


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr,  # (M, V)
    targets_ptr,  # (M,) int64
    losses_ptr,  # out (2, M) float32: the row's loss, 0 where ignored; 1 where it counts
    stats_ptr,  # out (2, M) float32: top and log2_total; or None
    dlogits_ptr,  # out (M, V): the gradient of the row's loss; or None. May be logits_ptr
    logits_stride,
    losses_stride,
    dlogits_stride,
    M,
    V,
    n_vocab,
    ignore_index,
    smoothing,
    z_loss,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # n_vocab < V
    SMOOTHED: tl.constexpr,  # smoothing > 0
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < M
    target = tl.load(targets_ptr + o_row, mask=m_row, other=ignore_index)
    counted = target != ignore_index
    first = logits_ptr + o_row.to(tl.int64) * logits_stride
    x_target = _target_logit(target_logit_ptr=first + target, mask=counted & (target >= 0) & (target < n_vocab))
    o_col = _columns(LANES, WIDTH)
    row = first[:, None, None] + o_col
    m_read = counted[:, None, None]
    lane_top = tl.full((ROWS, LANES), LOWEST, dtype=tl.float32)
    lane_total = tl.zeros((ROWS, LANES), dtype=tl.float32)
    if SMOOTHED:  # summed about the target's logit: a common offset, however large, costs no digits
        pivot = tl.where(x_target > float("-inf"), x_target, 0.0)
        lane_sum = tl.zeros((ROWS, LANES), dtype=tl.float32)
    for start in range(0, V, LANES * WIDTH):
        x = tl.load(row + start, mask=m_read & (o_col < V - start), other=float("-inf")).to(tl.float32)
        if PADDED:
            x = tl.where(o_col < n_vocab - start, x, float("-inf"))
        if SMOOTHED:
            lane_sum += tl.sum(tl.where(o_col < n_vocab - start, x - pivot[:, None, None], 0.0), axis=2)
        new_top = tl.maximum(lane_top, tl.max(x, axis=2))
        total = tl.sum(tl.exp2((x - new_top[:, :, None]) * LOG2E), axis=2)
        lane_total = lane_total * tl.exp2((lane_top - new_top) * LOG2E) + total
        lane_top = new_top
    top = tl.max(lane_top, axis=1)
    log2_total = tl.log2(tl.sum(lane_total * tl.exp2((lane_top - top[:, None]) * LOG2E), axis=1))
    loss = (top - x_target) + LN2 * log2_total
    if SMOOTHED:
        smooth = (top - pivot) + LN2 * log2_total - tl.sum(lane_sum, axis=1) / n_vocab
        loss = (1.0 - smoothing) * loss + smoothing * smooth
    lse = top + LN2 * log2_total
    loss += z_loss * lse * lse
    tl.store(losses_ptr + o_row, tl.where(counted, loss, 0.0), mask=m_row)
    tl.store(losses_ptr + losses_stride + o_row, counted.to(tl.float32), mask=m_row)
    if stats_ptr is not None:
        tl.store(stats_ptr + o_row, top, mask=m_row)
        tl.store(stats_ptr + M + o_row, log2_total, mask=m_row)
    if dlogits_ptr is not None:
        tl.debug_barrier()  # the gradient may overwrite the target's logit: first, every warp has read it
        _write_gradient(
            logits_ptr, dlogits_ptr, logits_stride, dlogits_stride, o_row, target, top, log2_total, 1.0,
            M, V, n_vocab, ignore_index, smoothing, z_loss, LANES, WIDTH, PADDED,
        )  # fmt: skip


@triton.jit
def cross_entropy_bwd_kernel(
    dloss_ptr,  # () float32: the gradient of a row's loss
    logits_ptr,  # (M, V)
    targets_ptr,  # (M,) int64
    stats_ptr,  # (2, M) float32
    dlogits_ptr,  # out (M, V)
    logits_stride,
    dlogits_stride,
    M,
    V,
    n_vocab,
    ignore_index,
    smoothing,
    z_loss,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < M
    target = tl.load(targets_ptr + o_row, mask=m_row, other=ignore_index)
    top = tl.load(stats_ptr + o_row, mask=m_row, other=0.0)
    log2_total = tl.load(stats_ptr + M + o_row, mask=m_row, other=0.0)
    _write_gradient(
        logits_ptr, dlogits_ptr, logits_stride, dlogits_stride, o_row, target, top, log2_total, tl.load(dloss_ptr),
        M, V, n_vocab, ignore_index, smoothing, z_loss, LANES, WIDTH, PADDED,
    )  # fmt: skip


def tile(logits: Tensor) -> tuple[int, int, int, int]:
    """(ROWS, LANES, WIDTH, num_warps) for logits (M, V): 16 elements a thread, 16 bytes of them at a time, if rows are
    aligned; else 8, each a lane of its own, which takes more registers. Narrow rows, of 65 characters, share a program.
    """
    aligned = address(logits) % 16 == 0 and logits.stride(0) % 16 == 0  # what Triton's specialisation sees
    WIDTH, thread = (16 // logits.element_size(), 16) if aligned else (1, 8)
    columns = min(512 * thread, max(16, triton.next_power_of_2(logits.shape[1])))
    ROWS = max(1, 128 * thread // columns)
    return ROWS, columns // WIDTH, WIDTH, ROWS * columns // (32 * thread)


def plan_forward(
    device: Device,
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    stats: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    n_vocab: int,
) -> list[Launch]:
    """logits (M, V) and, if wanted, dlogits (M, V), perhaps the same, with unit last stride; targets (M,); losses
    (2, M), whose rows may lie apart, and stats (2, M) are written."""
    M, V = logits.shape
    ROWS, LANES, WIDTH, num_warps = tile(logits)
    args = dict(
        logits_ptr=logits, targets_ptr=targets, losses_ptr=losses, stats_ptr=stats, dlogits_ptr=dlogits,
        logits_stride=logits.stride(0), losses_stride=losses.stride(0),
        dlogits_stride=0 if dlogits is None else dlogits.stride(0),
        M=M, V=V, n_vocab=n_vocab, ignore_index=ignore_index, smoothing=smoothing, z_loss=z_loss,
    )  # fmt: skip
    constants = dict(ROWS=ROWS, LANES=LANES, WIDTH=WIDTH, PADDED=n_vocab < V, SMOOTHED=smoothing > 0)
    return [Launch(cross_entropy_fwd_kernel, (triton.cdiv(M, ROWS),), args, constants, num_warps)]


def plan_backward(
    device: Device,
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    n_vocab: int,
) -> list[Launch]:
    """dloss (), of one row's loss; logits (M, V) with unit last stride; targets (M,); dlogits (M, V) is written."""
    M, V = logits.shape
    ROWS, LANES, WIDTH, num_warps = tile(logits)
    args = dict(
        dloss_ptr=dloss, logits_ptr=logits, targets_ptr=targets, stats_ptr=stats, dlogits_ptr=dlogits,
        logits_stride=logits.stride(0), dlogits_stride=dlogits.stride(0),
        M=M, V=V, n_vocab=n_vocab, ignore_index=ignore_index, smoothing=smoothing, z_loss=z_loss,
    )  # fmt: skip
    constants = dict(ROWS=ROWS, LANES=LANES, WIDTH=WIDTH, PADDED=n_vocab < V)
    return [Launch(cross_entropy_bwd_kernel, (triton.cdiv(M, ROWS),), args, constants, num_warps)]


def reduce_losses(losses: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """losses (2, M), as the kernel writes them -> (loss, what its gradient is divided by for that of a row's loss).

    Both () float32. The mean of nothing is NaN, yet its gradient is 0, as torch has it: the divisor is at least 1.
    """
    total, count = losses.sum(1)
    return (total / count, count.clamp_min(1.0)) if mean else (total.clone(), torch.ones_like(count))


@custom_op("nanofuse::cross_entropy")
def _forward(
    logits: Tensor, targets: Tensor, ignore_index: int, mean: bool, smoothing: float, z_loss: float, n_vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, divisor, stats)"""
    losses, stats = (logits.new_empty(2, logits.shape[0], dtype=torch.float32) for _ in range(2))
    options = (ignore_index, smoothing, z_loss, n_vocab)
    run(logits, *plan_forward(device_of(logits), logits, targets, losses, stats, None, *options))
    return *reduce_losses(losses, mean), stats


@_forward.register_fake
def _(logits, targets, ignore_index, mean, smoothing, z_loss, n_vocab):
    loss, divisor = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, divisor, logits.new_empty(2, logits.shape[0], dtype=torch.float32)


@custom_op("nanofuse::cross_entropy_backward")
def _backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    divisor: Tensor,
    stats: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    n_vocab: int,
) -> Tensor:
    dlogits, options = logits.new_empty(logits.shape), (ignore_index, smoothing, z_loss, n_vocab)
    run(logits, *plan_backward(device_of(logits), dloss / divisor, logits, targets, stats, dlogits, *options))
    return dlogits


@_backward.register_fake
def _(dloss, logits, targets, divisor, stats, ignore_index, smoothing, z_loss, n_vocab):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, targets, ignore_index, _, smoothing, z_loss, n_vocab = inputs
    _, divisor, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(divisor, stats)
    ctx.save_for_backward(logits, targets, divisor, stats)
    ctx.options = ignore_index, smoothing, z_loss, n_vocab


def _differentiate(ctx, dloss, ddivisor, dstats):
    dlogits = None if dloss is None else _backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dlogits, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def check_options(
    targets: Tensor,
    like: Tensor,
    vocabulary: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    n_vocab: int | None,
) -> int:
    """ValueError for what cannot be served, given targets for the rows of `like` (..., C). Returns n_vocab."""
    check("targets", targets, shape=tuple(like.shape[:-1]), dtypes=(torch.int64,), device=like.device)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss: got {z_loss}, expected 0 or more")
    n_vocab = vocabulary if n_vocab is None else n_vocab
    if not 1 <= n_vocab <= vocabulary:
        raise ValueError(f"n_vocab: got {n_vocab}, expected 1 to {vocabulary}, the vocabulary's width")
    return n_vocab


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    n_vocab: int | None = None,
) -> Tensor:
    """The loss of logits against targets; the meaning of `reference.cross_entropy`.

    logits (M, V) float32, bfloat16 or float16, targets (M,) int64. Returns a float32 scalar. A target that is neither
    ignore_index nor in [0, n_vocab) makes the loss NaN, and its row's gradient: no error is raised, since that would
    take a wait for the GPU. ValueError for what cannot be served.
    """
    check("logits", logits, shape=(None, None))
    n_vocab = check_options(targets, logits, logits.shape[1], reduction, label_smoothing, z_loss, n_vocab)
    options = (ignore_index, reduction == "mean", label_smoothing, z_loss, n_vocab)
    loss, _, _ = _forward(rows(logits), targets.contiguous(), *options)
    return loss
