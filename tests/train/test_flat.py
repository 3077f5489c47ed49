"""The flat state: fused operations put each gradient in its place, where autograd alone would bring the same."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from kernels import FUSED, Ops
from model import GPT, GPTConfig, Precision
from train.flat import FlatState

B, T = 2, 12


def batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(70, (2, B, T), generator=torch.Generator().manual_seed(seed))
    tokens[1, 0, 3] = -1  # does not count
    return tokens[0], tokens[1]


def make(ops: Ops, dtype: torch.dtype, recompute: str = "none", **shape: bool | float) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=70, n_layer=2, n_head=2, n_embd=32, **shape)
    model = GPT(config, ops, precision=Precision(dtype), recompute=recompute)
    for p in model.parameters():  # biases and LayerNorms' weights that differ
        torch.nn.init.normal_(p, std=0.1)
    return model


def backward(model: GPT, seed: int, dloss: float) -> None:
    torch.manual_seed(seed)  # dropout's seeds
    upstream = torch.tensor(dloss)
    model(*batch(seed), dloss=upstream)[1].backward(upstream)


def by_autograd(model: GPT, seeds: list[int], dloss: float) -> dict[str, Tensor]:
    for seed in seeds:
        backward(model, seed, dloss)
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("bias", "dropout", "chunk_rows", "recompute"),
    [(True, 0.0, 0, "none"), (False, 0.2, 0, "block"), (False, 0.0, 7, "mlp")],
)
def test_gradients_are_put_in_place(
    dtype: torch.dtype, several: bool, bias: bool, dropout: float, chunk_rows: int, recompute: str
) -> None:
    """What an earlier step left there is overwritten, or was cleared and is added to. Positions that no batch reaches
    get zeros."""
    loss = functools.partial(FUSED.linear_cross_entropy, chunk_rows=chunk_rows)
    ops = dataclasses.replace(FUSED, linear_cross_entropy=loss)
    seeds, dloss = ([1, 2], 0.5) if several else ([1], 1.0)
    expected = by_autograd(make(ops, dtype, bias=bias, dropout=dropout), seeds, dloss)

    model = make(ops, dtype, recompute, bias=bias, dropout=dropout)
    flat = FlatState(model, ops, several=several)
    names = {p: name for name, p in model.named_parameters()}
    flat.grad.fill_(0.0 if several else 7.0)
    for seed in seeds:
        backward(model, seed, dloss)
        flat.gather()
    assert flat.overwrites == (not several)
    assert flat.grad.dtype == (torch.float32 if several else dtype)
    assert all(leaf.grad is None for leaf in flat.leaves)
    for p in flat.places:
        got, want = flat.view(flat.grad, p).float(), expected[names[p]].float()
        assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * want.norm(), names[p]


def test_what_no_operation_puts_in_place_is_autograds() -> None:
    """Kernels of one's own, or a model that has no optimizer of ours: gradients come as from any operation."""
    model = make(FUSED, torch.float32)
    backward(model, 1, 1.0)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
