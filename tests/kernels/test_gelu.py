"""gelu: what the registry's cases leave open. The sum of its gradient's rows is seen in test_mlp.py."""

import math

import pytest
import torch

from kernels import gelu, reference
from kernels.check import in_float64, outputs_and_gradients

forms = pytest.mark.parametrize("approximate", ["erf", "tanh"])


@forms
def test_everywhere_as_near_to_the_truth_in_float32_as_torch(approximate: str, device: torch.device) -> None:
    """Within twice torch's own largest error in each unit of x: torch's worst unit does not excuse the others."""
    x = torch.stack([torch.linspace(first, first + 1, 401) for first in range(-8, 8)]).to(device)
    inputs = {"x": x.requires_grad_(), "approximate": approximate}
    fused, plain = (outputs_and_gradients(function, inputs) for function in (gelu, reference.gelu))
    exact = outputs_and_gradients(reference.gelu, in_float64(inputs))
    for name, got in fused.items():
        error, torchs = ((y.double() - exact[name]).abs().amax(1) for y in (got, plain[name]))
        allowed = 2 * torchs + torch.finfo(torch.float32).eps * exact[name].abs().amax(1)
        allowed += 1e-12  # far left torch is 0, in float64 too
        assert (error <= allowed).all(), f"{name}: units of x are off by {error.tolist()}, torch by {torchs.tolist()}"


@pytest.mark.parametrize(("approximate", "tolerance"), [("erf", 2e-5), ("tanh", 2e-4)])
def test_the_left_tail_keeps_its_digits(approximate: str, tolerance: float, device: torch.device) -> None:
    """1 + erf(x / sqrt(2)) has none left at -6, nor has 1 + tanh: the truth is written out."""
    x = torch.linspace(-6.0, -2.0, 4001, device=device)
    wide = x.double()
    if approximate == "erf":
        exact = 0.5 * wide * torch.erfc(-wide / math.sqrt(2))
    else:
        exact = wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))
    assert ((gelu(x, approximate).double() - exact) / exact).abs().max() < tolerance


@forms
def test_far_out_it_is_its_limit_and_a_nan_stays_one(approximate: str, device: torch.device) -> None:
    large = torch.tensor([16.0, 100.0, 1e5, 1e13, 1e30, 3.4e38, math.inf, math.nan], device=device)
    one, nothing = torch.ones_like(large), torch.zeros_like(large)
    one[-1] = nothing[-1] = math.nan
    for x, value, slope in ((large, large, one), (-large, nothing, nothing)):
        x = x.requires_grad_()
        y = gelu(x, approximate)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(x))
        torch.testing.assert_close((y, gradient), (value, slope), rtol=0, atol=0, equal_nan=True)
