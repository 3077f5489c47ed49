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
dropped: list[float] = []  # the dropout that was asked for; here nothing is dropped
dqkvs: list[Tensor] = []  # what the packed backward wrote

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, Q) -> (B, H, T, Q) of each, and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


@torch.library.custom_op("stand_in::forward", mutates_args=())
def forward(qkv: Tensor) -> Tensor:
    y, _ = ATTENTION(*heads_first(*qkv.unbind(2)), 0.0, True)
    return y.transpose(1, 2).contiguous()


@torch.library.custom_op("stand_in::backward", mutates_args=())
def backward(dy: Tensor, qkv: Tensor) -> Tensor:
    dy, q, k, v = heads_first(dy, *qkv.unbind(2))
    y, sums = ATTENTION(q, k, v, 0.0, True)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dy, q, k, v, y, sums, 0.0, True)
    return torch.stack(heads_first(*gradients), dim=2)


def gradient(ctx: Any, dy: Tensor) -> Tensor:
    dqkv = backward(dy, *ctx.saved_tensors)
    if not torch.compiler.is_compiling():
        dqkvs.append(dqkv)
    return dqkv


forward.register_fake(lambda qkv: qkv.new_empty(qkv[:, :, 0].shape))
backward.register_fake(lambda dy, qkv: qkv.new_empty(qkv.shape))
forward.register_autograd(gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def two(qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    assert causal
    assert softmax_scale is None
    if not torch.compiler.is_compiling():
        got.append(qkv)
        dropped.append(dropout_p)
    return forward(qkv)


def three(qkv: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    return two(qkv, 0.0, softmax_scale, causal)


def four(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    assert causal
    got.extend((q, k, v))
    y, sums = ATTENTION(*heads_first(q, k, v), 0.0, True)
    return y.transpose(1, 2), sums


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
