"""The definitions themselves: precision, dropout, the loss. Their values in float64: tests/model/test_gpt_values.py."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import REFERENCE, Ops, reference

BFLOAT16 = torch.finfo(torch.bfloat16).eps
FLOAT32 = torch.finfo(torch.float32).eps
dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 8 * FLOAT32), (torch.bfloat16, BFLOAT16)],
    ids=["float64", "float32", "bfloat16"],
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every element within `tolerance` of the largest: one rounding, relative to it."""
    assert expected.dtype == torch.float64
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0)


def true_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.double()
    mean = x.sum(-1, keepdim=True) / x.size(-1)
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.size(-1)
    y = (x - mean) / torch.sqrt(variance + 1e-5) * weight.double()
    return y if bias is None else y + bias.double()


def true_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    losses = []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        if target != ignore_index:
            top = row.max()
            losses.append(top + (row - top).exp().sum().log() - row[target])
    return torch.stack(losses).mean()


# The bundle


def test_the_bundle_is_frozen_and_whole():
    for field in dataclasses.fields(Ops)[1:]:
        if field.default is None:  # only fused operations have it
            assert getattr(REFERENCE, field.name) is None
            continue
        assert getattr(REFERENCE, field.name) is getattr(reference, field.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFERENCE.linear = None
    with pytest.raises(TypeError):
        Ops(name="half")


# Embedding


# LayerNorm


def test_layer_norm_statistics_are_float32():
    """A row about 1000 with deviations of 4, of which bfloat16 sums and squares would keep nothing."""
    x = (1000 + 4 * draw(8, 512).round()).to(torch.bfloat16)
    one = torch.ones(512)
    y = reference.layer_norm(x, one, None, torch.float32)
    assert y.dtype == torch.float32
    assert_near(y, true_norm(x, one, None), 2e-4)
    assert y.mean(-1).abs().max() < 1e-4


# The residual connection


def test_add_layer_norm_adds_in_float32():
    residual, _ = REFERENCE.add_layer_norm(
        torch.full((1, 4), 0.125, dtype=torch.bfloat16), torch.full((1, 4), 512.0), torch.ones(4), None, torch.bfloat16
    )
    assert residual.eq(512.125).all()  # bfloat16 has no number between 512 and 516


@pytest.mark.parametrize("p", [0.125, 0.5])
def test_add_layer_norm_drops_the_branch_alone(p):
    x, stream, n = torch.full((300, 64), 3.0), draw(300, 64), 300 * 64
    weight = draw(64, seed=2)
    residual, y = REFERENCE.add_layer_norm(x, stream, weight, None, torch.float32, p)
    branch = residual - stream
    dropped = branch == 0
    torch.testing.assert_close(branch[~dropped], torch.full_like(branch[~dropped], 3 / (1 - p)))
    assert abs(dropped.float().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert abs(branch.mean() / 3 - 1) < 5 * math.sqrt(p / (1 - p) / n)  # the mean is kept
    assert_near(y, true_norm(residual, weight, None), 8 * FLOAT32)


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 2**-16, 1 - 1e-9])
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


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 2**-16])
def test_of_all_values_of_16_bits_a_share_p_drops(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.uint64)
    monkeypatch.setattr(np.random, "SFC64", lambda seed: SimpleNamespace(random_raw=lambda n: every))
    assert (reference.dropout(torch.ones(2**16), p) == 0).sum() == round(p * 2**16)


def test_dropout_of_0_takes_nothing_from_the_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    REFERENCE.add_layer_norm(draw(2, 4), draw(2, 4), torch.ones(4), None, torch.float32, 0.0)
    REFERENCE.embedding(torch.zeros(1, 2, dtype=torch.int64), draw(3, 4), draw(2, 4), torch.float32, 0.0)
    assert torch.equal(torch.rand(1), expected)


# GELU


# Cross-entropy


@dtypes
@pytest.mark.parametrize("ignore_index", [-1, -100, 3])
def test_cross_entropy(dtype, tolerance, ignore_index):
    logits = 5 * draw(13, 10, dtype=dtype)
    targets = torch.arange(13) % 10
    targets[[2, 7]] = ignore_index
    loss = reference.cross_entropy(logits, targets, ignore_index)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    expected = true_cross_entropy(logits, targets, ignore_index)
    assert_near(loss, expected, min(tolerance, 8 * FLOAT32))  # float32 inside, whatever the logits' dtype


def test_cross_entropy_survives_large_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 3e38, 0.0]])
    loss = reference.cross_entropy(logits, torch.tensor([0, 1]))
    assert loss == 0
    assert reference.cross_entropy(logits[:1], torch.tensor([1])) == 1e4


def test_cross_entropy_of_nothing_is_nan():
    assert reference.cross_entropy(draw(2, 4), torch.tensor([-1, -1])).isnan()
