"""The definitions themselves: precision and dropout. Their values in float64: tests/model/test_gpt_values.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels import reference


def test_layer_norm_statistics_are_float32() -> None:
    """A row about 1000 with deviations of 4, of which bfloat16 sums and squares would keep nothing."""
    x = (1000 + 4 * torch.randn(8, 512).round()).to(torch.bfloat16)
    y = reference.layer_norm(x, torch.ones(512, dtype=torch.bfloat16), None, torch.float32)
    assert y.dtype == torch.float32
    expected = (x.double() - x.double().mean(1, keepdim=True)) / x.double().std(1, correction=0, keepdim=True)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("p", [2**-16, 0.1, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_and_its_gradient_has_its_mask(p: float, dtype: torch.dtype) -> None:
    """Down to the smallest share that 16 random bits can drop, or keep."""
    torch.manual_seed(3)
    x = torch.full((1001, 1001), 3.0, dtype=dtype, requires_grad=True)
    y = reference.dropout(x, p)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y == 0, dx == 0)
    share = round(p * 2**16) / 2**16 if p < 1 - 2**-16 else 1 - 2**-16
    assert torch.equal(y[y != 0], (x * (1 / (1 - share))).detach()[y != 0])
    assert abs((y == 0).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / y.numel())


@pytest.mark.parametrize("p", [2**-16, 0.1, 1 - 2**-16])
def test_of_all_values_of_16_bits_a_share_p_drops(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.uint64)
    monkeypatch.setattr(np.random, "SFC64", lambda seed: SimpleNamespace(random_raw=lambda n: every))
    assert (reference.dropout(torch.ones(2**16), p) == 0).sum() == round(p * 2**16)


def test_dropout_of_0_takes_nothing_from_the_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    reference.dropout(torch.ones(2, 4), 0.0)
    assert torch.equal(torch.rand(1), expected)
