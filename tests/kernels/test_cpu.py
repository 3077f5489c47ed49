"""A CPU's operations: values and gradients against float64, masks that differ from call to call."""

import math

import pytest
import torch
from torch import Tensor

from kernels import cpu, reference

EPSILON = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize(("T", "p"), [(1, 0.5), (13, 0.0), (70, 0.3)])
def test_attention_is_the_formula_with_the_mask_that_was_drawn(dtype: torch.dtype, T: int, p: float) -> None:
    B, H, Q = 2, 3, 8
    packed, dy = draw(B, T, 3, H, Q, dtype=dtype).requires_grad_(), draw(B, T, H, Q, dtype=dtype)
    torch.manual_seed(5)
    y = cpu.attention(packed, p)
    (gradient,) = torch.autograd.grad(y, packed, dy)

    torch.manual_seed(5)
    keep, scale = cpu.random_mask(packed, p, (B, H, T, T))
    exact = packed.detach().double().requires_grad_()
    q, k, v = exact.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / math.sqrt(Q) + torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
    want = ((scores.softmax(-1) * keep.double() * scale) @ v).transpose(1, 2)
    (wanted,) = torch.autograd.grad(want, exact, dy.double())
    for got, true in ((y, want), (gradient, wanted)):
        assert got.dtype == dtype
        assert (got.double() - true).abs().max() <= EPSILON[dtype] * true.abs().max()


def test_a_mask_depends_on_torchs_seed_alone() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(cpu.random_mask(torch.empty(2, dtype=torch.bfloat16), 0.5, (3, 67))[0])
    assert (masks[0].shape, masks[0].dtype) == ((3, 67), torch.bfloat16)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_compiled_calls_draw_the_masks_of_eager_ones() -> None:
    """As many calls, in the same order, though their arguments have equal shapes."""

    def masked(x: Tensor) -> list[Tensor]:
        parts = [x.sin(), x.cos(), x.tan()]
        return [part * cpu.random_mask(part, 0.5)[0] for part in parts]

    found = []
    for function in (masked, torch.compile(masked, backend="aot_eager_decomp_partition", fullgraph=True)):
        torch.manual_seed(1)
        x = draw(40, 40).requires_grad_()
        results = function(x)
        sum(results).sum().backward()
        found.append([*(result == 0 for result in results), x.grad])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)
    assert not torch.equal(found[1][0], found[1][1])


@pytest.mark.parametrize("approximate", ["erf", "tanh"])
def test_a_compiled_gelu_has_the_bits_of_an_eager_one(approximate: str) -> None:
    x, dy = draw(50, 40, dtype=torch.bfloat16).requires_grad_(), draw(50, 40, dtype=torch.bfloat16)
    compiled = torch.compile(reference.gelu, backend="aot_eager_decomp_partition")
    eager, got = ((y, *torch.autograd.grad(y, x, dy)) for y in (f(x, approximate) for f in (reference.gelu, compiled)))
    assert all(torch.equal(a, b) for a, b in zip(eager, got, strict=True))


def test_compiled_graphs_on_disk_are_of_these_sources() -> None:
    assert torch.compiler.config.cache_key_tag.count("nanofuse-") == 1


def test_a_tables_gradients_are_summed_in_float32() -> None:
    """In bfloat16 a sum of ones ends at 256."""
    table = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    x = cpu.embedding(torch.ones(2, 500, dtype=torch.int64), table)
    assert x.dtype == torch.float32
    x.sum().backward()
    assert table.grad.dtype == torch.bfloat16
    assert table.grad.tolist() == [[0.0] * 4, [1000.0] * 4, [0.0] * 4]
