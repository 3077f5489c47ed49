"""Operations for a CPU that torch.compile calls as they are: dropout's masks, an embedding, GELU, and attention by
plain matmuls.

Inductor can compile their parts, but its code is slower than torch's own operations. It draws random numbers, compares
16-bit integers, reads a bfloat16 table and adds rows one by one. It writes a softmax's float32 values to memory, and
computes them again in the backward pass. Its GELU takes up to twice as long. As operations of our own they also give
the same bits, compiled or not.

Inductor is faster at copies in another order, so attention's stay outside of its operations.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.compiled import mark_graphs

BITS = 16  # random bits for an element of a mask
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def random_mask(
    x: Tensor, p: float, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, float]:
    """Dropout's (keep, scale). keep has x's shape and dtype unless others are given. A share p of its elements are 0,
    the others 1, or in an integer dtype -1, all bits 1. scale is 1 / (1 - p).

    Each element takes 16 random bits, so p is rounded to a multiple of 2^-16, in both. numpy's SFC64 draws the bits, in
    less than half the time that torch's generator takes, which draws its seed.
    """
    dropped = min(round(p * 2**BITS), 2**BITS - 1)
    shape, dtype = list(x.shape if shape is None else shape), x.dtype if dtype is None else dtype
    keep = torch.ops.nanofuse_cpu.random_keep.default(x.detach(), shape, dtype, dropped)
    return keep, 1 / (1 - dropped / 2**BITS)


def attention(packed: Tensor, p: float) -> Tensor:
    """Causal attention by the plain formula: packed (B, T, 3, H, Q) -> (B, T, H, Q), with dropout p on the weights.

    All T x T weights are kept for the backward pass. Matmuls run in packed's dtype. The softmax sums in float32.
    """
    B, T, _, H, _ = packed.shape
    bits = INTEGERS[packed.dtype.itemsize]
    keep, scale = random_mask(packed, p, (B * H, T, T), bits) if p > 0 else (None, 1.0)
    return _Attention.apply(packed, keep, scale)


def embedding(idx: Tensor, weight: Tensor) -> Tensor:
    """The rows `idx` (...) int64 of a table (V, C), widened to float32: (..., C). Gradients are summed in float32."""
    return _Embedding.apply(idx, weight)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, `approximate` as torch has it: "none" or "tanh". Only for torch.compile: elsewhere it is torch's own."""
    return _Gelu.apply(x, approximate)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        B, T, _, H, Q = packed.shape
        qkv = packed.permute(2, 0, 3, 1, 4).reshape(3, B * H, T, Q)
        y, *read = torch.ops.nanofuse_cpu.attention.default(qkv, keep)
        ctx.save_for_backward(qkv, *read, keep)
        ctx.scale = scale
        y = y if keep is None else y * scale
        return y.view(B, H, T, Q).transpose(1, 2)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        qkv, weights, left, keep = ctx.saved_tensors
        (B, T, H, Q), dy = dy.shape, dy.transpose(1, 2)
        dy = dy if keep is None else dy * ctx.scale
        dy = dy.reshape(B * H, T, Q)
        dqkv = torch.ops.nanofuse_cpu.attention_backward.default(dy, qkv, weights, left, keep)
        return dqkv.view(3, B, H, T, Q).permute(1, 3, 0, 2, 4).contiguous(), None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.V, ctx.dtype = weight.shape[0], weight.dtype
        x = torch.ops.nanofuse_cpu.embedding.default(idx, weight)
        # nothing is cast in vain: Dynamo of torch 2.11 would lose the gradient
        return x.float() if x.dtype.itemsize == 2 else x

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor]:
        return None, torch.ops.nanofuse_cpu.embedding_backward.default(dy, *ctx.saved_tensors, ctx.V).to(ctx.dtype)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return torch.ops.nanofuse_cpu.gelu.default(x, approximate)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return torch.ops.nanofuse_cpu.gelu_backward.default(dy, *ctx.saved_tensors, ctx.approximate), None


def _random_keep(x: Tensor, shape: list[int], dtype: torch.dtype, dropped: int) -> Tensor:
    """Zeros, `dropped` of 2^16, and ones, or in an integer dtype -1. x tells calls apart: torch.compile makes one call
    of several with equal arguments."""
    count, seed = math.prod(shape), torch.randint(2**63 - 1, ()).item()
    words = np.random.SFC64(seed).random_raw(-(-count * BITS // 64))
    keep = torch.from_numpy(words.view(np.int16))[:count].view(shape).ge_(dropped - 2 ** (BITS - 1))
    return (keep if dtype.is_floating_point else -keep).to(dtype)


def _embedding(idx: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(idx, weight)


def _embedding_backward(dy: Tensor, idx: Tensor, V: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, idx, V, -1, False)


def _attention(qkv: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y (BH, T, Q), to be divided by 1 - p; the weights (BH, T, T); what is left of them after dropout, empty without)
    of qkv (3, BH, T, Q). keep: a mask of bits; in bfloat16 AND takes a third of the time of a multiplication."""
    q, k, v = qkv
    T, Q = q.shape[1:]
    ahead = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    weights = torch.baddbmm(ahead, q, k.mT, alpha=Q**-0.5)
    torch.softmax(weights, -1, out=weights)  # row by row, so in place; also below
    left = weights.new_empty(0) if keep is None else (weights.view(keep.dtype) & keep).view(q.dtype)
    return torch.bmm(weights if keep is None else left, v), weights, left


def _attention_backward(dy: Tensor, qkv: Tensor, weights: Tensor, left: Tensor, keep: Tensor | None) -> Tensor:
    """The gradient of qkv. dy (BH, T, Q): that of y, divided by 1 - p."""
    q, k, v = qkv
    dqkv = torch.empty_like(qkv)
    dq, dk, dv = dqkv
    torch.bmm((weights if keep is None else left).mT, dy, out=dv)
    dweights = torch.bmm(dy, v.mT)
    if keep is not None:
        dweights.view(keep.dtype).bitwise_and_(keep)
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype, grad_input=dweights)
    scaled = {"beta": 0, "alpha": q.shape[2] ** -0.5}
    torch.baddbmm(dq, dscores, k, **scaled, out=dq)
    torch.baddbmm(dk, dscores.mT, q, **scaled, out=dk)
    return dqkv


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def _gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


_LIBRARY = torch.library.Library("nanofuse_cpu", "DEF")


def _register() -> None:
    mark_graphs()
    bodies = (_random_keep, _embedding, _embedding_backward, _gelu, _gelu_backward, _attention, _attention_backward)
    for body in bodies:
        name, draws = body.__name__.removeprefix("_"), body is _random_keep
        tags = (torch.Tag.nondeterministic_seeded,) if draws else ()
        _LIBRARY.define(name + torch.library.infer_schema(body, mutates_args=()), tags=tags)
        _LIBRARY.impl(name, body, "CPU")
        fake = (lambda x, shape, dtype, dropped: x.new_empty(shape, dtype=dtype)) if draws else body
        torch.library.register_fake(f"nanofuse_cpu::{name}", fake, lib=_LIBRARY)


_register()
