"""layer_norm and add_layer_norm: what the registry's cases leave open."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import add_layer_norm, layer_norm, reference
from kernels.check import fault
from kernels.launch import INTERPRETED
from tests.kernels.layouts import Relay, laid_out
from tests.kernels.philox import keep_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


layouts = st.sampled_from(["packed", "sliced", "transposed", "one row for all"])


@pytest.mark.usefixtures("nan_filled")
@settings(deadline=None, max_examples=20)
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 9), st.integers(1, 70)),
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 70)),
    ),
    layout=st.tuples(layouts, layouts, layouts),
    # the stream in float32 or in x's dtype: elsewhere torch rounds x first, and its error on few elements is a lottery
    x_dtype=st.sampled_from(DTYPES),
    wide_stream=st.booleans(),
    y_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    offset=st.sampled_from([0.0, 4.0]),
)
def test_any_shape_stride_and_dtype(shape, layout, x_dtype, wide_stream, y_dtype, bias, offset) -> None:
    torch.manual_seed(0)
    device = "cpu" if INTERPRETED else "cuda"
    C, stream_dtype = shape[-1], torch.float32 if wide_stream else x_dtype
    x, residual = (torch.randn(shape, device=device) + offset for _ in range(2))
    inputs = {
        "x": laid_out(x.to(x_dtype), layout[0]).detach().requires_grad_(),
        "residual": laid_out(residual.to(stream_dtype), layout[1]).detach().requires_grad_(),
        "weight": torch.randn(C, device=device, requires_grad=True),
        "bias": torch.randn(C, device=device, requires_grad=True) if bias else None,
        "dtype": y_dtype,
    }

    def relaid(function):
        def gradients_of_any_stride(**kwargs):
            stream, y = function(**kwargs)
            return stream, Relay.apply(y, layout[2])

        return gradients_of_any_stride

    assert not fault(relaid(add_layer_norm), relaid(reference.add_layer_norm), inputs, summands=1.0)


@pytest.mark.parametrize("used", [0, 1], ids=["the stream", "the normalised"])
def test_one_output_may_go_unused(used: int, device: torch.device) -> None:
    x, residual = (torch.randn(6, 48, device=device, requires_grad=True) for _ in range(2))
    gradients = []
    for function in (add_layer_norm, reference.add_layer_norm):
        output = function(x, residual, torch.ones(48).to(x), None, torch.float32)[used]
        gradients.append(torch.autograd.grad(output.square().sum(), (x, residual)))
    torch.testing.assert_close(*gradients)


def test_a_mean_far_from_zero_costs_no_more_than_its_own_rounding(device: torch.device) -> None:
    x = torch.randn(4, 256, device=device) + 1000.0  # half an ulp is 3e-5; a difference of squares would be off by 0.1
    weight = torch.ones(256, device=device)
    expected = reference.layer_norm(x.double(), weight.double(), None, torch.float64)
    torch.testing.assert_close(layer_norm(x, weight, None, torch.float32).double(), expected, rtol=0, atol=3e-4)


def test_values_that_are_no_numbers_stay_in_their_row(device: torch.device) -> None:
    x = torch.randn(5, 40, device=device)
    x[1, 3], x[2, 0], x[3] = torch.inf, torch.nan, 7.0
    y = layer_norm(x, torch.ones(40, device=device), None, torch.float32)
    assert y[1].isnan().any()
    assert y[2].isnan().all()
    assert torch.equal(y[3], torch.zeros_like(y[3]))  # no variance at all: eps, not a division by zero
    expected = reference.layer_norm(x, torch.ones(40, device=device), None, torch.float32)
    torch.testing.assert_close(y[[0, 4]], expected[[0, 4]])


# Dropout


@pytest.mark.parametrize(("M", "C", "x_dtype"), [(70, 37, torch.float32), (9, 600, torch.bfloat16)])
def test_the_mask_is_philox_of_the_seed_forward_and_backward(M: int, C: int, x_dtype: torch.dtype, device) -> None:
    p = 0.3
    torch.manual_seed(5)
    x = torch.randn(M, C, device=device).to(x_dtype).requires_grad_()
    residual, weight = (torch.randn(size, device=device, requires_grad=True) for size in ((M, C), (C,)))
    torch.manual_seed(7)
    seed = torch.randint(2**62, (1,), device=device)
    keep = torch.from_numpy(keep_mask(seed.item(), M, C, p)).to(device)

    def masked(x, residual, weight):
        stream = residual + (x * keep / (1 - p)).to(residual.dtype)
        return stream, reference.layer_norm(stream, weight, None, weight.dtype)

    def fused(x, residual, weight):
        torch.manual_seed(7)
        return add_layer_norm(x, residual, weight, None, torch.float32, p)

    assert not fault(fused, masked, {"x": x, "residual": residual, "weight": weight})


def test_every_call_draws_a_new_mask_and_the_generator_repeats_them(device: torch.device) -> None:
    x, residual, weight = torch.ones(40, 100, device=device), torch.zeros(40, 100, device=device), torch.ones(100)
    weight = weight.to(device)

    def masks(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [add_layer_norm(x, residual, weight, None, torch.float32, 0.2)[0] for _ in range(2)]

    first, second = masks(1)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip((first, second), masks(1), strict=True))
    assert abs((first == 0).float().mean().item() - 0.2) < 0.03  # five standard deviations


def test_where_nothing_is_added_the_stream_stays_and_is_copied_only_for_its_gradient(device: torch.device) -> None:
    residual, weight = torch.randn(6, 48, device=device, requires_grad=True), torch.randn(48, device=device)
    stream, y = add_layer_norm(None, residual, weight, None, torch.float32, p=0.5)  # there is nothing to drop
    assert torch.equal(stream, residual)
    torch.testing.assert_close(y, reference.layer_norm(residual, weight, None, torch.float32))
    with torch.no_grad():
        assert add_layer_norm(None, residual, weight, None, torch.float32)[0] is residual


# As an op


@pytest.mark.parametrize(
    ("p", "bias", "x_dtype", "stream"),
    [
        (0.5, False, torch.bfloat16, True),
        pytest.param(0.0, True, None, False, marks=pytest.mark.slow),
        pytest.param(0.0, True, None, True, marks=pytest.mark.slow),
    ],
)
def test_opcheck(p: float, bias: bool, x_dtype: torch.dtype | None, stream: bool, device: torch.device) -> None:
    seed = torch.tensor([3], device=device) if p else None
    x = None if x_dtype is None else torch.randn(4, 24, device=device).to(x_dtype).requires_grad_()
    residual, weight = (torch.randn(size, device=device, requires_grad=True) for size in ((4, 24), (24,)))
    b = torch.randn(24, device=device, requires_grad=True) if bias else None
    arguments = (x, residual, weight, b, seed if x is not None else None, p if x is not None else 0.0, torch.bfloat16)
    arguments += (stream,)
    torch.library.opcheck(torch.ops.nanofuse.add_layer_norm.default, arguments)
    with torch.no_grad():
        _, y, mean, rstd = torch.ops.nanofuse.add_layer_norm(*arguments)
    backward = (torch.ones_like(y), None, residual.detach(), weight.detach(), mean, rstd, arguments[4], arguments[5])
    torch.library.opcheck(
        torch.ops.nanofuse.add_layer_norm_backward.default, (*backward, x_dtype, bias, torch.empty(0, device=device))
    )


def test_compiled_with_dropout(device: torch.device, compiler: None) -> None:
    x, residual = (torch.ones(8, 64, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(64, device=device)
    torch.compiler.reset()
    compiled = torch.compile(add_layer_norm, fullgraph=True)
    streams = []
    for _ in range(2):
        stream, _ = compiled(x, residual, weight, None, torch.float32, 0.5)
        (dx,) = torch.autograd.grad(stream.sum(), x)
        assert torch.equal(dx == 0, stream == 1)  # dropped in both directions, or in neither
        streams.append(stream)
    assert not torch.equal(*streams)
