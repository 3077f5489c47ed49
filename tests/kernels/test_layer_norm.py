"""layer_norm and add_layer_norm: what the registry's cases leave open. Their masks: test_dropout.py."""

import pytest
import torch

from kernels import add_layer_norm, layer_norm, reference


@pytest.mark.parametrize("used", [0, 1], ids=["the stream", "the normalised"])
def test_one_output_may_go_unused(used: int, device: torch.device) -> None:
    x, residual = (torch.randn(6, 48, device=device, requires_grad=True) for _ in range(2))
    weight, gradients = torch.randn(48, device=device), []
    for function in (add_layer_norm, reference.add_layer_norm):
        output = function(x, residual, weight, None, torch.float32)[used]
        gradients.append(torch.autograd.grad(output.square().sum(), (x, residual)))
    torch.testing.assert_close(*gradients)


def test_two_leaves_gradients_that_are_equal_are_summed_apart(device: torch.device) -> None:
    """The kernel writes them once. Had autograd been given views of that memory, the second sum would hold a third."""
    x, residual = (torch.randn(2, 3, 48, device=device, requires_grad=True) for _ in range(2))
    weight, gradients = torch.randn(48, device=device), []
    for function in (add_layer_norm, reference.add_layer_norm):
        x.grad = residual.grad = None
        for _ in range(2):
            function(x, residual, weight, None, torch.float32)[1].square().sum().backward()
        gradients.append((x.grad, residual.grad))
    torch.testing.assert_close(*gradients)


def test_values_that_are_no_numbers_stay_in_their_row_and_a_mean_far_from_zero_costs_little(
    device: torch.device,
) -> None:
    x = torch.randn(5, 40, device=device)
    x[1, 3], x[2, 0], x[3] = torch.inf, torch.nan, 7.0  # of equal values the variance is 0
    x[4] += 1000.0  # half an ulp is 3e-5; of a difference of squares nothing would be left
    y = layer_norm(x, torch.ones(40, device=device), None, torch.float32)
    assert y[1].isnan().any()
    assert y[2].isnan().all()
    assert torch.equal(y[3], torch.zeros_like(y[3]))  # eps, not a division by zero
    weight = torch.ones(40, device=device, dtype=torch.float64)
    expected = reference.layer_norm(x.double(), weight, None, torch.float64)
    torch.testing.assert_close(y[0], expected[0].float())
    torch.testing.assert_close(y[4].double(), expected[4], rtol=0, atol=3e-4)


def test_where_nothing_is_added_the_stream_stays_and_is_copied_only_for_its_gradient(device: torch.device) -> None:
    residual, weight = torch.randn(6, 48, device=device, requires_grad=True), torch.randn(48, device=device)
    arguments = (None, residual, weight, None, torch.float32, 0.5)  # there is nothing to drop
    assert torch.equal(add_layer_norm(*arguments)[0], residual)
    with torch.no_grad():
        assert add_layer_norm(*arguments)[0] is residual
