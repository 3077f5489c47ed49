"""Stand-ins for the flash-attn packages, which run on GPUs only: their calls and layouts, in plain torch."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

got: list[Tensor] = []  # what the functions were called with
dropped: list[float] = []  # the dropout that was asked for; here nothing is dropped
dqkvs: list[Tensor] = []  # the gradients of packed tensors


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, True)
    return y.transpose(1, 2), sums


def two(qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    assert causal
    assert softmax_scale is None
    got.append(qkv)
    dropped.append(dropout_p)
    if qkv.requires_grad:
        qkv.register_hook(dqkvs.append)
    return attend(*qkv.unbind(2))[0]


def three(qkv: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    return two(qkv, 0.0, softmax_scale, causal)


def four(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    assert causal
    assert not torch.compiler.is_compiling()  # the compiler cannot look into it
    got.extend((q, k, v))
    return attend(q, k, v)


PACKAGES = {
    "flash_attn": {"flash_attn_qkvpacked_func": two},
    "flash_attn.cute": {"flash_attn_func": four},
    "flash_attn_interface": {"flash_attn_qkvpacked_func": three},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packages be importable until the test ends."""
    for seen in (got, dropped, dqkvs):
        seen.clear()
    for name, functions in PACKAGES.items():
        module = ModuleType(name)
        vars(module).update(functions, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let none of them be importable."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
