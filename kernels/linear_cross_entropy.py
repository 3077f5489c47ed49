"""The head and the loss: logits = x @ weight.T and their cross-entropy, in one op that nobody sees the logits of.

So their gradient can be written over them in the forward pass, while they are at hand (`cross_entropy.py`): of a
(32768, 50304) bfloat16 matrix, 3.3 GB, one read and one write. It is the gradient g of the unscaled row losses, in
[-1, 1] but for the z-loss: nothing underflows in float16. With s = dloss / (rows that count), known in the backward,

    dx = s (g @ weight),   dweight = g.T @ (s x)

so that a loss that is scaled, by accumulation or a GradScaler, costs M x C elements twice, never a pass over M x V. For
dweight, s goes into x: the sum over rows of unscaled terms could leave float16's range, and weight has more elements
than x. A power of two, as 1 / 32768 is, rounds nothing; any other s costs x one more rounding. s is applied in float32.

In chunks of rows, of which only one chunk's logits exist: both products are taken in the forward pass, dweight summed
over chunks in float32, and the backward scales. Saved for it: M x C in x's dtype and 4 V C bytes, instead of M x V. It
buys memory, not time.

Rows of logits are padded to 32 bytes or more: a vocabulary of 50257 is read 16 bytes at a time like one of 50304, also
by the matmuls.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy import check_options, plan_forward, reduce_losses
from kernels.launch import Device, Launch, check, custom_op, device_of, rows, run


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


def plan_scale(device: Device, x: Tensor, scale: Tensor, out: Tensor) -> list[Launch]:
    """x, out (M, C), perhaps the same, with unit last stride; scale () float32; out is written."""
    M, C = x.shape
    BLOCK_N = min(256, max(16, triton.next_power_of_2(C)))
    BLOCK_M = 4096 // BLOCK_N  # 32 elements a thread
    args = dict(x_ptr=x, scale_ptr=scale, out_ptr=out, x_stride=x.stride(0), out_stride=out.stride(0), M=M, C=C)
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(C, BLOCK_N))
    return [Launch(scale_kernel, grid, args, dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N))]


def _scaled(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    run(x, *plan_scale(device_of(x), x, scale, out))
    return out


def padded(V: int) -> int:
    """The columns of a matrix of logits, V of them used: Triton wants row strides divisible by 16 to see alignment."""
    return (V + 15) // 16 * 16


@custom_op("nanofuse::linear_cross_entropy")
def _whole(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    smoothing: float,
    z_loss: float,
    n_vocab: int,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, divisor, gradient of the row losses (M, padded(V)), empty unless `differentiable`)"""
    logits = x.new_empty(x.shape[0], padded(weight.shape[0]))
    losses = x.new_empty(2, x.shape[0], dtype=torch.float32)
    torch.mm(x, weight.t(), out=logits[:, : weight.shape[0]])
    dlogits, options = logits if differentiable else None, (ignore_index, smoothing, z_loss, n_vocab)
    run(x, *plan_forward(device_of(x), logits, targets, losses, None, dlogits, *options))
    return *reduce_losses(losses, mean), logits if differentiable else x.new_empty(0, logits.shape[1])


@_whole.register_fake
def _(x, weight, targets, ignore_index, mean, smoothing, z_loss, n_vocab, differentiable):
    loss, divisor = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, divisor, x.new_empty(x.shape[0] if differentiable else 0, padded(weight.shape[0]))


@custom_op("nanofuse::linear_cross_entropy_backward")
def _whole_backward(
    dloss: Tensor, divisor: Tensor, dlogits: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), each empty unless needed"""
    dlogits, scale = dlogits[:, : weight.shape[0]], dloss / divisor
    dx, dweight = _gradients(x, weight, x.dtype, weight.dtype, need_dx, need_dweight)
    if need_dx:
        torch.mm(dlogits, weight, out=dx)
        _scaled(dx, scale, dx)
    if need_dweight:
        torch.mm(dlogits.t(), _scaled(x, scale, x.new_empty(x.shape)), out=dweight)
    return dx, dweight


@_whole_backward.register_fake
def _(dloss, divisor, dlogits, x, weight, need_dx, need_dweight):
    return _gradients(x, weight, x.dtype, weight.dtype, need_dx, need_dweight)


def _gradients(
    x: Tensor, weight: Tensor, dx: torch.dtype, dweight: torch.dtype, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Room for dx and dweight, empty where not needed, in those dtypes."""
    (M, C), V = x.shape, weight.shape[0]
    return x.new_empty(M if need_dx else 0, C, dtype=dx), x.new_empty(V if need_dweight else 0, C, dtype=dweight)


def _save_whole(ctx, inputs, output):
    x, weight, *_ = inputs
    _, divisor, dlogits = output
    ctx.set_materialize_grads(False)  # no zeros are made up for a gradient of dlogits
    ctx.mark_non_differentiable(divisor, dlogits)
    ctx.save_for_backward(divisor, dlogits, x, weight)


def _differentiate_whole(ctx, dloss, ddivisor, ddlogits):
    if dloss is None:
        return (None,) * 9
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = _whole_backward(dloss, *ctx.saved_tensors, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, *(None,) * 7


_whole.register_autograd(_differentiate_whole, setup_context=_save_whole)


@custom_op("nanofuse::chunked_linear_cross_entropy")
def _chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    smoothing: float,
    z_loss: float,
    n_vocab: int,
    chunk_rows: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, divisor, dx and float32 dweight of the summed row losses, each empty unless needed)"""
    M, V = x.shape[0], weight.shape[0]
    logits = x.new_empty(min(chunk_rows, M), padded(V))
    losses = x.new_empty(2, M, dtype=torch.float32)
    dx, dweight = _gradients(x, weight, x.dtype, torch.float32, need_dx, need_dweight)
    dweight.zero_()
    options = (ignore_index, smoothing, z_loss, n_vocab)
    for start in range(0, M, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        part = logits[: M - start]
        dlogits = part if need_dx or need_dweight else None
        torch.mm(x[chunk], weight.t(), out=part[:, :V])
        run(x, *plan_forward(device_of(x), part, targets[chunk], losses[:, chunk], None, dlogits, *options))
        if need_dx:
            torch.mm(part[:, :V], weight, out=dx[chunk])
        if need_dweight:
            _add_product(dweight, part[:, :V].t(), x[chunk])
    return *reduce_losses(losses, mean), dx, dweight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32 whatever the factors' dtype."""
    if a.device.type != "cpu" and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # the CPU has no such product
        total.addmm_(a.float(), b.float())


@_chunked.register_fake
def _(x, weight, targets, ignore_index, mean, smoothing, z_loss, n_vocab, chunk_rows, need_dx, need_dweight):
    loss, divisor = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, divisor, *_gradients(x, weight, x.dtype, torch.float32, need_dx, need_dweight)


@custom_op("nanofuse::chunked_linear_cross_entropy_backward")
def _chunked_backward(
    dloss: Tensor, divisor: Tensor, dx: Tensor, dweight: Tensor, dweight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx and dweight, scaled, the latter in its dtype"""
    scale = dloss / divisor
    return tuple(
        _scaled(gradient, scale, gradient.new_empty(gradient.shape, dtype=dtype))
        for gradient, dtype in ((dx, dx.dtype), (dweight, dweight_dtype))
    )


@_chunked_backward.register_fake
def _(dloss, divisor, dx, dweight, dweight_dtype):
    return dx.new_empty(dx.shape), dweight.new_empty(dweight.shape, dtype=dweight_dtype)


def _save_chunked(ctx, inputs, output):
    _, divisor, dx, dweight = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(divisor, dx, dweight)
    ctx.save_for_backward(divisor, dx, dweight)
    ctx.dweight_dtype = inputs[1].dtype


def _differentiate_chunked(ctx, dloss, ddivisor, ddx, ddweight):
    if dloss is None:
        return (None,) * 11
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = _chunked_backward(dloss, *ctx.saved_tensors, ctx.dweight_dtype)
    return dx if need_dx else None, dweight if need_dweight else None, *(None,) * 9


_chunked.register_autograd(_differentiate_chunked, setup_context=_save_chunked)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    n_vocab: int | None = None,
    chunk_rows: int = 0,
) -> tuple[Tensor, None]:
    """The loss of x @ weight.T against targets; the meaning of `reference.linear_cross_entropy`.

    x (..., C) and weight (V, C) of one dtype, float32, bfloat16 or float16, targets (...) int64. `chunk_rows`: how many
    rows' logits exist at a time, 0 for all of them; 4096 or more keep the matmuls fast. Returns a float32 scalar, and
    None for the logits. Where nothing is to be differentiated, no gradient is computed. Targets outside the vocabulary
    as in `cross_entropy`. ValueError for what cannot be served.
    """
    check("x", x)
    C = x.shape[-1] if x.ndim else 0
    if C == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected one channel or more")
    check("weight", weight, shape=(None, C), dtypes=(x.dtype,), device=x.device)
    n_vocab = check_options(targets, x, weight.shape[0], reduction, label_smoothing, z_loss, n_vocab)
    if chunk_rows < 0:
        raise ValueError(f"chunk_rows: got {chunk_rows}, expected 0 (all) or more")
    need_dx, need_dweight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    x, targets = rows(x), targets.reshape(-1).contiguous()  # a view of targets may have any stride
    arguments = (x, weight, targets, ignore_index, reduction == "mean", label_smoothing, z_loss, n_vocab)
    if chunk_rows:
        loss, _, _, _ = _chunked(*arguments, chunk_rows, need_dx, need_dweight)
    else:
        loss, _, _ = _whole(*arguments, need_dx or need_dweight)
    return loss, None
