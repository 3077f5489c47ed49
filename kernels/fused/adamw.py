"""AdamW over flat buffers: norm, clipping, decay, update and low-precision copy, in two launches.

All parameters of the model lie in one buffer. Those that decay come first, up to `n_decay`. With g the unscaled
gradient, |g| its norm over all elements and t the number of this update (Loshchilov and Hutter 2019, arXiv:1711.05101;
clipping as `torch.nn.utils.clip_grad_norm_`):

    g <- g * min(1, max_norm / (|g| + 1e-6))
    m <- m + (1 - beta1) * (g - m)
    v <- v + (1 - beta2) * (g * g - v)
    p <- p * (1 - lr * decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

If |g| is not finite, nothing changes, not even t. lr, t and the loss scale are read from device memory, so a captured
graph uses the values that are there at its replay.

1. The norm kernel. Each of P programs sums the squares of every P-th tile, in float32. The first program also computes
   the bias corrections from t. 1 - beta^t is taken in float64, of a float32 logarithm. With beta itself in float32,
   1 - beta would be off by 1e-5 for a beta of 0.999.
2. The update kernel. Each program adds up those P numbers again (2 KB out of L2), always in the same order. So there
   is no third launch, there are no atomics, and no counter must be reset. Then it passes once over the buffers. v is
   moved by its difference, like m, because otherwise the rounding of a float32 beta2 would come back multiplied by
   1 / (1 - beta2).

Bytes an element, with gradient and copy in bfloat16: the norm reads 2; the update reads 2 + 12 and writes 12 + 2. The
norm kernel walks backwards, so the update begins with gradients that are still in L2. A thread takes 4 elements: 128
bits of the float32 buffers, 64 of the others; a warp's elements are neighbours. Accesses are that wide if buffers are
aligned to 16 bytes and n is divisible by 16.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.launch import FLOATS, Launch, check, custom_op, device_of, refusal, run

CLIP_EPS = tl.constexpr(reference.CLIP_EPS)

NORM_BYTES, NORM_WARPS = 16384, 8  # of gradient, a tile: four 128-bit loads a thread under way
NORM_PROGRAMS = 4  # a multiprocessor, which holds them at once up to 64 registers a thread
UPDATE_BLOCK, UPDATE_WARPS = 512, 4
UPDATE_PROGRAMS = 32  # a multiprocessor: about three times what it holds, so that none idles long at the end


@triton.jit
def adamw_norm_kernel(
    grad_ptr,  # (n,)
    lr_ptr,  # () float32
    step_ptr,  # () float32 or int64: updates done
    partial_ptr,  # out (P,) float32: each program's sum of squares
    scalars_ptr,  # out (3,) float32: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - lr * weight_decay
    n,
    tiles,
    tiles_per_program,
    log2_beta1,
    log2_beta2,
    weight_decay,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid == 0:
        t = (tl.load(step_ptr) + 1).to(tl.float64)
        correction1 = (1.0 - tl.exp2(t * log2_beta1)).to(tl.float32)
        correction2 = (1.0 - tl.exp2(t * log2_beta2)).to(tl.float32)
        lr = tl.load(lr_ptr)
        tl.store(scalars_ptr, tl.div_rn(lr, correction1))
        tl.store(scalars_ptr + 1, tl.div_rn(1.0, tl.sqrt_rn(correction2)))
        tl.store(scalars_ptr + 2, 1.0 - lr * weight_decay)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(tiles_per_program):
        tile = tiles - 1 - (i * tl.num_programs(0) + pid)
        offset = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + offset, mask=(offset >= 0) & (offset < n), other=0.0).to(tl.float32)
        squares += g * g
    tl.store(partial_ptr + pid, tl.sum(squares))


@triton.jit
def adamw_update_kernel(
    param_ptr,  # in and out (n,) float32
    grad_ptr,  # (n,)
    exp_avg_ptr,  # in and out (n,) float32
    exp_avg_sq_ptr,  # in and out (n,) float32
    step_ptr,  # in and out () float32 or int64
    inv_scale_ptr,  # () float32, or None: the gradient is not scaled
    compute_ptr,  # out (n,) bfloat16 or float16, or None
    partial_ptr,  # (P,) float32
    scalars_ptr,  # (3,) float32
    norm_ptr,  # out () float32
    found_inf_ptr,  # out () float32
    n,
    n_decay,
    P,
    tiles_per_program,
    weight1,  # 1 - beta1
    weight2,  # 1 - beta2
    eps,
    max_norm,  # infinity: no clipping
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pid = tl.program_id(0)
    o_partial = tl.arange(0, BLOCK_P)
    norm = tl.sqrt_rn(tl.sum(tl.load(partial_ptr + o_partial, mask=o_partial < P, other=0.0)))
    factor = 1.0
    if inv_scale_ptr is not None:
        factor = tl.load(inv_scale_ptr)
        norm *= factor
    factor *= tl.minimum(1.0, max_norm / (norm + CLIP_EPS))
    finite = norm < float("inf")  # false for NaN too
    step_size = tl.load(scalars_ptr)
    inv_sqrt_correction2 = tl.load(scalars_ptr + 1)
    decay = tl.load(scalars_ptr + 2)
    if pid == 0:
        tl.store(norm_ptr, norm)
        tl.store(found_inf_ptr, 1.0 - finite.to(tl.float32))
        if finite:
            tl.store(step_ptr, tl.load(step_ptr) + 1)
    if finite:
        for i in range(tiles_per_program):
            offset = (i * tl.num_programs(0) + pid).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offset < n
            g = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32) * factor
            p = tl.load(param_ptr + offset, mask=mask, other=0.0)
            m = tl.load(exp_avg_ptr + offset, mask=mask, other=0.0)
            v = tl.load(exp_avg_sq_ptr + offset, mask=mask, other=0.0)
            m += weight1 * (g - m)
            v += weight2 * (g * g - v)
            p *= tl.where(offset < n_decay, decay, 1.0)
            p -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * inv_sqrt_correction2 + eps)
            tl.store(exp_avg_ptr + offset, m, mask=mask)
            tl.store(exp_avg_sq_ptr + offset, v, mask=mask)
            tl.store(param_ptr + offset, p, mask=mask)
            if compute_ptr is not None:
                tl.store(compute_ptr + offset, p.to(compute_ptr.dtype.element_ty), mask=mask)


@torch.no_grad()
@custom_op("nanofuse::adamw", mutates_args=("param", "exp_avg", "exp_avg_sq", "step", "compute"))
def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    inv_scale: Tensor | None,
    compute: Tensor | None,
    *,
    n_decay: int,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    max_norm: float,
) -> tuple[Tensor, Tensor]:
    """One AdamW update of flat buffers, in place; the meaning of `reference.adamw`.

    Returns (norm, found_inf). found_inf is 1 also where only the float32 sum of squares overflows. compute is bfloat16
    or float16; where found_inf is 1, it is not written. The buffers must not overlap. ValueError for what cannot be
    served: the buffers that are written must be contiguous.
    """
    n, float32 = param.numel(), torch.float32
    check("param", param, (None,), float32)
    check("grad", grad, (n,), on=param)
    check("exp_avg", exp_avg, (n,), float32, on=param)
    check("exp_avg_sq", exp_avg_sq, (n,), float32, on=param)
    check("lr", lr, (), float32, on=param)
    check("step", step, (), float32, torch.int64, on=param)
    check("inv_scale", inv_scale, (), float32, on=param)
    check("compute", compute, (n,), *FLOATS[1:], on=param)
    for name, x in {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "compute": compute}.items():
        if x is not None and not x.is_contiguous():
            raise refusal(name, f"stride {x.stride(0)}", "a contiguous buffer, since it is written")
    if not 0 <= n_decay <= n:
        raise refusal("n_decay", n_decay, f"0 to {n}, the number of elements")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise refusal("betas", betas, "two numbers of 0 or more and less than 1")
    for name, number in {"eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}.items():
        if not number >= 0.0:
            raise refusal(name, number, "0 or more")

    grad, multiprocessors = grad.contiguous(), device_of(param).multiprocessors
    # One program at least: the norm's first sets the bias corrections, the update's first advances the step
    norm_tiles, update_tiles = triton.cdiv(n * grad.itemsize, NORM_BYTES), triton.cdiv(n, UPDATE_BLOCK)
    P = max(1, min(norm_tiles, NORM_PROGRAMS * multiprocessors))
    programs = max(1, min(update_tiles, UPDATE_PROGRAMS * multiprocessors))
    norm, found_inf = param.new_empty(()), param.new_empty(())
    partial, scalars = param.new_empty(P), param.new_empty(3)
    beta1, beta2 = betas
    log2_beta1, log2_beta2 = (math.log2(beta) if beta > 0 else -math.inf for beta in betas)
    norm_args = dict(
        grad_ptr=grad, lr_ptr=lr, step_ptr=step, partial_ptr=partial, scalars_ptr=scalars, n=n, tiles=norm_tiles,
        tiles_per_program=triton.cdiv(norm_tiles, P), log2_beta1=log2_beta1, log2_beta2=log2_beta2,
        weight_decay=weight_decay, BLOCK=NORM_BYTES // grad.itemsize,
    )  # fmt: skip
    update_args = dict(
        param_ptr=param, grad_ptr=grad, exp_avg_ptr=exp_avg, exp_avg_sq_ptr=exp_avg_sq, step_ptr=step,
        inv_scale_ptr=inv_scale, compute_ptr=compute, partial_ptr=partial, scalars_ptr=scalars, norm_ptr=norm,
        found_inf_ptr=found_inf, n=n, n_decay=n_decay, P=P, tiles_per_program=triton.cdiv(update_tiles, programs),
        weight1=1 - beta1, weight2=1 - beta2, eps=eps, max_norm=max_norm if max_norm > 0 else math.inf,
        BLOCK=UPDATE_BLOCK, BLOCK_P=triton.next_power_of_2(P),
    )  # fmt: skip
    run(
        param,
        Launch(adamw_norm_kernel, (P,), norm_args, NORM_WARPS),
        Launch(adamw_update_kernel, (programs,), update_args, UPDATE_WARPS),
    )
    return norm, found_inf
