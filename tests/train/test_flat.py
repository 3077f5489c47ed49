"""The flat state: fused operations put each gradient in its place, where autograd alone would bring the same."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from kernels import FUSED, REFERENCE, Ops
from model import GPT
from tests.model.test_fused import DEVICE
from tests.train.steps import small_model
from train.flat import FlatState

B, T = 2, 13  # more rows than a program of a kernel takes: sums over rows are made of several parts


def batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(70, (2, B, T), generator=torch.Generator().manual_seed(seed))
    tokens[1, 0, 3] = -1  # does not count
    return tuple(tokens.to(DEVICE))


def make(ops: Ops, dtype: torch.dtype, recompute: str = "none", **shape: bool | float) -> GPT:
    large = dict(block_size=16, vocab_size=70, n_layer=2, n_embd=32)
    model = small_model(ops, dtype=dtype, recompute=recompute, **large, **shape)
    for p in model.parameters():  # biases and LayerNorms' weights that differ
        torch.nn.init.normal_(p, std=0.1)
    return model.to(DEVICE)


def backward(model: GPT, seed: int, dloss: Tensor, known: Tensor | None) -> None:
    torch.manual_seed(seed)  # dropout's seeds
    model(*batch(seed), dloss=known)[1].backward(dloss)


def by_autograd(model: GPT, seeds: list[int], dloss: Tensor, known: Tensor | None = None) -> dict[str, Tensor]:
    """As for a model without an optimizer of ours. known: what the forward pass is told of the loss's gradient."""
    for seed in seeds:
        backward(model, seed, dloss, known)
    return {name: p.grad for name, p in model.named_parameters()}


# In the interpreter each takes a second. Chunks and biases meet one gradient and several.
@pytest.mark.parametrize(
    ("ops", "dtype", "several", "bias", "dropout", "chunk_rows", "recompute"),
    [
        (FUSED, torch.float32, False, True, 0.0, 7, "mlp"),
        (FUSED, torch.float32, True, False, 0.2, 0, "block"),
        (FUSED, torch.bfloat16, False, False, 0.2, 0, "none"),
        (FUSED, torch.bfloat16, True, True, 0.0, 7, "none"),
        (REFERENCE, torch.bfloat16, False, True, 0.0, 0, "none"),
        (REFERENCE, torch.float32, True, True, 0.0, 0, "none"),
    ],
)
def test_gradients_are_put_in_place(ops, dtype, several, bias, dropout, chunk_rows, recompute):
    """By fused operations, or gathered from autograd. What an earlier step left there is overwritten, or was cleared
    and is added to. Positions that no batch reaches get zeros. In bfloat16 they are together no further from float32's
    than autograd's are. Rounding has more luck with one parameter than with another: up to 1.7 times, so 3 times is
    allowed of one."""
    loss = functools.partial(ops.linear_cross_entropy, chunk_rows=chunk_rows)
    ops = dataclasses.replace(ops, linear_cross_entropy=loss)
    seeds, dloss = [1, 2] if several else [1], torch.tensor(0.3, device=DEVICE)
    exact = expected = by_autograd(make(ops, torch.float32, bias=bias, dropout=dropout), seeds, dloss)
    if dtype != torch.float32:
        expected = by_autograd(make(ops, dtype, bias=bias, dropout=dropout), seeds, dloss, known=dloss)

    model = make(ops, dtype, recompute, bias=bias, dropout=dropout)
    flat = FlatState(model, ops, several=several)
    names = {p: name for name, p in model.named_parameters()}
    flat.grad.fill_(0.0 if several else 7.0)
    for seed in seeds:
        backward(model, seed, dloss, known=dloss)  # as in a training step
        flat.gather()
    assert flat.grad.dtype == (torch.float32 if several else dtype)
    assert all(leaf.grad is None for leaf in flat.leaves)
    errors = torch.zeros(2, len(flat.places))  # of ours, of autograd's, by parameter
    for i, p in enumerate(flat.places):
        got, want, true = flat.view(flat.grad, p), expected[names[p]], exact[names[p]]
        errors[:, i] = torch.stack([(got - true).norm(), (want - true).norm()]) / true.norm()
        assert errors[0, i] <= 3 * errors[1, i] + 1e-5, names[p]
    ours, autograds = errors.norm(dim=1) / len(flat.places) ** 0.5
    assert ours <= 1.1 * autograds + 1e-5
