"""Dropout in embedding and add_layer_norm: masks predicted from their seeds, the same ones forward and backward."""

from typing import Any

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


@pytest.mark.parametrize(("B", "T", "C", "x_dtype"), [(35, 2, 37, torch.float32), (1, 9, 600, torch.bfloat16)])
@pytest.mark.parametrize("operation", ["embedding", "add_layer_norm"])
def test_what_drops_is_what_the_seed_says(
    operation: str, B: int, T: int, C: int, x_dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward; of two tokens, one of them rare, so that pieces of segments and their ends draw masks."""
    keep, x = predicted(B * T, C, device), torch.randn(B * T, C).to(device, x_dtype).requires_grad_()
    monkeypatch.setattr(reference, "dropout", lambda x, p: x * keep.view(x.shape) / (1 - p))
    if operation == "embedding":
        idx = torch.zeros(B, T, device=device, dtype=torch.int32)
        idx[0, :2] = 1
        inputs = {"idx": idx, "wte": x[:2].detach().requires_grad_(), "wpe": x[-T:].detach().requires_grad_()}
    else:
        residual, weight = (torch.randn(size, device=device, requires_grad=True) for size in (x.shape, (C,)))
        inputs = {"x": x, "residual": residual, "weight": weight, "bias": None}
    inputs |= {"dtype": torch.float32, "p": P}
    fused = getattr(FUSED, operation)

    def seeded(**inputs: Any) -> Any:
        torch.manual_seed(7)
        return fused(**inputs)

    assert not fault(seeded, getattr(reference, operation), inputs)
    (first, *_), (second, *_) = seeded(**inputs), fused(**inputs)
    assert not torch.equal(first, second)


def test_compiled_it_draws_a_new_mask_for_each_call_and_the_same_one_backward(device: torch.device) -> None:
    x, residual = (torch.ones(8, 64, device=device, requires_grad=True) for _ in range(2))
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager_decomp_partition")
    streams = []
    for _ in range(2):
        stream, _ = compiled(x, residual, torch.ones(64, device=device), None, torch.float32, 0.5)
        (dx,) = torch.autograd.grad(stream.sum(), x)
        assert torch.equal(dx == 0, stream == 1)  # dropped in both directions, or in neither
        streams.append(stream)
    assert not torch.equal(*streams)
