"""adamw: skipped steps, and what the registry's cases leave open. Beside torch.optim: tests/train/test_step.py."""

import math

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.check import fault, outputs_and_gradients
from kernels.fused.adamw import adamw
from tests.kernels.test_cases import NAMED

EPS = torch.finfo(torch.float32).eps
implementations = pytest.mark.parametrize("function", [adamw, reference.adamw], ids=["fused", "reference"])


def made(n: int, device: torch.device, dtype: torch.dtype = torch.float32, **changes) -> dict:
    """Arguments of adamw in the middle of a run, as in a case of the registry."""
    return NAMED["adamw with a loss scale and a copy"].make_inputs((n, n // 3), dtype, device) | changes


@implementations
@pytest.mark.parametrize(
    ("betas", "updates"), [((0.0, 0.5), 0), ((0.9, 0.999), 20.0), ((0.9999, 0.95), 1.0), ((0.8, 0.999999), 999_999)]
)
def test_bias_corrections_to_millions_of_steps(function, betas, updates, device, nan_filled: None) -> None:
    """From nothing, with a gradient of 1, the update is made of the two corrections alone. Step counts may be int64."""
    state = {name: torch.zeros(1, device=device) for name in ("param", "exp_avg", "exp_avg_sq")}
    grad, lr = torch.ones(1, device=device), torch.ones((), device=device)
    step = torch.tensor(updates, device=device)
    plain = dict(n_decay=1, eps=0.0, weight_decay=0.0, max_norm=0.0, inv_scale=None, compute=None)
    function(**state, grad=grad, lr=lr, step=step, betas=betas, **plain)
    m, v = ((1 - beta) / -math.expm1((updates + 1) * math.log(beta)) if beta else 1.0 for beta in betas)
    assert state["param"].item() == pytest.approx(-m / math.sqrt(v), rel=4 * EPS)
    assert step.item() == updates + 1


def test_a_constant_gradient_keeps_its_moments(device: torch.device) -> None:
    """A float32 beta2 of 0.999 would lead them to 1.000013 times their value."""
    grad = torch.tensor([3.0, -0.3, 1e-4], device=device)
    plain = dict(betas=(0.9, 0.999), inv_scale=None, max_norm=0.0)
    got = outputs_and_gradients(adamw, made(3, device, grad=grad, exp_avg=grad, exp_avg_sq=grad * grad, **plain))
    assert torch.equal(got["exp_avg"], grad)
    assert torch.equal(got["exp_avg_sq"], grad * grad)


@pytest.mark.parametrize(
    ("n", "dtype", "changes"),
    [
        (0, torch.float32, {"max_norm": 1.0, "inv_scale": None, "compute": None}),  # a norm of 0
        (7, torch.float16, {"max_norm": 1e6}),  # a norm below the largest
        (1030, torch.bfloat16, {"max_norm": 0.01}),
    ],
)
def test_of_a_gradient_only_every_second_element_is_read(n, dtype, changes, device, nan_filled: None) -> None:
    def spread(grad: Tensor, **others) -> tuple[Tensor, Tensor]:
        return adamw(grad=torch.stack([grad, torch.zeros_like(grad)], 1)[:, 0], **others)

    arguments = made(n, device, dtype, **{"inv_scale": torch.tensor(0.3, device=device)} | changes)
    assert not fault(spread, reference.adamw, arguments)


@implementations
@pytest.mark.parametrize(
    ("value", "inv_scale", "max_norm"),
    [
        (torch.nan, 1.0, 1.0),
        (1e30, 1.0, 0.0),  # its square is infinite
        (1.0, torch.inf, 1.0),
    ],
)
def test_nothing_changes_where_the_norm_is_no_number(function, value, inv_scale, max_norm, device) -> None:
    scales = dict(max_norm=max_norm, inv_scale=torch.tensor(inv_scale, device=device))
    arguments = made(1030, device, torch.float16, **scales)
    if function is reference.adamw:  # it writes the copy once more, the kernel writes nothing
        arguments["compute"].copy_(arguments["param"])
    arguments["grad"] = arguments["grad"].float().index_fill(0, torch.tensor(1029, device=device), value)
    got = outputs_and_gradients(function, arguments)
    for name in ("param", "exp_avg", "exp_avg_sq", "step", "compute"):
        torch.testing.assert_close(got[name], arguments[name], rtol=0, atol=0)
    assert got["output 1"] == 1
    assert not got["output 0"].isfinite()
