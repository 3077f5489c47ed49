"""embedding: dropout masks predicted from their seeds, segments of every length, and what the cases leave open."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.check import fault
from kernels.fused.embedding import embedding
from kernels.launch import INTERPRETED
from tests.kernels.layouts import Relay, laid_out
from tests.kernels.philox import keep_mask, philox

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tables(V: int, T: int, C: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(V + T)
    return {
        name: torch.randn(rows, C, generator=generator, device=device).to(dtype).requires_grad_()
        for name, rows in (("wte", V), ("wpe", T))
    }


layouts = st.sampled_from(["packed", "part of a larger table", "transposed"])


@pytest.mark.usefixtures("nan_filled")
@settings(deadline=None, max_examples=10)
@given(
    B=st.integers(0, 4),
    T=st.integers(0, 9),
    C=st.one_of(st.integers(1, 70), st.sampled_from([768, 1600])),
    V=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from(DTYPES),
    idx_dtype=st.sampled_from([torch.int64, torch.int32]),
    layout=st.tuples(layouts, layouts, layouts, st.one_of(layouts, st.just("the same everywhere"))),
)
@example(  # a column of a table, as when several sequences are sampled
    2, 1, 5, 9, torch.float32, torch.float32, torch.int64, ("part of a larger table", "packed", "packed", "packed")
)
def test_any_shape_stride_and_dtype(B, T, C, V, dtype, x_dtype, idx_dtype, layout) -> None:
    device = torch.device("cpu" if INTERPRETED else "cuda")
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(B * T)).to(device, idx_dtype)
    inputs = {"idx": laid_out(idx, layout[0]), "dtype": x_dtype}
    for (name, x), how in zip(tables(V, T, C, device, dtype).items(), layout[1:3], strict=True):
        inputs[name] = laid_out(x.detach(), how).requires_grad_()

    def relaid(function):
        return lambda **inputs: Relay.apply(function(**inputs), layout[3])

    assert not fault(relaid(embedding), relaid(reference.embedding), inputs)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lengths", [[1, 0, 32, 33], [31, 64, 2], [97, 65, 0], [130]], ids=str)
def test_segments_that_begin_and_end_anywhere(lengths: list[int], seed: int, device: torch.device) -> None:
    """Each token as often as `lengths` says, in any order: the pieces of the sorted rows are cut everywhere."""
    C = (5, 300)[seed]
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    wte, _ = tables(len(lengths), 1, C, device).values()
    wpe = wte.new_zeros(len(tokens), C)
    inputs = {"idx": tokens[None].to(device), "wte": wte, "wpe": wpe, "dtype": torch.float32}
    assert not fault(embedding, reference.embedding, inputs)


@pytest.mark.parametrize("V", [65, 2**15 - 1, 2**15, 2**15 + 1])
def test_the_keys_of_the_sort_hold_the_vocabularys_last_token(V: int, device: torch.device) -> None:
    idx = torch.randint(V, (1, 50), generator=torch.Generator().manual_seed(V)).to(device)
    idx[0, :3] = torch.tensor([V - 1, 0, V - 1], device=device)
    inputs = {"idx": idx, **tables(V, 50, 4, device), "dtype": torch.float32}
    assert not fault(embedding, reference.embedding, inputs)


def test_tokens_out_of_the_vocabulary_are_nan_and_read_nothing(device: torch.device) -> None:
    """The bounds of every access are watched meanwhile."""
    V, weights = 6, tables(6, 4, 40, device)
    idx = torch.tensor([[0, V, 5, -1], [2**40, 3, -(2**40), 3]], device=device)
    bad = (idx < 0) | (idx >= V)
    x = embedding(idx, **weights, dtype=torch.float32)
    assert x[bad].isnan().all()
    assert torch.equal(x[~bad], reference.embedding(idx.masked_fill(bad, 0), **weights, dtype=torch.float32)[~bad])
    dwte, dwpe = torch.autograd.grad(x, list(weights.values()), torch.ones_like(x))
    assert torch.equal(dwpe, torch.full_like(dwpe, 2.0))
    assert dwte.shape == (V, 40)
    counts = torch.bincount(idx[~bad], minlength=V)
    assert torch.equal(dwte, counts[:, None].expand(V, 40).float())


# Dropout


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that Random123 (Salmon et al.) is tested with, in its kat_vectors
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_predictor_is_philox(counter, key, words) -> None:
    assert tuple(int(word) for word in philox(tuple(np.array(c) for c in counter), key)) == words


@pytest.mark.parametrize(
    ("B", "T", "C", "dtype"), [(2, 50, 37, torch.float32), (70, 2, 64, torch.bfloat16), (1, 3, 600, torch.float32)]
)
def test_the_mask_is_philox_of_the_seed_forward_and_backward(B, T, C, dtype, device: torch.device) -> None:
    """p of 0.3; few tokens, so that pieces, ends and sums over sequences all draw masks."""
    p, V = 0.3, 2
    torch.manual_seed(7)
    seed = torch.randint(2**62, (1,), device=device)
    keep = torch.from_numpy(keep_mask(seed.item(), B * T, C, p)).view(B, T, C).to(device)
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(C)).to(device)

    def masked(idx, wte, wpe, dtype):
        return reference.embedding(idx, wte, wpe, dtype) * keep / (1 - p)

    def fused(idx, wte, wpe, dtype):
        torch.manual_seed(7)
        return embedding(idx, wte, wpe, dtype, p)

    inputs = {"idx": idx, **tables(V, T, C, device, dtype), "dtype": dtype}
    assert not fault(fused, masked, inputs)
    assert fused(**inputs)[~keep].eq(0).all()


def test_every_call_draws_a_new_mask_and_the_generator_repeats_them(device: torch.device) -> None:
    idx = torch.zeros(4, 10, device=device, dtype=torch.int64)
    wte, wpe = torch.ones(1, 100, device=device), torch.zeros(10, 100, device=device)

    def masks(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [embedding(idx, wte, wpe, torch.float32, 0.2) for _ in range(2)]

    first, second = masks(1)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip((first, second), masks(1), strict=True))
    assert set(first.unique().tolist()) == {0.0, 1.25}
    assert abs((first == 0).float().mean().item() - 0.2) < 0.03  # five standard deviations


# As ops


def test_opcheck(device: torch.device) -> None:
    seed, p = torch.tensor([3], device=device), 0.5
    idx, weights = torch.tensor([4, 0, 4, 1, 1, 4], device=device), tables(5, 3, 24, device)
    ops, dx = torch.ops.nanofuse, torch.ones(6, 24, device=device)
    torch.library.opcheck(ops.embedding.default, (idx, *weights.values(), torch.bfloat16, seed, p, True))
    dwte, dwpe = torch.zeros(5, 24, device=device), torch.zeros(4, 24, device=device)
    torch.library.opcheck(ops.embedding_dwte.default, (dx, idx, seed, p, dwte))
    torch.library.opcheck(ops.embedding_dwpe.default, (dx, seed, p, 3, dwpe, True))
