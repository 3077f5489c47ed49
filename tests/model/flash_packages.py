"""Stand-ins for the flash-attn packages, which run on GPUs only: their calls and layouts, in plain torch on any device.

As in flash_attn 2 and 3, the kernels are registered operations, and the gradients of a packed qkv are written into one
tensor of its layout. flash_attn 4 is a function that torch.compile cannot look into.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

got: list[Tensor] = []  # what the functions were called with
dqkvs: list[Tensor] = []  # what the packed backward wrote


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
def forward(qkv: Tensor, p: float) -> Tensor:
    q, k, v = qkv.unbind(2)
    return torch.einsum("bhts,bshq->bthq", dropout(softmax(q, k), p), v).contiguous()


@torch.library.custom_op("stand_in::backward", mutates_args=())
def backward(dy: Tensor, qkv: Tensor, p: float) -> Tensor:
    q, k, v = qkv.unbind(2)
    weights = softmax(q, k)
    dweights = dropout(torch.einsum("bthq,bshq->bhts", dy, v), p)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * q.size(-1) ** -0.5
    dq = torch.einsum("bhts,bshq->bthq", dscores, k)
    dk = torch.einsum("bhts,bthq->bshq", dscores, q)
    dv = torch.einsum("bhts,bthq->bshq", dropout(weights, p), dy)
    return torch.stack([dq, dk, dv], dim=2)


def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    qkv, ctx.p = inputs
    ctx.save_for_backward(qkv)


def gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    dqkv = backward(dy, *ctx.saved_tensors, ctx.p)
    if not torch.compiler.is_compiling():
        dqkvs.append(dqkv)
    return dqkv, None


forward.register_fake(lambda qkv, p: qkv.new_empty(qkv[:, :, 0].shape))
backward.register_fake(lambda dy, qkv, p: qkv.new_empty(qkv.shape))
forward.register_autograd(gradient, setup_context=setup_context)


def two(qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    assert causal
    assert softmax_scale is None
    if not torch.compiler.is_compiling():
        got.append(qkv)
    return forward(qkv, dropout_p)


def three(qkv: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    return two(qkv, 0.0, softmax_scale, causal)


def four(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    assert causal
    got.extend((q, k, v))
    weights = softmax(q, k)
    return torch.einsum("bhts,bshq->bthq", weights, v).contiguous(), weights.detach().sum(-1)


PACKAGES = {
    "flash_attn": {"flash_attn_qkvpacked_func": two},
    "flash_attn.cute": {"flash_attn_func": four},
    "flash_attn_interface": {"flash_attn_qkvpacked_func": three},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packages be importable until the test ends."""
    got.clear()
    dqkvs.clear()
    for name, functions in PACKAGES.items():
        module = ModuleType(name)
        vars(module).update(functions, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let none of them be importable."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
