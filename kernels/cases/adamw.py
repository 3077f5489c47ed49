"""Cases of AdamW over flat buffers. They work on copies of the state: a case must be able to run twice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import adamw, reference, traffic
from kernels.cases.case import Case, Shape, Traffic, draw
from kernels.launch import INTERPRETER, Device

# (n, n_decay)
SHAPES = (
    (1, 1),  # one element
    (1000, 601),  # the boundary of the decay inside a tile; the last tile ragged
    (70_001, 33_333),  # every program of both kernels takes several tiles in Triton's interpreter
    (12_288, 0),  # whole tiles, three programs of the norm kernel in float32: no power of two; nothing decays
)
GPT_SHAPES = ((124_373_760, 124_354_560), (10_745_088, 10_740_096))  # GPT-2 124M without biases; shakespeare_char


def _on_copies(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def stepped(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        lr: Tensor,
        step: Tensor,
        compute: Tensor | None,
        **settings: Any,
    ) -> tuple[Tensor | None, ...]:
        param, exp_avg, exp_avg_sq, step = param.clone(), exp_avg.clone(), exp_avg_sq.clone(), step.clone()
        compute = None if compute is None else compute.clone()
        norm, found_inf = function(param, grad, exp_avg, exp_avg_sq, lr, step, compute=compute, **settings)
        return param, exp_avg, exp_avg_sq, step, compute, norm, found_inf

    return stepped


def _inputs(*, copy: bool, scaled: bool, max_norm: float):
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        randn, (n, n_decay) = draw(device), shape

        def scalar(value: float) -> Tensor:
            return torch.tensor(value, device=device)

        return {
            "param": randn(n, dtype=torch.float32, scale=0.02, grad=False),
            "grad": randn(n, dtype=dtype, scale=0.5, grad=False),
            "exp_avg": randn(n, dtype=torch.float32, scale=0.01, grad=False),
            "exp_avg_sq": randn(n, dtype=torch.float32, scale=0.01, grad=False).square_(),
            "lr": scalar(6e-4),
            "step": scalar(9.0),
            "compute": randn(n, dtype=_copy_dtype(dtype), grad=False) if copy else None,
            "inv_scale": scalar(2.0**-7) if scaled else None,
            "n_decay": n_decay,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "max_norm": max_norm,
        }

    return make_inputs


def _copy_dtype(gradient: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if gradient == torch.float32 else gradient


def _bytes(*, copy: bool, scaled: bool):
    def forward_bytes(shape: Shape, dtype: torch.dtype, device: Device = INTERPRETER) -> Traffic:
        n, b = shape[0], dtype.itemsize
        P = adamw.norm_programs(device, torch.empty(n, dtype=dtype, device="meta"))
        programs = adamw.update_programs(device, n)
        dram = traffic.adamw(n, b, copy=_copy_dtype(dtype).itemsize if copy else 0)
        norm_kernel = n * b + 4 * P + 12 + 4  # the partial sums and scalars; step, a second time
        every_program = 4 * P + 12 + 4 * scaled
        return Traffic(dram, norm_kernel + programs * every_program)

    return forward_bytes


def _case(name: str, *, copy: bool, scaled: bool, max_norm: float) -> Case:
    return Case(
        name=name,
        fused=_on_copies(adamw.adamw),
        reference=_on_copies(reference.adamw),
        make_inputs=_inputs(copy=copy, scaled=scaled, max_norm=max_norm),
        shapes=SHAPES,
        gpt_shapes=GPT_SHAPES,
        forward_bytes=_bytes(copy=copy, scaled=scaled),
    )


CASES = [
    _case("adamw", copy=False, scaled=False, max_norm=1.0),
    _case("adamw with a loss scale and a copy", copy=True, scaled=True, max_norm=1e-3),
    _case("adamw without clipping, with a copy", copy=True, scaled=False, max_norm=0.0),
]
