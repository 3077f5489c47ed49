"""embedding: segments of every length, and tokens at the vocabulary's ends and beyond. Its masks: test_dropout.py."""

import pytest
import torch

from kernels import FUSED, reference
from kernels.check import fault

embedding = FUSED.embedding


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
    tokens = tokens[torch.randperm(len(tokens))]
    wte, wpe = (torch.randn(rows, C).to(device).requires_grad_() for rows in (len(lengths), 1))
    inputs = {"idx": tokens[:, None].to(device), "wte": wte, "wpe": wpe, "dtype": torch.float32}
    assert not fault(embedding, reference.embedding, inputs)


@pytest.mark.parametrize("V", [2**15 - 1, 2**15, 2**15 + 1])
def test_the_keys_of_the_sort_hold_the_vocabularys_last_token(V: int, device: torch.device) -> None:
    idx = torch.tensor([[V - 1, 0, V - 1, 5, V - 2]], device=device)
    wte, wpe = (torch.randn(rows, 4, device=device, requires_grad=True) for rows in (V, 5))
    inputs = {"idx": idx, "wte": wte, "wpe": wpe, "dtype": torch.float32}
    assert not fault(embedding, reference.embedding, inputs)


def test_tokens_out_of_the_vocabulary_are_nan_and_read_nothing(device: torch.device) -> None:
    """The bounds of every access are watched meanwhile."""
    V, wte, wpe = 6, *(torch.randn(rows, 40, device=device, requires_grad=True) for rows in (6, 4))
    idx = torch.tensor([[0, V, 5, -1], [2**40, 3, -(2**40), 3]], device=device)
    bad = (idx < 0) | (idx >= V)
    x = embedding(idx, wte, wpe, torch.float32)
    assert x[bad].isnan().all()
    assert torch.equal(x[~bad], reference.embedding(idx.masked_fill(bad, 0), wte, wpe, torch.float32)[~bad])
    dwte, dwpe = torch.autograd.grad(x, (wte, wpe), torch.ones_like(x))
    assert torch.equal(dwpe, torch.full_like(dwpe, 2.0))
    counts = torch.bincount(idx[~bad], minlength=V)
    assert torch.equal(dwte, counts[:, None].expand(V, 40).float())
