"""The head and the loss in one operation: cross-entropy of x @ weight.T. Nobody else sees the logits.

The forward pass writes the gradient over the logits, right after it read them. A (32768, 50304) bfloat16 matrix has
3.3 GB. It is read once and written once. A row has 100 KB, and its second reading comes out of the caches: two blocks
of 16 warps on a multiprocessor (at most 64 registers a thread) work on no more rows than an H100's caches hold.

What is written is the gradient g of the summed row losses, between -1 and 1, so nothing underflows in float16. The
backward pass knows s = dloss / (rows that count), and computes

    dx = s (g @ weight),   dweight = g.T @ (s x)

So a scaled loss (accumulation, a GradScaler) costs two passes over M x C elements, and none over M x V. For dweight x
is scaled, because a sum of unscaled rows could leave float16's range, and weight has more elements than x. Scaling by a
power of two, such as 1 / 32768, rounds nothing. Any other s rounds x once more. s is applied in float32.

A training step knows dloss in advance. Then g is scaled by s as it is written, which costs nothing. In float16 dloss
holds the loss scale.

In chunks of rows, only one chunk's logits exist at a time. Both products are taken in the forward pass, dweight is
summed over chunks in float32, and the backward pass only scales. Kept for it: M x C elements in x's dtype and 4 V C
bytes, instead of M x V elements. This saves memory, not time.

Rows of logits are padded to a multiple of 16 elements. So a vocabulary of 50257 is read 16 bytes at a time, like one of
50304, also by the matmuls.
"""

import torch
from torch import Tensor

from kernels.fused.cross_entropy import counted, room_for_losses, row_losses
from kernels.fused.linear import put_product, store
from kernels.launch import check, custom_op, refusal, rows
from kernels.reference import Grads


def scaled(x: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """out = x * scale () float32, rounded once. x, out (M, C), perhaps the same. None: a scale of 1."""
    # with dimensions scale is not cast to x's dtype: torch multiplies in float32, in one launch
    return out.copy_(x) if scale is None else torch.mul(x, scale.view(1, 1), out=out)


def padded(V: int) -> int:
    """The columns of a matrix of logits, V of them used: Triton wants row strides divisible by 16 to see alignment."""
    return (V + 15) // 16 * 16


@custom_op("nanofuse::linear_cross_entropy")
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_rows: int,
    wants_dx: bool,
    wants_dweight: bool,
    dloss: Tensor | None = None,
    into: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, how many rows count, and of the gradients that are wanted what the backward pass finishes).

    That is, of all rows at once, dlogits (M, padded(V)); in chunks, dx and a float32 dweight. The others are empty.
    They are gradients of dloss * loss, or without dloss of the summed row losses. into, accumulate: only for the
    backward pass.
    """
    (M, C), V = x.shape, weight.shape[0]
    chunked, wanted = chunk_rows > 0, wants_dx or wants_dweight
    size = min(chunk_rows, M) if chunked else M
    logits, losses, count = x.new_empty(size, padded(V)), room_for_losses(x, M), counted(targets, ignore_index)
    makes_dx, makes_dweight = chunked and wants_dx, chunked and wants_dweight
    dx, dweight = x.new_empty(M if makes_dx else 0, C), x.new_empty(V if makes_dweight else 0, C, dtype=torch.float32)
    if makes_dweight:
        dweight.zero_()
    # one chunk is enough where torch.compile asks for shapes only: counting them, it would compile for one M alone
    for start in range(0, M, max(size, 1)) if chunked and isinstance(M, int) else (0,):
        chunk = slice(start, start + size)
        part = logits[: M - start]
        torch.mm(x[chunk], weight.t(), out=part[:, :V])
        row_losses(part, V, targets[chunk], ignore_index, count, losses[chunk], dloss, part if wanted else None)
        if makes_dx:
            torch.mm(part[:, :V], weight, out=dx[chunk])
        if makes_dweight:
            put_product(dweight, part[:, :V], x[chunk], True)
    dlogits = logits if wanted and not chunked else x.new_empty(0, padded(V))
    return losses.sum(), count, dlogits, dx, dweight


@custom_op("nanofuse::linear_cross_entropy_backward", mutates_args=("into",))
def _linear_cross_entropy_backward(
    dloss: Tensor,
    known: bool,
    wants_dx: bool,
    count: Tensor,
    dlogits: Tensor,
    dx: Tensor,
    dweight: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    into: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), in x's dtype, each empty where it is not wanted; the latter also where it is put into `into`:
    unless that is empty, since torch 2.11 takes no None for what is written to.

    x is None if dweight is not wanted. x and weight are None if dx and dweight are only to be scaled. known: the
    gradients are scaled already, and dloss is not read. It is an argument all the same: where nothing in a backward
    pass depends on the loss's gradient, torch.compile computes all of it in the forward pass.
    """
    put = into.numel() > 0
    scale = None if known else dloss / count.clamp_min(1.0)
    if weight is None:
        if put:
            store(into, dweight if scale is None else dweight * scale, accumulate)
            dweight = dweight[:0]
        return scaled(dx, scale, torch.empty_like(dx)), scaled(dweight, scale, dx.new_empty(dweight.shape))
    dlogits = dlogits[:, : weight.shape[0]]
    dx, dweight = weight.new_empty(0), weight.new_empty(0)
    if wants_dx:
        dx = torch.mm(dlogits, weight)
        dx = dx if scale is None else scaled(dx, scale, dx)
    if x is not None:
        x = x if scale is None else scaled(x, scale, x.new_empty(x.shape))
        dweight = dweight if put else weight.new_empty(weight.shape)
        put_product(into if put else dweight, dlogits, x, put and accumulate)
    return dx, dweight


def _save_linear_cross_entropy(ctx, inputs, output):
    x, weight, _, _, chunk_rows, ctx.wants_dx, wants_dweight, dloss, into, ctx.accumulate = inputs
    ctx.set_materialize_grads(False)  # as for `cross_entropy`
    ctx.known = dloss is not None
    read = (None, None) if chunk_rows else (x if wants_dweight else None, weight)
    ctx.save_for_backward(*output[1:], *read, into)


def _differentiate_linear_cross_entropy(ctx, dloss, *_):
    *saved, into = ctx.saved_tensors
    place = dloss.new_empty(0) if into is None else into
    dx, dweight = _linear_cross_entropy_backward(dloss, ctx.known, ctx.wants_dx, *saved, place, ctx.accumulate)
    return dx, dweight if into is None else None, *(None,) * 8


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
    None for the logits. A gradient that nothing asks for is not computed. Targets outside the vocabulary as in
    `cross_entropy`. ValueError for what cannot be served.

    dloss: () float32, the gradient of the loss that the backward pass will be given (`loss.backward(dloss)`), if it is
    known already: it is taken into the gradient while that is written, and the one that comes later is not read. grads:
    where weight's gradient is put, as in `linear`.
    """
    check("x", x, (*x.shape[:-1], "C > 0"))
    check("weight", weight, ("V > 0", x.shape[-1]), x.dtype, on=x)
    check("targets", targets, x.shape[:-1], torch.int64, on=x)
    if chunk_rows < 0:
        raise refusal("chunk_rows", chunk_rows, "0 (all) or more")
    into, accumulate = (None, False) if grads is None else (grads.weight, grads.accumulate)
    wants_dx = torch.is_grad_enabled() and x.requires_grad
    wants_dweight = torch.is_grad_enabled() and (weight.requires_grad or into is not None)
    x, targets = rows(x), targets.reshape(-1).contiguous()  # a view of targets may have any stride
    loss, *_ = _linear_cross_entropy(
        x, weight, targets, ignore_index, chunk_rows, wants_dx, wants_dweight, dloss, into, accumulate
    )
    return loss, None
