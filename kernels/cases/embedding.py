"""Cases of the embedding. Tokens follow Zipf's law, as a text's do: the k-th most common is k times rarer."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels import embedding, reference, traffic
from kernels.cases.case import Case, Shape, Traffic, draw

# (B, T, C, V)
SHAPES = (
    (2, 9, 37, 11),  # nothing fills a block; fewer rows than a piece
    (3, 77, 64, 3),  # long segments: whole pieces inside them; the last row of one piece belongs to another token
    (9, 3, 600, 50),  # several tiles of sequences, the last one ragged; most tokens are not there
    (1, 1, 1600, 2),  # one row, gpt2-xl's width
)
GPT_SHAPES = ((32, 1024, 768, 50304), (64, 256, 384, 65), (8, 1024, 1600, 50304))


@lru_cache
def _tokens(B: int, T: int, V: int) -> Tensor:
    uniform = torch.rand(B, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((V + 1) ** uniform).long() - 1


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    randn, (B, T, C, V) = draw(device), shape
    wte, wpe = randn(V, C, dtype=dtype), randn(T, C, dtype=dtype)
    return {"idx": _tokens(B, T, V).to(device), "wte": wte, "wpe": wpe, "dtype": dtype}


def _forward_bytes(shape: Shape, dtype: torch.dtype) -> Traffic:
    (B, T, C, V), b = shape, dtype.itemsize
    M, distinct = B * T, _tokens(B, T, V).unique().numel()
    dram = traffic.embedding_forward(M, T, C, b, b, distinct=distinct)
    return Traffic(dram, (2 * M - distinct - T) * C * b)


def _backward_bytes(shape: Shape, dtype: torch.dtype) -> Traffic:
    (B, T, C, V), b = shape, dtype.itemsize
    M, N = B * T, B * T // embedding.PIECE
    tokens = _tokens(B, T, V).flatten().sort().values[: N * embedding.PIECE].view(N, embedding.PIECE)
    summed = (tokens[:, 0] == tokens[:, -1]).sum().item()  # pieces that hold one token
    key = 2 if V < 2**15 else 4
    sorting = 8 * M + 8 * V + 2 * key * N  # each row's place, each segment's ends, each piece's
    dram = traffic.embedding_backward(M, T, C, V, b, b)
    return Traffic(dram, M * C * b + sorting + 2 * summed * 4 * C)  # dx again, for wpe


CASES = [
    Case(
        name="embedding",
        fused=embedding.embedding,
        reference=reference.embedding,
        make_inputs=_inputs,
        shapes=SHAPES,
        gpt_shapes=GPT_SHAPES,
        forward_bytes=_forward_bytes,
        backward_bytes=_backward_bytes,
    )
]
