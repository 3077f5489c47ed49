"""mlp, by cuBLAS and by the fused matmul: what the registry's cases leave open."""

import pytest
import torch

from kernels import reference
from kernels.fused.matmul import (
    BACKWARD_TILES,
    FORWARD_TILES,
    INTERPRETED_TILES,
    Tiles,
    has_descriptors,
    linear_gelu,
    linear_gelu_backward,
)
from kernels.fused.mlp import mlp
from kernels.launch import INTERPRETED, Device, Launch, recording, run
from tests.kernels.test_cases import NAMED

HOPPER = Device(90, 132)


@pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
)
@pytest.mark.parametrize("tiles", INTERPRETED_TILES if INTERPRETED else FORWARD_TILES[90], ids=str)
def test_descriptors_move_what_pointers_do(tiles: Tiles, device: torch.device, nan_filled: None) -> None:
    """Of tiles that nothing fills."""
    inputs = NAMED["mlp, erf, cublas"].make_inputs((37, 48, 80), torch.bfloat16, device)
    x, weight, bias, proj_weight = (inputs[k].detach() for k in ("x", "fc_weight", "fc_bias", "proj_weight"))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    rounded = exact.to(x.dtype)
    leaf = rounded.double().requires_grad_()
    (slope,) = torch.autograd.grad(reference.gelu(leaf, "tanh"), leaf, x.double() @ proj_weight.double())
    with recording(Device(90, 2)) as launches:
        act, pre = linear_gelu(x, weight, bias, "erf", True, tiles)
        dpre, dbias = linear_gelu_backward(x, proj_weight, rounded, "tanh", True, tiles)
    assert [launch.args["TMA"] for launch in launches] == [True, True]
    run(x, *launches)
    for got, want in ((act, reference.gelu(exact, "erf")), (pre, exact), (dpre, slope)):
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(dbias.double().sum(0), slope.sum(0), rtol=1e-4, atol=1e-4)


def test_descriptors_are_used_where_addresses_and_strides_allow() -> None:
    x = torch.empty(64, 64, dtype=torch.bfloat16)
    assert has_descriptors(HOPPER, x, None, x[:, 8:], x[:1])
    assert not has_descriptors(Device(89, 128), x)
    assert not has_descriptors(HOPPER, x, x[:, 1:])  # an address
    assert not has_descriptors(HOPPER, x, x.new_empty(64, 37))  # a stride
    assert not has_descriptors(HOPPER, x[:1].expand(64, 64))  # rows that are the same one
    assert not has_descriptors(HOPPER, x[:0])


def launched(forward_tiles: int, backward_tiles: int, K: int = 64, N: int = 128, first: int = 0) -> list[Launch]:
    """What an MLP launches on an H100 that is not there, forward and backward. first: columns before the weights."""
    x, fc_weight, proj_weight = (
        torch.empty(rows, columns + 16, dtype=torch.bfloat16, device="meta")[:, begin : begin + columns]
        for rows, columns, begin in ((4, K, 0), (N, K, first), (K, N, first))
    )
    x.requires_grad_()
    with recording(HOPPER) as launches:
        tiles = {"forward_tiles": forward_tiles, "backward_tiles": backward_tiles}
        mlp(x, fc_weight, None, proj_weight, None, "tanh", **tiles).sum().backward()
    return launches


@pytest.mark.parametrize(("forward", "backward"), [(0, 2), (2, 1), (1, 0)])
def test_forward_and_backward_go_each_by_their_own_tiles(forward: int, backward: int) -> None:
    asked = (forward, FORWARD_TILES[90], "gelu_fwd_kernel"), (backward, BACKWARD_TILES[90], "gelu_bwd_kernel")
    for launch, (n, tiles, kernel) in zip(launched(forward, backward), asked, strict=True):
        assert launch.kernel.fn.__name__ == ("linear_" if n else "") + kernel
        assert launch.args["TANH"]
        if n:
            sizes = [launch.args[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
            assert Tiles(*sizes, launch.num_warps, launch.num_stages, tiles[n - 1].programs) == tiles[n - 1]


@pytest.mark.parametrize(("K", "N", "first"), [(37, 128, 0), (64, 40, 0), (64, 128, 1)])
def test_rows_that_are_not_aligned_are_cublass(K: int, N: int, first: int) -> None:
    """Through pointers to them the fused kernel would spill, on a GPU."""
    launched(0, 0, K, N, first)
    for tiles in ((1, 0), (0, 1)):
        with pytest.raises(ValueError, match="tiles: got rows that do not begin at multiples of 16 elements"):
            launched(*tiles, K, N, first)
