"""cross_entropy and linear_cross_entropy: what the registry's cases leave open."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cross_entropy, linear_cross_entropy, reference
from kernels.check import fault, outputs_and_gradients
from kernels.fused.cross_entropy import row_losses
from kernels.fused.linear_cross_entropy import padded
from kernels.launch import INTERPRETED
from tests.kernels.watcher import Memory

CHUNKS = pytest.mark.parametrize("chunk_rows", [0, 4])
inf, nan = math.inf, math.nan


def fused_loss(**inputs: Any) -> Tensor:
    return linear_cross_entropy(**inputs)[0]


def plain_loss(**inputs: Any) -> Tensor:
    return reference.linear_cross_entropy(**inputs)[0]


def draw(M: int, C: int, V: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The inputs of linear_cross_entropy."""
    x, weight = (torch.randn(n, C, device=device).to(dtype).requires_grad_() for n in (M, V))
    return {"x": x, "weight": weight, "targets": torch.arange(M, device=device) % V}


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
    inputs = draw(50, 24, 65, device, dtype) | {"ignore_index": ignore_index, "chunk_rows": chunk_rows}
    inputs["targets"][ignored] = ignore_index
    for name in {"x", "weight"} - {*needs}:
        inputs[name].requires_grad_(False)

    def scaled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda **inputs: scale * loss(**inputs)

    assert not fault(scaled(fused_loss), scaled(plain_loss), inputs)


def test_all_rows_of_logits_may_be_ignored(device: torch.device, nan_filled: None) -> None:
    logits = torch.randn(70, 65, device=device, requires_grad=True)
    inputs = {"logits": logits, "targets": torch.full((70,), -1, device=device)}
    assert not fault(cross_entropy, reference.cross_entropy, inputs)


def test_rows_beyond_32_bits_in_place(device: torch.device) -> None:
    """Rows 2^30 elements apart, the gradient over the logits."""
    near = torch.randn(3, 40, dtype=torch.float16, device=device, requires_grad=True)
    logits = near.new_empty(2**31 + 64).as_strided(near.shape, (2**30, 1)).copy_(near.detach())
    targets, count, losses = torch.tensor([5, 6, 7], device=device), near.new_tensor(3.0).float(), near.new_empty(3)
    row_losses(logits, 40, targets, -1, count, losses.float(), None, logits)
    (expected,) = torch.autograd.grad(3 * reference.cross_entropy(near, targets), near)
    torch.testing.assert_close(logits.clone(), expected)


HUGE = torch.finfo(torch.float32).max
ROWS = {
    "all equal and huge": ([HUGE] * 20, 7),
    "the target far below": ([-1e37, 1e37, 0.0, 1.0] * 5, 0),
    "masked columns": ([-inf, 1.0, 2.0, -inf] * 5, 2),
    "all masked": ([-inf] * 20, 3),
    "an infinite column": ([inf] + [1.0] * 19, 3),
    "one column": ([3.0], 0),
}


@pytest.mark.parametrize("row", ROWS)
def test_special_rows_are_as_torch_has_them_and_stay_rows(row: str, device: torch.device) -> None:
    values, target = ROWS[row]
    V = len(values)
    logits = torch.stack([torch.randn(V), torch.tensor(values), torch.randn(V)]).to(device)
    targets = torch.tensor([V // 5, target, V // 4], device=device)
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
    M, C, V = 1024, 1, 20
    weight = torch.zeros(V, C, dtype=torch.float16, device=device, requires_grad=True)
    x = torch.ones(M, C, dtype=torch.float16, device=device)
    targets = torch.zeros(M, dtype=torch.int64, device=device)
    with torch.no_grad():
        weight[0] = 11.0  # the others' probability: exp(-11)
    (gradient,) = torch.autograd.grad(
        fused_loss(x=x, weight=weight, targets=targets, chunk_rows=64 * chunk_rows), weight
    )
    wide = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain_loss(x=x.double(), weight=wide, targets=targets), wide)
    torch.testing.assert_close(gradient[1:].double(), expected[1:], rtol=0.02, atol=0)


@pytest.mark.skipif(not INTERPRETED, reason="bytes and reads are counted in Triton's interpreter")
@CHUNKS
def test_no_gradient_no_work_of_a_head(chunk_rows: int, memory: Memory) -> None:
    M, V = 8, 20
    inputs = draw(M, 8, V, torch.device("cpu"))
    with torch.no_grad():
        loss = fused_loss(**inputs, chunk_rows=chunk_rows)
    assert memory.stored == 4 * M + 4  # losses, and how many count
    assert max(end - first for first, end in memory.spans) == 4 * (chunk_rows or M) * padded(V)  # all logits there are
    frozen = {name: value.detach() for name, value in inputs.items()}
    assert torch.equal(fused_loss(**frozen, chunk_rows=chunk_rows), loss)
    assert memory.stored == 2 * (4 * M + 4)


@CHUNKS
def test_the_inputs_stay_as_they_were_and_a_gradient_may_be_taken_twice(chunk_rows: int, device: torch.device) -> None:
    inputs = draw(9, 8, 20, device)
    before = {name: value.detach().clone() for name, value in inputs.items()}
    leaves = (inputs["x"], inputs["weight"])
    loss = fused_loss(**inputs, chunk_rows=chunk_rows)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
