"""gelu: what the registry's cases leave open. The sum of its gradient's rows is seen in test_mlp.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import gelu, reference
from kernels.check import fault, in_float64, outputs_and_gradients
from kernels.fused.gelu import FORMS, gelu_backward, gelu_forward
from kernels.launch import INTERPRETED
from tests.kernels.layouts import Relay, laid_out
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
        x = torch.linspace(first, first + 1, 401, device=device)[None]
        inputs = {"x": x.requires_grad_(), "approximate": approximate}
        fused, plain = (outputs_and_gradients(function, inputs) for function in (gelu, reference.gelu))
        exact = outputs_and_gradients(reference.gelu, in_float64(inputs))
        for name, got in fused.items():
            error, torchs = ((y.double() - exact[name]).abs().max().item() for y in (got, plain[name]))
            allowed = 2 * torchs + torch.finfo(torch.float32).eps * exact[name].abs().max().item()
            allowed += 1e-12  # far left torch is 0, in float64 too
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


# Shapes, strides, dtypes


@pytest.mark.usefixtures("nan_filled")
@settings(deadline=None, max_examples=15)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 300)),
        st.tuples(st.integers(0, 70), st.integers(1, 70)),
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 70)),
    ),
    layout=st.tuples(layouts, layouts),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    approximate=st.sampled_from(FORMS),
)
def test_any_shape_stride_and_dtype(shape, layout, dtype, approximate) -> None:
    torch.manual_seed(0)
    device = "cpu" if INTERPRETED else "cuda"
    inputs = {
        "x": laid_out((3 * torch.randn(shape, device=device)).to(dtype), layout[0]).detach().requires_grad_(),
        "approximate": approximate,
    }

    def relaid(function):
        return lambda **kwargs: Relay.apply(function(**kwargs), layout[1])

    assert not fault(relaid(gelu), relaid(reference.gelu), inputs)


def test_rows_two_to_the_31st_elements_apart(device: torch.device) -> None:
    """A row number times a stride, each of 32 bits, of more bits."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 48), (2**30, 1))
    far.copy_(torch.randn(3, 48, device=device))
    near, expected, got = far.contiguous(), torch.empty(3, 48).to(far), torch.empty(3, 48).to(far)
    assert torch.equal(gelu(far, "erf"), gelu(near, "erf"))
    gelu_backward(near, near, "erf", expected)
    for dy, x in ((far, near), (near, far)):
        gelu_backward(dy, x, "erf", got)
        assert torch.equal(got, expected)


@forms
def test_in_place(approximate: str, device: torch.device) -> None:
    """As the MLP does where it keeps nothing, and with the gradient of its activations."""
    x, dy = (torch.randn(40, 100, device=device) for _ in range(2))
    y, dx = gelu(x, approximate), torch.empty_like(dy)
    gelu_backward(dy, x, approximate, dx)
    gelu_backward(dy, x, approximate, dy)
    gelu_forward(x, approximate, x)
    assert torch.equal(x, y)
    assert torch.equal(dy, dx)


def test_registered_as_torch_wants_it(device: torch.device) -> None:
    x, dy = (torch.randn(5, 24, device=device, requires_grad=grad) for grad in (True, False))
    torch.library.opcheck(torch.ops.nanofuse.gelu, (x, "erf"))
    torch.library.opcheck(torch.ops.nanofuse.gelu_backward, (dy, x.detach(), "tanh"))
