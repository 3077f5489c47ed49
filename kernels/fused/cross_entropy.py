"""Cross-entropy over the vocabulary: of logits at hand, and of x @ weight.T in one op that nobody sees the logits of.

    lse = log sum_j exp(x_j),   loss = mean of (lse - x_target) over the rows that count
    dx_j = (exp(x_j - lse) - [j = target]) / (rows that count)

**The kernels.** One pass over a row takes the maximum, the sum and the target's logit; a second one writes the
gradient. A row's tile is (LANES, WIDTH): WIDTH neighbours are one 16-byte access of one thread, and every lane keeps
its own running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867), so that a block of columns costs no
barrier, and one exponential an element and one a lane; lanes meet once, at the end of the row. The sum is saved as two
numbers, the maximum m and log2 of the sum of exp(x - m): x - m is exact where lse, of large logits, is not. A row that
is ignored is not read. A target outside the vocabulary is not followed: its row's loss and gradient are NaN.

**cross_entropy.** The logits belong to the caller: they are read once for the loss, and read and written once for the
gradient.

**linear_cross_entropy.** The gradient is written over the logits in the forward pass, while they are at hand: of a
(32768, 50304) bfloat16 matrix, 3.3 GB, one read and one write. A row, 100 KB, is read a second time out of the caches:
two blocks of 16 warps on a multiprocessor (at most 64 registers a thread) keep no more rows in flight than an H100
holds. What is written is the gradient g of the unscaled row losses, in [-1, 1]: nothing underflows in float16. With
s = dloss / (rows that count), known in the backward pass,

    dx = s (g @ weight),   dweight = g.T @ (s x)

so that a loss that is scaled, by accumulation or a GradScaler, costs M x C elements twice, never a pass over M x V. For
dweight, s goes into x: the sum over rows of unscaled terms could leave float16's range, and weight has more elements
than x. A power of two, as 1 / 32768 is, rounds nothing; any other s costs x one more rounding. s is applied in float32.
Where the caller knows dloss in advance, as a training step does, g is scaled by s while it is written, for nothing.
Float16 has its loss scale then.

In chunks of rows, only one chunk's logits exist. Both products are taken in the forward pass, dweight summed over
chunks in float32, and the backward pass scales. Saved for it: M x C in x's dtype and 4 V C bytes, instead of M x V. It
buys memory, not time.

Rows of logits are padded to 32 bytes or more: a vocabulary of 50257 is read 16 bytes at a time like one of 50304, also
by the matmuls.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.linear import put_product, store
from kernels.launch import Launch, address, check, custom_op, rows, run
from kernels.reference import Grads

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's: a maximum that -inf may join without a NaN


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
    columns,
    ignore_index,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    counted = target != ignore_index
    known = ~counted | ((target >= 0) & (target < V))
    upstream = tl.where(counted, upstream, 0.0)
    log2_total = tl.where(counted, log2_total, 0.0)[:, None, None]  # -inf there, as is every x: no difference
    miss = tl.where(known, 0.0, float("nan"))[:, None, None]
    hit = tl.where(known, -upstream, float("nan"))[:, None, None]
    upstream = upstream[:, None, None]
    top = top[:, None, None]
    target = target.to(tl.int32)[:, None, None]
    o_col = _columns(LANES, WIDTH)
    m_row = (o_row < M)[:, None, None]
    m_read = counted[:, None, None]
    row = (logits_ptr + o_row.to(tl.int64) * logits_stride)[:, None, None] + o_col
    out = (dlogits_ptr + o_row.to(tl.int64) * dlogits_stride)[:, None, None] + o_col
    for start in range(0, columns, LANES * WIDTH):
        m_col = o_col < columns - start
        # nobody reads these logits again
        x = tl.load(row + start, mask=m_read & m_col, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        p = tl.exp2((x - top) * LOG2E - log2_total)
        dx = p * upstream + tl.where(o_col == target - start, hit, miss)
        if PADDED:
            dx = tl.where(o_col < V - start, dx, 0.0)
        tl.store(out + start, dx.to(dlogits_ptr.dtype.element_ty), mask=m_row & m_col)


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr,  # (M, columns)
    targets_ptr,  # (M,) int64
    count_ptr,  # () float32: the rows that count
    dloss_ptr,  # () float32: the gradient of the mean loss; or None: that of every row's loss is taken to be 1
    losses_ptr,  # out (M,) float32: the row's part of the mean loss, 0 where ignored
    stats_ptr,  # out (2, M) float32: top and log2_total; or None
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
    m_target = counted & (target >= 0) & (target < V)
    x_target = tl.load(first + target, mask=m_target, other=float("nan")).to(tl.float32)
    o_col = _columns(LANES, WIDTH)
    row = first[:, None, None] + o_col
    m_read = counted[:, None, None]
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
    count = tl.load(count_ptr)
    tl.store(losses_ptr + o_row, tl.where(counted, loss, 0.0) / count, mask=m_row)  # 0 / 0 where nothing counts
    if stats_ptr is not None:
        tl.store(stats_ptr + o_row, top, mask=m_row)
        tl.store(stats_ptr + M + o_row, log2_total, mask=m_row)
    if dlogits_ptr is not None:
        upstream = 1.0
        if dloss_ptr is not None:
            upstream = tl.load(dloss_ptr) / tl.maximum(count, 1.0)
        tl.debug_barrier()  # the gradient may overwrite the target's logit: first, every warp has read it
        _write_gradient(
            logits_ptr, dlogits_ptr, logits_stride, dlogits_stride, o_row, target, top, log2_total, upstream,
            M, V, columns, ignore_index, LANES, WIDTH, PADDED,
        )  # fmt: skip


@triton.jit
def count_kernel(targets_ptr, count_ptr, M, ignore_index, BLOCK: tl.constexpr):
    """count () float32: the targets (M,) int64 that are not ignore_index. One program."""
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, M, BLOCK):
        o_row = start + tl.arange(0, BLOCK)
        count += (tl.load(targets_ptr + o_row, mask=o_row < M, other=ignore_index) != ignore_index).to(tl.int32)
    tl.store(count_ptr, tl.sum(count, axis=0).to(tl.float32))


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
    ignore_index,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < M
    target = tl.load(targets_ptr + o_row, mask=m_row, other=ignore_index)
    top = tl.load(stats_ptr + o_row, mask=m_row, other=0.0)
    log2_total = tl.load(stats_ptr + M + o_row, mask=m_row, other=0.0)
    _write_gradient(
        logits_ptr, dlogits_ptr, logits_stride, dlogits_stride, o_row, target, top, log2_total, tl.load(dloss_ptr),
        M, V, V, ignore_index, LANES, WIDTH, False,
    )  # fmt: skip


@triton.jit
def scale_kernel(
    x_ptr,  # (M, C)
    scale_ptr,  # () float32
    out_ptr,  # out (M, C), may be x_ptr
    x_stride,
    out_stride,
    M,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    o_col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (o_row < M) & (o_col < C)
    x = tl.load(x_ptr + o_row.to(tl.int64) * x_stride + o_col, mask=mask).to(tl.float32) * tl.load(scale_ptr)
    tl.store(out_ptr + o_row.to(tl.int64) * out_stride + o_col, x.to(out_ptr.dtype.element_ty), mask=mask)


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
    count = targets.new_empty((), dtype=torch.float32)
    args = dict(targets_ptr=targets, count_ptr=count, M=len(targets), ignore_index=ignore_index)
    run(targets, Launch(count_kernel, (min(len(targets), 1),), args, dict(BLOCK=4096), num_warps=8))
    return count


def row_losses(
    logits: Tensor,
    V: int,
    targets: Tensor,
    ignore_index: int,
    count: Tensor,
    losses: Tensor,
    *,
    dloss: Tensor | None = None,
    stats: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> None:
    """Write what the forward kernel can: `losses` (M,), whose sum is the mean loss over `count` rows; where wanted,
    stats (2, M) or the gradient dlogits, perhaps over the logits: that of the loss times dloss (), or without dloss
    that of each row's loss. logits, dlogits (M, V and padding) with unit last stride; targets (M,).
    """
    M, columns = logits.shape
    ROWS, LANES, WIDTH, num_warps = tile(logits)
    args = dict(
        logits_ptr=logits, targets_ptr=targets, count_ptr=count, dloss_ptr=dloss, losses_ptr=losses,
        stats_ptr=stats, dlogits_ptr=dlogits, logits_stride=logits.stride(0),
        dlogits_stride=0 if dlogits is None else dlogits.stride(0),
        M=M, V=V, columns=columns, ignore_index=ignore_index,
    )  # fmt: skip
    constants = dict(ROWS=ROWS, LANES=LANES, WIDTH=WIDTH, PADDED=columns > V)
    run(logits, Launch(cross_entropy_fwd_kernel, (triton.cdiv(M, ROWS),), args, constants, num_warps))


def room_for_losses(logits: Tensor, M: int) -> Tensor:
    """(M,) float32, or one NaN: the mean loss of no rows."""
    return logits.new_empty(M, dtype=torch.float32) if M else logits.new_full((1,), float("nan"), dtype=torch.float32)


def scaled(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out = x * scale (), rounded once. x, out (M, C), perhaps the same, with unit last stride."""
    M, C = x.shape
    BLOCK_N = min(256, max(16, triton.next_power_of_2(C)))
    BLOCK_M = 4096 // BLOCK_N  # 32 elements a thread
    args = dict(x_ptr=x, scale_ptr=scale, out_ptr=out, x_stride=x.stride(0), out_stride=out.stride(0), M=M, C=C)
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(C, BLOCK_N))
    run(x, Launch(scale_kernel, grid, args, dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)))
    return out


# Logits at hand -------------------------------------------------------------------------------------------------------


@custom_op("nanofuse::cross_entropy")
def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, how many rows count, stats)"""
    M, V = logits.shape
    count, losses = counted(targets, ignore_index), room_for_losses(logits, M)
    stats = logits.new_empty(2, M, dtype=torch.float32)
    row_losses(logits, V, targets, ignore_index, count, losses, stats=stats)
    return losses.sum(), count, stats


@custom_op("nanofuse::cross_entropy_backward")
def _cross_entropy_backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, count: Tensor, stats: Tensor, ignore_index: int
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    (M, V), (ROWS, LANES, WIDTH, num_warps) = logits.shape, tile(logits)
    args = dict(
        dloss_ptr=dloss / count.clamp_min(1.0), logits_ptr=logits, targets_ptr=targets, stats_ptr=stats,
        dlogits_ptr=dlogits, logits_stride=logits.stride(0), dlogits_stride=dlogits.stride(0),
        M=M, V=V, ignore_index=ignore_index,
    )  # fmt: skip
    constants = dict(ROWS=ROWS, LANES=LANES, WIDTH=WIDTH)
    run(logits, Launch(cross_entropy_bwd_kernel, (triton.cdiv(M, ROWS),), args, constants, num_warps))
    return dlogits


def _only_the_loss_is_differentiable(ctx, output):
    ctx.set_materialize_grads(False)  # no zeros are made up for gradients of the others
    ctx.mark_non_differentiable(*output[1:])


def _save_cross_entropy(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    _only_the_loss_is_differentiable(ctx, output)
    ctx.save_for_backward(logits, targets, *output[1:])


def _differentiate_cross_entropy(ctx, dloss, *_):
    dlogits = None if dloss is None else _cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignore_index)
    return dlogits, None, None


_cross_entropy.register_autograd(_differentiate_cross_entropy, setup_context=_save_cross_entropy)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """The mean loss of logits against targets; the meaning of `reference.cross_entropy`.

    logits (M, V) float32, bfloat16 or float16, targets (M,) int64. Returns a float32 scalar. A target that is neither
    ignore_index nor in [0, V) makes the loss NaN, and its row's gradient: no error is raised, since that would take a
    wait for the GPU. ValueError for what cannot be served.
    """
    check("logits", logits, shape=(None, None))
    if logits.shape[1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected one column or more")
    check("targets", targets, shape=(logits.shape[0],), dtypes=(torch.int64,), device=logits.device)
    loss, _, _ = _cross_entropy(rows(logits), targets.contiguous(), ignore_index)
    return loss


# With the head, all rows at once or in chunks of rows -----------------------------------------------------------------


def padded(V: int) -> int:
    """The columns of a matrix of logits, V of them used: Triton wants row strides divisible by 16 to see alignment."""
    return (V + 15) // 16 * 16


def _gradients(
    x: Tensor, weight: Tensor, dtype: torch.dtype, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Room for dx, in x's dtype, and dweight, in `dtype`; empty where not needed."""
    (M, C), V = x.shape, weight.shape[0]
    return x.new_empty(M if need_dx else 0, C), x.new_empty(V if need_dweight else 0, C, dtype=dtype)


@custom_op("nanofuse::linear_cross_entropy")
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_rows: int,
    need_dx: bool,
    need_dweight: bool,
    dloss: Tensor | None = None,
    into: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, how many rows count, and of the gradients what the backward pass finishes).

    That is, of all rows at once, dlogits (M, padded(V)); in chunks, dx and a float32 dweight. The others are empty, as
    is what is not needed. They are gradients of dloss * loss, or without dloss of the summed row losses. into,
    accumulate: only for the backward pass.
    """
    M, V = x.shape[0], weight.shape[0]
    wanted, chunked = need_dx or need_dweight, chunk_rows > 0
    size = min(chunk_rows, M) if chunked else M
    logits, losses, count = x.new_empty(size, padded(V)), room_for_losses(x, M), counted(targets, ignore_index)
    dx, dweight = _gradients(x, weight, torch.float32, need_dx and chunked, need_dweight and chunked)
    if chunked:
        dweight.zero_()
    for start in range(0, M, max(size, 1)):
        chunk = slice(start, start + size)
        part = logits[: M - start]
        torch.mm(x[chunk], weight.t(), out=part[:, :V])
        dlogits = part if wanted else None
        row_losses(part, V, targets[chunk], ignore_index, count, losses[chunk], dloss=dloss, dlogits=dlogits)
        if need_dx and chunked:
            torch.mm(part[:, :V], weight, out=dx[chunk])
        if need_dweight and chunked:
            put_product(dweight, part[:, :V], x[chunk], True)
    dlogits = logits if wanted and not chunked else x.new_empty(0, padded(V))
    return losses.sum(), count, dlogits, dx, dweight


@_linear_cross_entropy.register_fake
def _(x, weight, targets, ignore_index, chunk_rows, need_dx, need_dweight, *_):
    loss, count = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    wanted, chunked = need_dx or need_dweight, chunk_rows > 0
    dlogits = x.new_empty(x.shape[0] if wanted and not chunked else 0, padded(weight.shape[0]))
    return loss, count, dlogits, *_gradients(x, weight, torch.float32, need_dx and chunked, need_dweight and chunked)


@custom_op("nanofuse::linear_cross_entropy_backward", mutates_args=("into",))
def _linear_cross_entropy_backward(
    dloss: Tensor,
    known: bool,
    count: Tensor,
    dlogits: Tensor,
    dx: Tensor,
    dweight: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
    into: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), in x's dtype, each empty unless needed; dweight also where it is put into `into`: unless that is
    empty, since torch 2.11 takes no None for what is written to.

    x and weight are None where dx and dweight are there, to be scaled only. known: the gradients are scaled already,
    and dloss is not read. It is an argument all the same: where nothing in a backward pass depends on the loss's
    gradient, torch.compile computes all of it in the forward pass.
    """
    put = into.numel() > 0
    scale = None if known else dloss / count.clamp_min(1.0)
    if x is None or weight is None:
        if put:
            store(into, dweight if scale is None else dweight * scale, accumulate)
            dweight = dweight[:0]
        room = [dlogits.new_empty(gradient.shape) for gradient in (dx, dweight)]
        if scale is None:
            return tuple(out.copy_(gradient) for out, gradient in zip(room, (dx, dweight), strict=True))
        return tuple(scaled(gradient, scale, out) for out, gradient in zip(room, (dx, dweight), strict=True))
    dlogits = dlogits[:, : weight.shape[0]]
    dx, dweight = _gradients(x, weight, weight.dtype, need_dx, need_dweight and not put)
    if need_dx:
        torch.mm(dlogits, weight, out=dx)
        if scale is not None:
            scaled(dx, scale, dx)
    if need_dweight:
        if scale is not None:
            x = scaled(x, scale, x.new_empty(x.shape))
        put_product(into if put else dweight, dlogits, x, put and accumulate)
    return dx, dweight


def _save_linear_cross_entropy(ctx, inputs, output):
    x, weight, _, _, chunk_rows, _, _, dloss, into, ctx.accumulate = inputs
    _only_the_loss_is_differentiable(ctx, output)
    ctx.known = dloss is not None
    ctx.save_for_backward(*output[1:], *((None, None) if chunk_rows else (x, weight)), into)


def _differentiate_linear_cross_entropy(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 10
    *saved, into = ctx.saved_tensors
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    place = dloss.new_empty(0) if into is None else into
    dx, dweight = _linear_cross_entropy_backward(dloss, ctx.known, *saved, need_dx, need_dweight, place, ctx.accumulate)
    return dx if need_dx else None, dweight if need_dweight and into is None else None, *(None,) * 8


_linear_cross_entropy.register_autograd(_differentiate_linear_cross_entropy, setup_context=_save_linear_cross_entropy)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    *,
    chunk_rows: int = 0,
    dloss: Tensor | None = None,
    grads: Grads | None = None,
) -> tuple[Tensor, None]:
    """The mean loss of x @ weight.T against targets; the meaning of `reference.linear_cross_entropy`.

    x (..., C) and weight (V, C) of one dtype, float32, bfloat16 or float16, targets (...) int64. `chunk_rows`: how many
    rows' logits exist at a time, 0 for all of them; 4096 or more keep the matmuls fast. Returns a float32 scalar, and
    None for the logits. Where nothing is to be differentiated, no gradient is computed. Targets outside the vocabulary
    as in `cross_entropy`. ValueError for what cannot be served.

    dloss: () float32, the gradient of the loss that the backward pass will be given (`loss.backward(dloss)`), if it is
    known already: it is taken into the gradient while that is written, and the one that comes later is not read. grads:
    where weight's gradient is put, as in `linear`.
    """
    check("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected one channel or more")
    check("weight", weight, shape=(None, x.shape[-1]), dtypes=(x.dtype,), device=x.device)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected one row or more")
    check("targets", targets, shape=tuple(x.shape[:-1]), dtypes=(torch.int64,), device=x.device)
    if chunk_rows < 0:
        raise ValueError(f"chunk_rows: got {chunk_rows}, expected 0 (all) or more")
    need_dx, need_dweight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    x, targets = rows(x), targets.reshape(-1).contiguous()  # a view of targets may have any stride
    into, accumulate = (None, False) if grads is None else (grads.weight, grads.accumulate)
    loss, *_ = _linear_cross_entropy(
        x, weight, targets, ignore_index, chunk_rows, need_dx, need_dweight, dloss, into, accumulate
    )
    return loss, None
