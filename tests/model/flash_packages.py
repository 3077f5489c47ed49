"""Stand-ins for the flash-attn packages, which run on GPUs only: their calls and layouts, in plain torch on any device.

As in flash_attn 2 and 3, the kernels are registered operations, and the gradients of a packed qkv are written into one
tensor of its layout. flash_attn 4 is a function that torch.compile cannot look into.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

got: list[Tensor] = []  # what the functions were called with
dqkvs: list[Tensor] = []  # what the packed backward wrote
traced: list[str] = []  # into what the compiler looked that it would not understand


def softmax(q: Tensor, k: Tensor) -> Tensor:
    """(B, T, H, Q) -> (B, H, T, T)."""
    scores = torch.einsum("bthq,bshq->bhts", q, k) * q.size(-1) ** -0.5
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, float("-inf")).softmax(-1)


def dropout(weights: Tensor, p: float) -> Tensor:
    """The same mask each time."""
    kept = torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)) >= p
    return weights * kept / (1 - p)


@torch.library.custom_op("stand_in::forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return torch.einsum("bhts,bshq->bthq", dropout(softmax(q, k), p), v).contiguous()


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("stand_in::backward", mutates_args=("dq", "dk", "dv"))
def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, p: float) -> None:
    weights = softmax(q, k)
    dweights = dropout(torch.einsum("bthq,bshq->bhts", dy, v), p)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * q.size(-1) ** -0.5
    dq.copy_(torch.einsum("bhts,bshq->bthq", dscores, k))
    dk.copy_(torch.einsum("bhts,bthq->bshq", dscores, q))
    dv.copy_(torch.einsum("bhts,bthq->bshq", dropout(weights, p), dy))


@backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, p: float) -> None:
    return None


class Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, p: float) -> Tensor:
        q, k, v = qkv.unbind(2)
        ctx.save_for_backward(q, k, v)
        ctx.p = p
        return forward(q, k, v, p)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        q, k, v = ctx.saved_tensors
        B, T, H, Q = q.shape
        dqkv = torch.empty(B, T, 3, H, Q, dtype=q.dtype, device=q.device)
        dq, dk, dv = dqkv.unbind(2)
        backward(dy, q, k, v, dq, dk, dv, ctx.p)
        if not torch.compiler.is_compiling():
            dqkvs.append(dqkv)
        return dqkv, None


def seen(*tensors: Tensor) -> None:
    if not torch.compiler.is_compiling():
        got.extend(tensors)


def two(qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    assert causal
    assert softmax_scale is None
    seen(qkv)
    return Packed.apply(qkv, dropout_p)


def three(qkv: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    assert causal
    assert softmax_scale is None
    seen(qkv)
    return Packed.apply(qkv, 0.0)


def four(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    assert causal
    if torch.compiler.is_compiling():
        traced.append("four")
    seen(q, k, v)
    weights = softmax(q, k)
    return torch.einsum("bhts,bshq->bthq", weights, v).contiguous(), weights.detach().sum(-1)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packages be importable until the test ends."""
    got.clear()
    dqkvs.clear()
    traced.clear()
    for name, functions in {
        "flash_attn": {"flash_attn_qkvpacked_func": two},
        "flash_attn.cute": {"flash_attn_func": four},
        "flash_attn_interface": {"flash_attn_qkvpacked_func": three},
    }.items():
        module = ModuleType(name)
        vars(module).update(functions, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let none of them be importable."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
