"""The definitions themselves, and a CPU's operations: precision and dropout. Values in float64: tests/model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import cpu, reference


def test_layer_norm_statistics_are_float32() -> None:
    """A row about 1000 with deviations of 4, of which bfloat16 sums and squares would keep nothing."""
    x = (1000 + 4 * torch.randn(8, 512).round()).to(torch.bfloat16)
    y = reference.layer_norm(x, torch.ones(512, dtype=torch.bfloat16), None, torch.float32)
    assert y.dtype == torch.float32
    expected = (x.double() - x.double().mean(1, keepdim=True)) / x.double().std(1, correction=0, keepdim=True)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-4)


def test_a_tables_gradients_are_summed_in_float32() -> None:
    """In bfloat16 a sum of ones ends at 256."""
    table = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    x = cpu.embedding(torch.ones(2, 500, dtype=torch.int64), table)
    assert x.dtype == torch.float32
    x.sum().backward()
    assert table.grad.dtype == torch.bfloat16
    assert table.grad.tolist() == [[0.0] * 4, [1000.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("p", [2**-16, 0.1, 1 - 2**-16, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_all_values_of_16_bits_a_share_p_drops(
    p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others keep the mean. The gradient has the same mask."""
    every = np.random.default_rng(0).permutation(2**16).astype(np.uint16).view(np.uint64)
    monkeypatch.setattr(np.random, "SFC64", lambda seed: SimpleNamespace(random_raw=lambda n: every[:n].copy()))
    dropped = min(round(p * 2**16), 2**16 - 1)
    for shape in ((2**8, 2**8), (2**8 + 1, 2**8 - 1)):  # all of the bits, and all but one number
        x = torch.full(shape, 3.0, dtype=dtype, requires_grad=True)
        y = reference.dropout(x, p)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dropped - (y.numel() < 2**16) <= (y == 0).sum() <= dropped
        assert torch.equal(y == 0, dx == 0)
        assert torch.equal(y[y != 0], (x * (1 / (1 - dropped / 2**16))).detach()[y != 0])


def test_a_mask_depends_on_torchs_seed_alone() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        reference.dropout(torch.ones(2, 4), 0.0)
        masks.append(cpu.random_mask(torch.empty(2, dtype=torch.bfloat16), 0.5, (3, 67))[0])
    assert (masks[0].shape, masks[0].dtype) == ((3, 67), torch.bfloat16)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    torch.manual_seed(1)
    assert torch.equal(masks[0], cpu.random_mask(masks[0], 0.5)[0])  # the p of 0 took nothing from the generator


def test_compiled_calls_draw_the_masks_of_eager_ones() -> None:
    """As many calls, in the same order, though their arguments have equal shapes."""

    def masked(x: Tensor) -> list[Tensor]:
        parts = [x.sin(), x.cos(), x.tan()]
        return [part * cpu.random_mask(part, 0.5)[0] for part in parts]

    found = []
    for function in (masked, torch.compile(masked, backend="aot_eager_decomp_partition", fullgraph=True)):
        torch.manual_seed(1)
        x = torch.randn(40, 40).requires_grad_()
        results = function(x)
        sum(results).sum().backward()
        found.append([*(result == 0 for result in results), x.grad])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)
    assert not torch.equal(found[1][0], found[1][1])


@pytest.mark.parametrize("approximate", ["erf", "tanh"])
def test_a_compiled_gelu_has_the_bits_of_an_eager_one(approximate: str) -> None:
    x, dy = (torch.randn(50, 40).to(torch.bfloat16).requires_grad_() for _ in range(2))
    compiled = torch.compile(reference.gelu, backend="aot_eager_decomp_partition")
    eager, got = ((y, *torch.autograd.grad(y, x, dy)) for y in (f(x, approximate) for f in (reference.gelu, compiled)))
    assert all(torch.equal(a, b) for a, b in zip(eager, got, strict=True))


def test_compiled_graphs_on_disk_are_of_these_sources() -> None:
    assert torch.compiler.config.cache_key_tag.count("nanofuse-") == 1
