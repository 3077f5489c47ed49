"""Dropout masks that are recomputed, never stored: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3") of (seed, row, column).

The seed is one int64 in device memory, so that a captured graph draws new masks at every replay. Element (row, col) is
kept where the top 24 bits of word col % 4 of Philox(key=seed, counter=(col // 4, row, 0, 0)) are at least p * 2^24:
one evaluation serves four neighbours.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import refusal


@triton.jit
def keep_mask(seed, o_row, threshold, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool: which columns 0 … BLOCK_N of rows o_row (BLOCK_M,) int32 are kept. BLOCK_N >= 4."""
    o_quad = tl.arange(0, BLOCK_N // 4)
    zero = tl.zeros((o_row.shape[0], BLOCK_N // 4), dtype=tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zero + o_quad[None, :], zero + o_row[:, None], zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (M, N/4, 2, 2), the last index running fastest: w0 w1 w2 w3
    return (words.reshape(o_row.shape[0], BLOCK_N) >> 8).to(tl.int32) >= threshold


def seeds(n: int, device: torch.device) -> tuple[Tensor, ...]:
    """Seeds for n calls of operations, from one draw of torch's generator. Each begins at a multiple of 16 bytes, so
    that Triton compiles its kernels once."""
    return torch.randint(2**62, (n, 2), device=device).unbind()


def seed_for(x: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    """The seed of one call of an op on x: the given one, or a new one; None if nothing is dropped.

    ValueError unless 0 <= p < 1.
    """
    if not 0.0 <= p < 1.0:
        raise refusal("p", p, "0 or more and less than 1")
    if p == 0:
        return None
    return seeds(1, x.device)[0] if seed is None else seed


def dropout_args(seed: Tensor | None, p: float) -> dict[str, Any]:
    """What a kernel is launched with: the seed, what `keep_mask` compares 24 random bits with, and 1 / (1 - p)."""
    return dict(seed_ptr=seed, threshold=round(p * 2**24), scale=1 / (1 - p))
