"""embedding: segments of every length, and tokens at the vocabulary's ends and beyond. Its masks: test_dropout.py."""

from typing import Any

import pytest
import torch

from kernels import FUSED, reference
from kernels.check import fault

embedding = FUSED.embedding


def inputs(idx: torch.Tensor, V: int, C: int, device: torch.device) -> dict[str, Any]:
    wte, wpe = (torch.randn(rows, C).to(device).requires_grad_() for rows in (V, idx.shape[1]))
    return {"idx": idx.to(device), "wte": wte, "wpe": wpe, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("lengths", "C"),
    [
        ([1, 0, 32, 33], 5),  # a whole piece, and one too much; of pieces that others begin
        ([31, 64, 2], 300),  # a piece that ends with another token; a row left on each side
        ([130], 5),  # several pieces
    ],
)
def test_segments_that_begin_and_end_anywhere(lengths: list[int], C: int, device: torch.device) -> None:
    """Each token as often as `lengths` says, in any order: the pieces of the sorted rows are cut everywhere."""
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    idx = tokens[torch.randperm(len(tokens))][:, None]
    assert not fault(embedding, reference.embedding, inputs(idx, len(lengths), C, device))


@pytest.mark.parametrize("V", [2**15 - 1, 2**15, 2**15 + 1])
def test_the_keys_of_the_sort_hold_the_vocabularys_last_token(V: int, device: torch.device) -> None:
    idx = torch.tensor([[V - 1, 0, V - 1, 5, V - 2]])
    assert not fault(embedding, reference.embedding, inputs(idx, V, 4, device))


def test_tokens_out_of_the_vocabulary_are_nan_and_read_nothing(device: torch.device) -> None:
    """The bounds of every access are watched meanwhile."""
    V = 6
    given = inputs(torch.tensor([[0, V, 5, -1], [2**40, 3, -(2**40), 3]]), V, 40, device)
    idx, x = given["idx"], embedding(**given)
    bad = (idx < 0) | (idx >= V)
    assert x[bad].isnan().all()
    assert torch.equal(x[~bad], reference.embedding(**given | {"idx": idx.masked_fill(bad, 0)})[~bad])
    dwte, dwpe = torch.autograd.grad(x, (given["wte"], given["wpe"]), torch.ones_like(x))
    assert torch.equal(dwpe, torch.full_like(dwpe, 2.0))
    counts = torch.bincount(idx[~bad], minlength=V)
    assert torch.equal(dwte, counts[:, None].expand(V, 40).float())
