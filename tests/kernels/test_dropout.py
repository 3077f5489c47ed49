"""Dropout in embedding and add_layer_norm: masks predicted from their seeds, the same ones forward and backward."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import FUSED, add_layer_norm, reference
from kernels.check import fault

P = 0.3


def philox(counter: tuple[np.ndarray, ...], key: int) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 (Salmon et al. 2011) apart from Triton's own: four words for each counter of four words."""
    c = [word.astype(np.uint64) for word in counter]
    k = [key & 0xFFFFFFFF, key >> 32]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> shift) ^ c[1] ^ np.uint64(k[0]), p1 & low, (p0 >> shift) ^ c[3] ^ np.uint64(k[1]), p0 & low]
        k = [(word + weyl) & 0xFFFFFFFF for word, weyl in zip(k, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return tuple(c)


def predicted(rows: int, cols: int, device: torch.device) -> Tensor:
    """(rows, cols) bool: what the first operation after torch.manual_seed(7) keeps, by `kernels/fused/dropout.py`."""
    torch.manual_seed(7)
    seed = torch.randint(2**62, (1,), device=device).item()
    row, col = np.indices((rows, cols))
    zero = np.zeros_like(row)
    words = np.stack(philox((col // 4, row, zero, zero), seed))
    word = np.take_along_axis(words, (col % 4)[None], axis=0)[0]
    return torch.from_numpy((word >> np.uint64(8)) >= np.uint64(round(P * 2**24))).to(device)


def check_masks(operation: Callable, masked: Callable, inputs: dict, device: torch.device) -> None:
    """`masked` is the operation in plain torch, with the predicted mask."""

    def seeded(**inputs):
        torch.manual_seed(7)
        return operation(**inputs, p=P)

    assert not fault(seeded, masked, inputs)
    (first, *_), (second, *_) = seeded(**inputs), operation(**inputs, p=P)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("B", "T", "C", "dtype"),
    [  # two tokens, one of them rare, so that pieces of segments, their ends and sums over sequences all draw masks
        (2, 20, 37, torch.float32),
        (70, 1, 64, torch.bfloat16),
        (1, 3, 600, torch.float32),
    ],
)
def test_embedding_drops_what_its_seed_says(B: int, T: int, C: int, dtype: torch.dtype, device: torch.device) -> None:
    keep, idx = predicted(B * T, C, device).view(B, T, C), torch.zeros(B, T, device=device, dtype=torch.int32)
    idx[0, :2] = 1
    wte, wpe = (torch.randn(rows, C).to(device, dtype).requires_grad_() for rows in (2, T))

    def masked(idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype) -> Tensor:
        return reference.embedding(idx, wte, wpe, dtype) * keep / (1 - P)

    inputs = {"idx": idx, "wte": wte, "wpe": wpe, "dtype": torch.float32}
    check_masks(FUSED.embedding, masked, inputs, device)


@pytest.mark.parametrize(("M", "C", "x_dtype"), [(70, 37, torch.float32), (9, 600, torch.bfloat16)])
def test_add_layer_norm_drops_of_its_branch_what_its_seed_says(
    M: int, C: int, x_dtype: torch.dtype, device: torch.device
) -> None:
    keep = predicted(M, C, device)
    x, residual, weight = (torch.randn(size).to(device) for size in ((M, C), (M, C), (C,)))

    def masked(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = residual + (x * keep / (1 - P)).to(residual.dtype)
        return stream, reference.layer_norm(stream, weight, None, weight.dtype)

    def fused(x: Tensor, residual: Tensor, weight: Tensor, p: float) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, weight, None, torch.float32, p)

    inputs = {"x": x.to(x_dtype), "residual": residual, "weight": weight}
    check_masks(fused, masked, {name: value.requires_grad_() for name, value in inputs.items()}, device)


def test_compiled_it_draws_a_new_mask_for_each_call_and_the_same_one_backward(device: torch.device) -> None:
    x, residual = (torch.ones(8, 64, device=device, requires_grad=True) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager_decomp_partition")
    streams = []
    for _ in range(2):
        stream, _ = compiled(x, residual, torch.ones(64, device=device), None, torch.float32, 0.5)
        (dx,) = torch.autograd.grad(stream.sum(), x)
        assert torch.equal(dx == 0, stream == 1)  # dropped in both directions, or in neither
        streams.append(stream)
    assert not torch.equal(*streams)
