"""gelu and bias_gelu: what the registry's cases leave open."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import gelu as module
from kernels import reference
from kernels.check import in_float64, outputs_and_gradients
from kernels.gelu import FORMS, bias_gelu, gelu
from kernels.launch import INTERPRETED, device_of, run
from tests.kernels.checks import assert_as_good_as_torch
from tests.kernels.layouts import Relay, laid_out
from tests.kernels.memory import Memory
from tests.kernels.test_layer_norm import layouts

forms = pytest.mark.parametrize("approximate", FORMS)


def slope(function, x: Tensor, approximate: str) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x, approximate).sum(), x)
    return gradient


# Accuracy


@forms
def test_everywhere_as_near_to_the_truth_in_float32_as_torch(approximate: str, device: torch.device) -> None:
    """Within twice torch's own largest error in each unit of x: torch's worst unit does not excuse the others."""
    for first in range(-8, 8):
        x = torch.linspace(first, first + 1, 2001, device=device)[None]
        inputs = {"x": x.requires_grad_(), "approximate": approximate}
        fused, plain = (outputs_and_gradients(function, inputs) for function in (gelu, reference.gelu))
        exact = outputs_and_gradients(reference.gelu, in_float64(inputs))
        for name, got in fused.items():
            error, torchs = ((y.double() - exact[name]).abs().max().item() for y in (got, plain[name]))
            allowed = 2 * torchs + torch.finfo(torch.float32).eps * exact[name].abs().max().item()
            allowed += 1e-12  # far left torch is nought, in float64 too
            assert error <= allowed, f"{name} in [{first}, {first + 1}]: off by {error:.3g}, torch {torchs:.3g}"


@pytest.mark.parametrize(("approximate", "tolerance"), [("erf", 2e-5), ("tanh", 2e-4)])
def test_the_left_tail_keeps_its_digits(approximate: str, tolerance: float, device: torch.device) -> None:
    """1 + erf(x / sqrt(2)) has none left at -6, nor has 1 + tanh: the truth is written out."""
    x = torch.linspace(-6.0, -2.0, 4001, dtype=torch.float64, device=device).float()[None]
    wide = x.double()
    if approximate == "erf":
        exact = 0.5 * wide * torch.erfc(-wide / math.sqrt(2))
    else:
        exact = wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))
    assert ((gelu(x, approximate).double() - exact) / exact).abs().max() < tolerance


@forms
def test_far_out_it_is_its_limit(approximate: str, device: torch.device) -> None:
    large = torch.tensor([[16.0, 100.0, 1e5, 1e13, 1e30, 3.4e38, math.inf]], device=device)
    assert torch.equal(gelu(large, approximate), large)
    assert torch.equal(gelu(-large, approximate), torch.zeros_like(large))
    assert torch.equal(slope(gelu, large, approximate), torch.ones_like(large))
    assert torch.equal(slope(gelu, -large, approximate), torch.zeros_like(large))


@forms
def test_a_nan_stays_one_and_alone(approximate: str, device: torch.device) -> None:
    x = torch.tensor([[-1.0, math.nan, 0.0]], device=device)
    for values in (gelu(x, approximate), slope(gelu, x, approximate)):
        assert values.isnan().tolist() == [[False, True, False]]


@forms
def test_at_nought(approximate: str, device: torch.device) -> None:
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30]], device=device)
    torch.testing.assert_close(gelu(x, approximate), x / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope(gelu, x, approximate), torch.full_like(x, 0.5), rtol=1e-6, atol=0)


# Shapes, strides, dtypes


@settings(deadline=None, max_examples=30)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 300)),
        st.tuples(st.integers(0, 70), st.integers(1, 70)),
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 70)),
    ),
    layout=st.tuples(layouts, layouts),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    approximate=st.sampled_from(FORMS),
)
def test_any_shape_stride_and_dtype(shape, layout, dtype, bias, approximate) -> None:
    torch.manual_seed(0)
    device = "cpu" if INTERPRETED else "cuda"
    inputs = {
        "x": laid_out((3 * torch.randn(shape, device=device)).to(dtype), layout[0]).detach().requires_grad_(),
        "bias": torch.randn(2 * shape[-1], device=device).to(dtype)[::2].detach().requires_grad_() if bias else None,
        "approximate": approximate,
    }

    def relaid(function):
        return lambda **kwargs: Relay.apply(function(**kwargs), layout[1])

    fused, plain = (outputs_and_gradients(relaid(function), inputs) for function in (bias_gelu, reference.bias_gelu))
    exact = outputs_and_gradients(relaid(reference.bias_gelu), in_float64(inputs))
    assert_as_good_as_torch(fused, plain, exact)


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_rows_two_to_the_31st_elements_apart(function: str, device: torch.device) -> None:
    """A row number times a stride, each of 32 bits, of more bits."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 48), (2**30, 1))
    far.copy_(torch.randn(3, 48, device=device))
    near = far.contiguous()
    if function == "forward":
        assert torch.equal(gelu(far, "erf"), gelu(near, "erf"))
    else:
        for dy, x in ((far, near), (near, far), (far, far)):
            got, _ = module.gelu_backward(dy, x, None, "erf", False)
            expected, _ = module.gelu_backward(near, near, None, "erf", False)
            assert torch.equal(got, expected)


def test_without_rows_the_bias_has_no_gradient(device: torch.device) -> None:
    x, bias = (torch.randn(size, device=device, requires_grad=True) for size in ((0, 37), (37,)))
    y = bias_gelu(x, bias, "erf")
    assert y.shape == (0, 37)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@forms
def test_in_place(approximate: str, device: torch.device) -> None:
    """As the MLP does where it keeps nothing, and with the gradient of its activations."""
    x, dy = (torch.randn(40, 100, device=device) for _ in range(2))
    y, (dx, _) = gelu(x, approximate), module.gelu_backward(dy, x, None, approximate, False)
    run(x, *module.plan_backward(device_of(x), dy, x, None, approximate, dy, None))
    run(x, *module.plan_forward(device_of(x), x, None, approximate, x))
    assert torch.equal(x, y)
    assert torch.equal(dy, dx)


# What is computed


def test_a_frozen_bias_costs_nothing_in_backward(device: torch.device, memory: Memory | None) -> None:
    x, bias = torch.randn(37, 64, device=device, requires_grad=True), torch.randn(64, device=device)
    y = bias_gelu(x, bias, "erf")
    before = memory.stored if memory else 0
    y.backward(torch.ones_like(y))
    if memory:
        assert memory.stored - before == x.numel() * 4  # dx, and no partial sums
    assert_as_good_as_torch({"dx": x.grad}, *({"dx": slope_at(x, bias, dtype)} for dtype in (None, torch.float64)))


def slope_at(x: Tensor, bias: Tensor, dtype: torch.dtype | None) -> Tensor:
    return slope(reference.gelu, (x + bias) if dtype is None else x.to(dtype) + bias.to(dtype), "erf")


def test_a_frozen_input_leaves_the_bias_gradient(device: torch.device) -> None:
    x, bias = torch.randn(37, 64, device=device), torch.randn(64, device=device, requires_grad=True)
    inputs = {"x": x, "bias": bias, "approximate": "tanh"}
    fused, plain = (outputs_and_gradients(function, inputs) for function in (bias_gelu, reference.bias_gelu))
    assert_as_good_as_torch(fused, plain, outputs_and_gradients(reference.bias_gelu, in_float64(inputs)))


@pytest.mark.parametrize("bias", [True, False])
def test_registered_as_torch_wants_it(bias: bool, device: torch.device) -> None:
    x, dy = (torch.randn(5, 24, device=device, requires_grad=grad) for grad in (True, False))
    vector = torch.randn(24, device=device, requires_grad=True) if bias else None
    torch.library.opcheck(torch.ops.nanofuse.gelu, (x, vector, "erf"))
    constant = None if vector is None else vector.detach()
    torch.library.opcheck(torch.ops.nanofuse.gelu_backward, (dy, x.detach(), constant, "tanh", bias))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"approximate": "none"}, "approximate: got 'none', expected 'erf' or 'tanh'"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "x: got torch.float64, expected torch.float32 or"),
        ({"x": torch.zeros(())}, r"x: got shape \(\), expected \(..., C\)"),
        ({"x": torch.zeros(3, 0)}, r"x: got shape \(3, 0\), expected \(..., C\)"),
        ({"bias": torch.zeros(7)}, r"bias: got shape \(7,\), expected \(8\)"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias: got torch.bfloat16, expected torch.float32"),
        ({"bias": torch.zeros(8, device="meta")}, "bias: got a tensor on meta, expected"),
    ],
)
def test_refused(changes: dict, message: str, device: torch.device) -> None:
    inputs = {"x": torch.zeros(3, 8), "bias": torch.zeros(8), "approximate": "erf"} | changes
    with pytest.raises(ValueError, match=message):
        bias_gelu(**{k: v.to(device) if isinstance(v, Tensor) and not v.is_meta else v for k, v in inputs.items()})
