"""cross_entropy and linear_cross_entropy: what the registry's cases leave open."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cross_entropy, linear_cross_entropy, reference
from kernels.check import fault, outputs_and_gradients
from kernels.fused.cross_entropy import row_losses
from kernels.fused.linear_cross_entropy import padded, scaled
from kernels.launch import INTERPRETED
from tests.kernels.layouts import laid_out
from tests.kernels.watcher import Memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNKS = pytest.mark.parametrize("chunk_rows", [0, 4])
counted = pytest.mark.skipif(not INTERPRETED, reason="bytes and reads are counted in Triton's interpreter")
inf, nan = math.inf, math.nan


def fused_loss(**inputs: Any) -> Tensor:
    loss, logits = linear_cross_entropy(**inputs)
    assert logits is None
    return loss


def plain_loss(**inputs: Any) -> Tensor:
    return reference.linear_cross_entropy(**inputs)[0]


def draw(M: int, C: int, V: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The inputs of linear_cross_entropy."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, C, device=device).to(dtype).requires_grad_() for n in (M, V))
    return {"x": x, "weight": weight, "targets": torch.arange(M, device=device) % V}


def draw_targets(rows: int, V: int, ignore_index: int, ignored: float) -> Tensor:
    targets = torch.randint(V, (rows,))
    targets[torch.rand(rows) < ignored] = ignore_index
    return torch.stack([targets, targets.flip(0)], dim=1)[:, 0]  # of stride 2


# Shapes, strides, dtypes

layouts = st.sampled_from(["packed", "sliced", "aligned", "transposed", "one row for all"])
ignore_indices = st.sampled_from([-1, -100, 0, 3])
shares = st.sampled_from([0.0, 0.3, 1.0])


@pytest.mark.usefixtures("nan_filled")
@settings(deadline=None, max_examples=20)
@given(
    # of one column, torch's error is 0
    shape=st.tuples(st.integers(0, 40), st.one_of(st.integers(2, 300), st.sampled_from([4096, 5000, 9001]))),
    layout=layouts,
    dtype=st.sampled_from(DTYPES),
    ignored=shares,
    ignore_index=ignore_indices,
)
def test_any_shape_stride_and_dtype(shape, layout, dtype, ignored, ignore_index) -> None:
    torch.manual_seed(0)
    (M, V), device = shape, "cpu" if INTERPRETED else "cuda"
    M = M if V < 1000 else M % 4
    logits = laid_out((3 * torch.randn(M, V, device=device)).to(dtype), layout).detach().requires_grad_()
    targets = draw_targets(M, V, ignore_index, ignored).to(device)
    inputs = {"logits": logits, "targets": targets, "ignore_index": ignore_index}
    assert not fault(cross_entropy, reference.cross_entropy, inputs)


@pytest.mark.usefixtures("nan_filled")
@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 40), st.integers(2, 200)),
    layout=st.tuples(layouts, st.sampled_from(["packed", "sliced", "aligned", "transposed"])),
    ignored=shares,
    ignore_index=ignore_indices,
    chunk_rows=st.sampled_from([0, 1, 5, 100]),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_any_shape_and_stride_of_a_head(shape, layout, ignored, ignore_index, chunk_rows, needs) -> None:
    """In float32: torch's error on few elements in less is a lottery; `test_a_scaled_loss` and the cases have more."""
    torch.manual_seed(0)
    (B, T, C, V), device = shape, "cpu" if INTERPRETED else "cuda"
    x = laid_out(torch.randn(B * T, C, device=device), layout[0]).view(B, T, C).detach()
    weight = laid_out(3 * C**-0.5 * torch.randn(V, C, device=device), layout[1]).detach()
    targets = draw_targets(B * T, V, ignore_index, ignored).view(B, T).to(device)
    inputs = {"x": x.requires_grad_(needs[0]), "weight": weight.requires_grad_(needs[1]), "targets": targets}
    inputs |= {"chunk_rows": chunk_rows, "ignore_index": ignore_index}
    assert not fault(fused_loss, plain_loss, inputs)


def far_apart(x: Tensor) -> Tensor:
    """x's rows 2^30 elements apart, of memory that is never touched in between.

    The third begins at element 2^31, though neither its number nor the stride takes more than 32 bits.
    """
    return x.new_empty(2**31 + 64).as_strided(x.shape, (2**30, 1)).copy_(x)


def test_rows_beyond_32_bits(device: torch.device) -> None:
    """The gradient too, over the logits, and where it is scaled."""
    logits = far_apart(torch.randn(3, 40, dtype=torch.float16, device=device))
    inputs = {"logits": logits.clone().requires_grad_(), "targets": torch.tensor([5, 6, 7], device=device)}
    torch.testing.assert_close(cross_entropy(logits, inputs["targets"]), reference.cross_entropy(**inputs))
    count, losses = torch.tensor(3.0, device=device), torch.empty(3, device=device)
    row_losses(logits, 40, inputs["targets"], -1, count, losses, dlogits=logits)
    (expected,) = torch.autograd.grad(3 * reference.cross_entropy(**inputs), inputs["logits"])
    torch.testing.assert_close(logits.clone(), expected)
    assert torch.equal(scaled(logits, torch.tensor(0.5, device=device), logits).clone(), expected / 2)


# Values

HUGE = torch.finfo(torch.float32).max
ROWS = {
    "all equal and huge": ([HUGE] * 20, 7),
    "from lowest to highest": ([-HUGE, HUGE, 0.0, 1.0] * 5, 1),
    "the target far below": ([-1e37, 1e37, 0.0, 1.0] * 5, 0),
    "masked columns": ([-inf, 1.0, 2.0, -inf] * 5, 2),
    "the target masked": ([-inf, 1.0, 2.0, -inf] * 5, 3),
    "all masked": ([-inf] * 20, 3),
    "an infinite column": ([inf] + [1.0] * 19, 3),
    "an infinite target": ([1.0] * 19 + [inf], 19),
    "a nan": ([1.0] * 19 + [nan], 3),
    "certain": ([100.0] + [0.0] * 19, 0),
    "certainly wrong": ([100.0] + [0.0] * 19, 1),
    "one column": ([3.0], 0),
}


@pytest.mark.parametrize("row", ROWS)
def test_special_rows_are_as_torch_has_them_and_stay_rows(row: str, device: torch.device) -> None:
    values, target = ROWS[row]
    V = len(values)
    logits = torch.stack([torch.randn(V), torch.tensor(values), torch.randn(V)]).to(device)
    targets = torch.tensor([V // 5, target, V // 4], device=device)
    for rows in (slice(1, 2), slice(0, 3)):
        inputs = {"logits": logits[rows].clone().requires_grad_(), "targets": targets[rows]}
        fused, plain = (outputs_and_gradients(f, inputs) for f in (cross_entropy, reference.cross_entropy))
        for name, got in fused.items():
            torch.testing.assert_close(got, plain[name], equal_nan=True, rtol=1e-5, atol=1e-6)


def test_a_common_offset_costs_no_digits(device: torch.device) -> None:
    """1e6 added to every logit, of which float32 keeps sixteenths: a log-sum-exp in one number would, too."""
    logits = (torch.randn(4, 5000) * 16).round() / 16
    targets = torch.tensor([1, 2, 3, 4], device=device)

    def results(logits: Tensor) -> dict[str, Tensor]:
        return outputs_and_gradients(
            cross_entropy, {"logits": logits.to(device).requires_grad_(), "targets": targets}
        )  # fmt: skip

    near, far = results(logits), results(logits + 1e6)
    for name, got in far.items():
        torch.testing.assert_close(got, near[name], rtol=1e-5, atol=1e-8)


def test_an_ignored_row_is_not_read(device: torch.device) -> None:
    logits = torch.randn(3, 50, device=device)
    logits[1] = nan
    loss = cross_entropy(logits.requires_grad_(), torch.tensor([1, -1, 2], device=device))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient[1].eq(0).all()
    assert gradient[[0, 2]].ne(0).all()


@pytest.mark.parametrize("target", [-2, 50, 2**32 + 1])
def test_a_target_outside_the_vocabulary_is_nan_in_its_row(target: int, device: torch.device) -> None:
    logits = torch.randn(3, 50, device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, target, 2], device=device))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


@CHUNKS
@pytest.mark.parametrize("bad", ["target", "x"])
def test_what_is_no_number_stays_in_a_heads_row(bad: str, chunk_rows: int, device: torch.device) -> None:
    inputs = draw(9, 8, 20, device)
    with torch.no_grad():
        inputs["targets" if bad == "target" else "x"][7] = 2**32 + 1 if bad == "target" else nan
    loss = fused_loss(**inputs, chunk_rows=chunk_rows)
    (dx,) = torch.autograd.grad(loss, inputs["x"])
    assert loss.isnan()
    assert dx[7].isnan().all()
    assert dx[[*range(7), 8]].isfinite().all()


@CHUNKS
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1 / 3), (torch.bfloat16, 1 / 3), (torch.float16, 1024.0)])
def test_a_scaled_loss(dtype: torch.dtype, scale: float, chunk_rows: int, device: torch.device) -> None:
    inputs = {**draw(50, 24, 65, device, dtype), "chunk_rows": chunk_rows}

    def times_scale(loss):
        return lambda **inputs: scale * loss(**inputs)

    assert not fault(times_scale(fused_loss), times_scale(plain_loss), inputs)


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


# What is computed


@counted
@CHUNKS
def test_no_gradient_no_work_of_a_head(chunk_rows: int, memory: Memory) -> None:
    M, V = 9, 20
    inputs = draw(M, 8, V, torch.device("cpu"))
    with torch.no_grad():
        loss = fused_loss(**inputs, chunk_rows=chunk_rows)
    programs = -(-M // chunk_rows) if chunk_rows else 1
    assert memory.stored == 4 * M + 4  # losses, and how many count
    assert memory.loaded == 4 * M * padded(V) + 2 * 8 * M + 4 * M + 4 * programs  # logits, targets, their logits, count
    assert not loss.requires_grad
    frozen = {name: value.detach() for name, value in inputs.items()}
    assert torch.equal(fused_loss(**frozen, chunk_rows=chunk_rows), loss)
    assert memory.stored == 2 * (4 * M + 4)


@counted
def test_a_chunk_of_logits_is_all_there_is(memory: Memory) -> None:
    M, C, V = 80, 2, 200
    inputs = draw(M, C, V, torch.device("cpu"))
    for chunk_rows, rows in ((16, 16), (0, M), (100, M)):
        linear_cross_entropy(**inputs, chunk_rows=chunk_rows)
        assert max(end - first for first, end in memory.spans) == 4 * rows * padded(V)


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


# As ops


def test_opcheck(device: torch.device) -> None:
    ops, logits = torch.ops.nanofuse, torch.randn(5, 37, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.tensor([0, 1, -1, 2, 30], device=device)
    torch.library.opcheck(ops.cross_entropy.default, (logits, targets, -1))
    loss, divisor, stats = ops.cross_entropy(logits.detach(), targets, -1)
    backward = (torch.ones_like(loss), logits.detach(), targets, divisor, stats, -1)
    torch.library.opcheck(ops.cross_entropy_backward.default, backward)


@pytest.mark.parametrize("chunk_rows", [0, 2])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_of_a_head(needs: tuple[bool, bool], chunk_rows: int, device: torch.device) -> None:
    x, weight, targets = draw(5, 8, 37, device, torch.bfloat16).values()
    targets[2] = -1
    x, weight = (t.detach().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True))
    arguments = (x, weight, targets, -1, chunk_rows, *needs)
    ops = torch.ops.nanofuse
    torch.library.opcheck(ops.linear_cross_entropy.default, arguments)
    with torch.no_grad():
        loss, *saved = ops.linear_cross_entropy(*arguments)
    operands = (None, None) if chunk_rows else (x.detach(), weight.detach())
    backward = (torch.ones_like(loss), False, *saved, *operands, *needs, loss.new_empty(0), False)
    torch.library.opcheck(ops.linear_cross_entropy_backward.default, backward)
    assert {gradient.dtype for gradient in ops.linear_cross_entropy_backward(*backward)} == {torch.bfloat16}
