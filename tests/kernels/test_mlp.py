"""mlp, by cuBLAS and by the fused matmul: what the registry's cases leave open."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.check import fault
from kernels.fused import mlp as module
from kernels.fused.gelu import FORMS
from kernels.fused.matmul import BACKWARD_TILES, FORWARD_TILES, Tiles, has_descriptors
from kernels.fused.mlp import mlp, ways
from kernels.launch import INTERPRETED, Device, Launch, recording, run
from tests.kernels.layouts import Relay, laid_out
from tests.kernels.test_layer_norm import layouts
from tests.kernels.watcher import Memory
from train import dryrun

CUBLAS = {"forward_tiles": 0, "backward_tiles": 0}
FUSED = {"forward_tiles": 1, "backward_tiles": 1}
BOTH = (CUBLAS, FUSED)
paths = pytest.mark.parametrize("path", BOTH, ids=["cublas", "fused"])
SMALL = Tiles(16, 32, 16, 4, 2, 1)


def drawn(M: int, K: int, N: int, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> dict[str, Any]:
    """The inputs of mlp, on the device that tests run on."""
    generator, device = torch.Generator().manual_seed(0), "cpu" if INTERPRETED else "cuda"

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype).requires_grad_()

    return {
        "x": randn(M, K),
        "fc_weight": randn(N, K, scale=2 * K**-0.5),
        "fc_bias": randn(N) if bias else None,
        "proj_weight": randn(K, N, scale=N**-0.5),
        "proj_bias": randn(K) if bias else None,
        "approximate": "erf",
    }


# Shapes, strides, dtypes


@pytest.mark.usefixtures("nan_filled")
@settings(deadline=None, max_examples=16)
@given(
    lead=st.one_of(st.tuples(), st.tuples(st.integers(0, 70)), st.tuples(st.integers(0, 3), st.integers(0, 20))),
    K=st.integers(1, 40),
    N=st.integers(1, 70),
    layout=st.tuples(layouts, layouts, layouts, st.one_of(layouts, st.just("the same everywhere"))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.sampled_from([None, "packed", "apart"]),
    approximate=st.sampled_from(FORMS),
    path=st.sampled_from(BOTH),
)
def test_any_shape_stride_and_dtype(lead, K, N, layout, dtype, bias, approximate, path) -> None:
    inputs = drawn(1, K, N, dtype, bias=bias is not None) | {"approximate": approximate}
    inputs["x"] = torch.randn((*lead, K), generator=torch.Generator().manual_seed(1)).to(inputs["fc_weight"])
    for name, how in zip(("x", "fc_weight", "proj_weight"), layout, strict=False):
        if inputs[name].ndim > 1 or how == "sliced":
            inputs[name] = laid_out(inputs[name].detach(), how)
        inputs[name] = inputs[name].detach().requires_grad_()
    if bias == "apart":  # of stride 2
        for name in ("fc_bias", "proj_bias"):
            twice = torch.stack([inputs[name].detach(), torch.zeros_like(inputs[name])], dim=1)
            inputs[name] = twice[:, 0].requires_grad_()
    assert not fault(
        lambda **kwargs: Relay.apply(mlp(**kwargs, **path), layout[3]),
        lambda **kwargs: Relay.apply(reference.mlp(**kwargs), layout[3]),
        inputs,
    )


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the case's own tests see M of 32 x 1024 rows")
def test_rows_two_to_the_31st_elements_apart() -> None:
    """A row number times a stride, each of 32 bits, of more bits."""

    def apart(x: Tensor) -> Tensor:
        return torch.empty(2**31 + 64, dtype=x.dtype).as_strided(x.shape, (2**30, 1)).copy_(x)

    x, weight = (torch.randn(3, 24).to(torch.bfloat16) for _ in range(2))
    expected = module.forward(x, weight, None, "erf", True, SMALL)
    for far in ((apart(x), weight), (x, apart(weight))):
        for got, want in zip(module.forward(*far, None, "erf", True, SMALL), expected, strict=True):
            assert torch.equal(got, want)
    dy, pre = x[:, :3], torch.randn(3, 24).to(torch.bfloat16)
    expected, _ = module.backward(dy, weight, pre, "erf", False, SMALL)
    for far in ((apart(dy), weight), (dy, apart(weight))):
        assert torch.equal(module.backward(*far, pre, "erf", False, SMALL)[0], expected)


# Tensor descriptors

DESCRIPTORS = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
)


@DESCRIPTORS
@pytest.mark.parametrize(
    ("M", "K", "N"),
    [
        (37, 48, 80),  # nothing fills its tile
        (150, 16, 48),  # more rows of tiles than are taken together
    ],
)
@pytest.mark.parametrize("tiles", [SMALL, Tiles(16, 32, 16, 4, 2, 2)] if INTERPRETED else FORWARD_TILES[90], ids=str)
def test_descriptors_move_what_pointers_do(M: int, K: int, N: int, tiles: Tiles, nan_filled: None) -> None:
    inputs = drawn(M, K, N, torch.bfloat16)
    x, weight, bias, proj_weight = (inputs[k].detach() for k in ("x", "fc_weight", "fc_bias", "proj_weight"))
    with recording(Device(90, 2)) as launches:
        act, pre = module.forward(x, weight, bias, "erf", True, tiles)
    assert [launch.constants["TMA"] for launch in launches] == [True]
    run(x, *launches)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(act.double(), reference.gelu(exact, "erf"), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(pre.double(), exact, rtol=2**-8, atol=1e-5)

    pre = exact.to(x.dtype)
    with recording(Device(90, 2)) as launches:
        dpre, _ = module.backward(x, proj_weight, pre, "tanh", True, tiles)
    assert [launch.constants["TMA"] for launch in launches] == [True]
    run(x, *launches)
    leaf = pre.double().requires_grad_()
    act = reference.gelu(leaf, "tanh")
    (exact,) = torch.autograd.grad(act, leaf, x.double() @ proj_weight.double())
    torch.testing.assert_close(dpre.double(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(launches[0].args["dbias_ptr"].double().sum(0), exact.sum(0), rtol=1e-4, atol=1e-4)


def test_descriptors_are_used_where_addresses_and_strides_allow() -> None:
    x = torch.empty(64, 64, dtype=torch.bfloat16)
    hopper, blackwell = Device(90, 132), Device(120, 170)
    assert has_descriptors(hopper, x, None, x[:, 8:], x[:1])
    assert has_descriptors(blackwell, x)
    assert not has_descriptors(Device(89, 128), x)
    assert not has_descriptors(hopper, x, x[:, 1:])  # an address
    assert not has_descriptors(hopper, x, x.new_empty(64, 37))  # a stride
    assert not has_descriptors(hopper, x[:1].expand(64, 64))  # rows that are the same one
    assert not has_descriptors(hopper, x[:0])


# What is computed


@paths
def test_nothing_is_kept_where_nothing_needs_a_gradient(path: dict[str, int], memory: Memory | None) -> None:
    inputs = drawn(37, 24, 40, torch.bfloat16)
    expected = mlp(**inputs, **path)
    assert expected.requires_grad
    stored = memory.stored if memory else 0
    with torch.no_grad():
        assert torch.equal(mlp(**inputs, **path), expected)
    assert memory is None or memory.stored - stored == 37 * 40 * 2  # act, not pre
    frozen = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    assert torch.equal(mlp(**frozen, **path), expected)
    assert memory is None or memory.stored - stored == 2 * 37 * 40 * 2


@paths
def test_float32_is_not_rounded_to_fewer_bits(path: dict[str, int]) -> None:
    """As TF32 tensor cores would."""
    inputs = drawn(32, 512, 48)
    inputs["x"] = inputs["x"].detach() + 1e-5  # bits beyond the tenth
    assert not fault(lambda **i: mlp(**i, **path), reference.mlp, inputs)


@paths
@pytest.mark.parametrize("bias", [True, False])
def test_registered_as_torch_wants_it(path: dict[str, int], bias: bool) -> None:
    x, fc_weight, fc_bias, *proj, approximate = drawn(5, 16, 24, bias=bias).values()
    ops = torch.ops.nanofuse
    for keep in (True, False):
        # without what is kept there is no backward to check
        checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
        checks = checks if keep else checks[:2]
        torch.library.opcheck(
            ops.mlp, (x, fc_weight, fc_bias, *proj, approximate, keep, *path.values()), test_utils=checks
        )
    pre = torch.randn(5, 24, device=x.device)
    torch.library.opcheck(
        ops.mlp_dpre,
        (x.detach(), proj[0].detach(), pre, approximate, bias, path["backward_tiles"], pre.new_empty(0), False),
    )


def launched(
    forward_tiles: int, backward_tiles: int, K: int = 64, N: int = 128, capability: int = 90, first: int = 0
) -> list[Launch]:
    """What an MLP launches on a GPU that is not there, forward and backward. first: columns before the weights."""
    x, fc_weight, proj_weight = (
        torch.empty(rows, columns + 16, dtype=torch.bfloat16, device="meta")[
            :, begin : begin + columns
        ].requires_grad_()
        for rows, columns, begin in ((4, K, 0), (N, K, first), (K, N, first))
    )
    with dryrun.Recorder(Device(capability, 132), "meta") as recorder:
        tiles = {"forward_tiles": forward_tiles, "backward_tiles": backward_tiles}
        mlp(x, fc_weight, None, proj_weight, None, "erf", **tiles).sum().backward()
    return recorder.launches


@pytest.mark.parametrize("capability", [80, 90])
def test_forward_and_backward_go_each_by_their_own_tiles(capability: int) -> None:
    for f, forward in enumerate([None, *FORWARD_TILES[capability]]):
        for b, backward in enumerate([None, *BACKWARD_TILES[capability]]):
            first, second = launched(f, b, capability=capability)
            for launch, tiles, kernel in ((first, forward, "fwd_kernel"), (second, backward, "bwd_kernel")):
                assert launch.kernel.fn.__name__ == ("gelu_" if tiles is None else "linear_gelu_") + kernel
                if tiles is not None:
                    sizes = [launch.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
                    assert Tiles(*sizes, launch.num_warps, launch.num_stages, tiles.programs) == tiles


def test_the_ways_are_named_in_the_order_of_their_numbers() -> None:
    with recording(Device(90, 132)):
        forward, backward = ways(torch.empty(0, dtype=torch.bfloat16, device="meta"))
        assert forward == backward == ["cuBLAS", "fused 128x256x64 (8 warps)", "fused 128x128x64 (4 warps)"]
        assert [len(names) for names in ways(torch.empty(0, device="meta"))] == [2, 2]
    for capability in FORWARD_TILES:
        with recording(Device(capability, 132)):
            for names in ways(torch.empty(0, dtype=torch.float16, device="meta")):
                assert len(set(names)) == len(names) == 3


@pytest.mark.parametrize(("K", "N", "first"), [(37, 128, 0), (64, 37, 0), (64, 40, 0), (64, 128, 1)])
@pytest.mark.parametrize("capability", [80, 90])
def test_rows_that_are_not_aligned_are_cublass(K: int, N: int, first: int, capability: int) -> None:
    """Through pointers to them the fused kernel would spill, on a GPU."""
    launched(0, 0, K, N, capability, first)
    launched(1, 1, 64, 128, capability, first=0)
    for tiles in ((1, 0), (0, 1)):
        with pytest.raises(ValueError, match="tiles: got rows that do not begin at multiples of 16 elements"):
            launched(*tiles, K, N, capability, first)
