"""cross_entropy and linear_cross_entropy: what the registry's cases leave open."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cross_entropy, linear_cross_entropy, reference
from kernels.check import fault, in_float64, outputs_and_gradients
from kernels.fused.cross_entropy import row_losses

CHUNKS = pytest.mark.parametrize("chunk_rows", [0, 4])
inf, nan = math.inf, math.nan


def fused_loss(*, scale: float = 1.0, **inputs: Any) -> Tensor:
    return scale * linear_cross_entropy(**inputs)[0]


def plain_loss(*, scale: float = 1.0, **inputs: Any) -> Tensor:
    return scale * reference.linear_cross_entropy(**inputs)[0]


@CHUNKS
@pytest.mark.parametrize(
    ("dtype", "scale", "needs", "ignored", "ignore_index"),
    [
        (torch.float32, 1.0, ("weight",), [2, 7], -100),
        (torch.float32, 1.0, ("x",), [2, 7], 3),
        (torch.bfloat16, 1 / 3, ("x", "weight"), [], -1),
        (torch.float16, 1024.0, ("x", "weight"), [], -1),
        (torch.bfloat16, 1.0, ("x", "weight"), list(range(50)), -1),
    ],
)
def test_scaled_losses_ignored_targets_and_gradients_that_nobody_wants(
    dtype, scale: float, needs: tuple, ignored: list, ignore_index: int, chunk_rows: int, device, nan_filled: None
) -> None:
    inputs: dict[str, Any] = {"scale": scale, "ignore_index": ignore_index, "chunk_rows": chunk_rows}
    for name, rows in (("x", 50), ("weight", 65)):
        inputs[name] = torch.randn(rows, 24, device=device).to(dtype).requires_grad_(name in needs)
    inputs["targets"] = torch.arange(50, device=device)
    inputs["targets"][ignored] = ignore_index
    assert not fault(fused_loss, plain_loss, inputs)


@CHUNKS
def test_a_frozen_tensors_gradient_costs_no_product(chunk_rows: int, device: torch.device) -> None:
    x, weight = torch.randn(8, 24, device=device), torch.randn(65, 24, device=device)
    products = []
    for needs in ((True, False), (False, True), (True, True)):
        x, weight = x.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
        with torch.autograd.profiler.profile() as profile:
            linear_cross_entropy(x, weight, torch.arange(8, device=device), chunk_rows=chunk_rows)[0].backward()
        names = [event.name for event in profile.function_events]
        products.append(names.count("aten::mm") + names.count("aten::addmm_"))
    chunks = 2 if chunk_rows else 1
    assert products == [2 * chunks, 2 * chunks, 3 * chunks]


@CHUNKS
def test_compiled_for_any_number_of_rows(chunk_rows: int, device: torch.device) -> None:
    inputs = {"x": torch.randn(9, 24, device=device), "targets": torch.arange(9, device=device)}
    for tensor in inputs.values():
        torch._dynamo.mark_dynamic(tensor, 0)  # an error where it is compiled for these 9 alone
    inputs |= {"weight": torch.randn(65, 24, device=device), "chunk_rows": chunk_rows}
    compiled = torch.compile(fused_loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), fused_loss(**inputs))


def test_rows_beyond_32_bits_in_place(device: torch.device) -> None:
    """Rows 2^30 elements apart, the gradient over the logits."""
    near = torch.randn(3, 40, dtype=torch.float16, device=device, requires_grad=True)
    logits = near.new_empty(2**31 + 64).as_strided(near.shape, (2**30, 1)).copy_(near.detach())
    targets, count, losses = torch.tensor([5, 6, 7], device=device), near.new_tensor(3.0).float(), near.new_empty(3)
    row_losses(logits, 40, targets, -1, count, losses.float(), None, logits)
    (expected,) = torch.autograd.grad(3 * reference.cross_entropy(near, targets), near)
    torch.testing.assert_close(logits.clone(), expected)


HUGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("values", "target"),
    [
        pytest.param([HUGE] * 20, 7, id="all equal and huge"),
        pytest.param([-1e37, 1e37, 0.0, 1.0] * 5, 0, id="the target far below"),
        pytest.param([-inf, 1.0, 2.0, -inf] * 5, 2, id="masked columns"),
        pytest.param([-inf] * 20, 3, id="all masked"),
        pytest.param([inf] + [1.0] * 19, 3, id="an infinite column"),
        pytest.param([3.0], 0, id="one column"),
        pytest.param([0.0] * 20, None, id="all rows ignored"),
    ],
)
def test_special_rows_are_as_torch_has_them_and_stay_rows(values: list, target: int | None, device, nan_filled) -> None:
    V = len(values)
    logits = torch.stack([torch.randn(V), torch.tensor(values), torch.randn(V)]).to(device)
    targets = torch.tensor([-1] * 3 if target is None else [V // 5, target, V // 4], device=device)
    inputs = {"logits": logits.requires_grad_(), "targets": targets}
    fused, plain = (outputs_and_gradients(f, inputs) for f in (cross_entropy, reference.cross_entropy))
    torch.testing.assert_close(fused, plain, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_a_common_offset_costs_no_digits(device: torch.device) -> None:
    """1e6 added to every logit, of which float32 keeps sixteenths: a log-sum-exp in one number would, too."""
    logits, results = (torch.randn(4, 5000) * 16).round() / 16, []
    for offset in (1e6, 0.0):
        inputs = {"logits": (logits + offset).to(device).requires_grad_(), "targets": torch.arange(4, device=device)}
        results.append(outputs_and_gradients(cross_entropy, inputs))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("chunk_rows", [None, 0, 2], ids=["logits", "head", "chunks"])
@pytest.mark.parametrize(("target", "value"), [(-1, nan), (-2, 0.0), (50, 0.0), (2**32 + 1, 0.0)])
def test_what_is_no_number_stays_in_its_row(
    target: int, value: float, chunk_rows: int | None, device: torch.device
) -> None:
    """A target outside the vocabulary, or a logit. An ignored row is not read."""
    logits, targets = torch.randn(5, 50, device=device), torch.tensor([1, 4, 2, target, 3], device=device)
    ignored = target == -1
    logits[3] += value
    logits.requires_grad_()
    if chunk_rows is None:
        loss = cross_entropy(logits, targets)
    else:
        loss = fused_loss(x=logits, weight=torch.eye(50, device=device), targets=targets, chunk_rows=chunk_rows)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() == ignored
    assert gradient[3].eq(0).all() if ignored else gradient[3].isnan().all()
    assert gradient[[0, 1, 2, 4]].isfinite().all()


@CHUNKS
def test_float16_keeps_what_a_mean_over_many_rows_would_lose(chunk_rows: int, device: torch.device) -> None:
    """Each row's gradient, a thousandth of some millionths, is 0 in float16; the rows' sum is not."""
    weight = torch.tensor([[11.0]] + [[0.0]] * 19, dtype=torch.float16, device=device)  # probabilities of exp(-11)
    inputs = {"x": torch.ones(1024, 1, dtype=torch.float16, device=device), "weight": weight.requires_grad_()}
    inputs |= {"targets": torch.zeros(1024, dtype=torch.int64, device=device), "chunk_rows": 64 * chunk_rows}
    got, exact = outputs_and_gradients(fused_loss, inputs), outputs_and_gradients(plain_loss, in_float64(inputs))
    torch.testing.assert_close(got["dweight"][1:].double(), exact["dweight"][1:], rtol=0.02, atol=0)
