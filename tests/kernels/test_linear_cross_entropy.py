"""linear_cross_entropy: what the registry's cases leave open."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import linear_cross_entropy as lce
from kernels import reference
from kernels.check import in_float64, outputs_and_gradients
from kernels.launch import INTERPRETED, device_of, run
from tests.kernels.checks import assert_as_good_as_torch
from tests.kernels.layouts import laid_out
from tests.kernels.memory import Memory
from tests.kernels.test_cross_entropy import DTYPES, draw_targets, layouts, nan, options

CHUNKS = pytest.mark.parametrize("chunk_rows", [0, 4])


def fused_loss(**inputs: Any) -> Tensor:
    loss, logits = lce.linear_cross_entropy(**inputs)
    assert logits is None
    return loss


def plain_loss(**inputs: Any) -> Tensor:
    return reference.linear_cross_entropy(**inputs)[0]


def draw(M: int, C: int, V: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, C, device=device).to(dtype).requires_grad_() for n in (M, V))
    return {"x": x, "weight": weight, "targets": torch.arange(M, device=device) % V}


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(1, 40), st.integers(2, 200)),
    layout=st.tuples(layouts, st.sampled_from(["packed", "sliced", "aligned", "transposed"])),
    padding=st.integers(0, 20),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    chunk_rows=st.sampled_from([0, 1, 5, 100]),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
    kept=options,
)
def test_any_shape_stride_and_option(shape, layout, padding, ignored, chunk_rows, needs, kept) -> None:
    """In float32: torch's error on few elements in less is a lottery; `test_a_scaled_loss` and the cases have more."""
    torch.manual_seed(0)
    (B, T, C, V), device = shape, "cpu" if INTERPRETED else "cuda"
    n_vocab = max(2, V - padding)
    x = laid_out(torch.randn(B * T, C, device=device), layout[0]).view(B, T, C).detach()
    weight = laid_out(3 * C**-0.5 * torch.randn(V, C, device=device), layout[1]).detach()
    targets = draw_targets(B * T, n_vocab, kept["ignore_index"], ignored).view(B, T).to(device)
    inputs = {"x": x.requires_grad_(needs[0]), "weight": weight.requires_grad_(needs[1]), "targets": targets}
    inputs |= {"n_vocab": n_vocab, "chunk_rows": chunk_rows, **kept}
    fused, plain = (outputs_and_gradients(loss, inputs) for loss in (fused_loss, plain_loss))
    assert_as_good_as_torch(fused, plain, outputs_and_gradients(plain_loss, in_float64(inputs)))
    if needs[1]:
        assert fused["dweight"][n_vocab:].eq(0).all()


@CHUNKS
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1024.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_loss(dtype: torch.dtype, scale: float, chunk_rows: int, device: torch.device) -> None:
    inputs = {**draw(50, 24, 65, device, dtype), "chunk_rows": chunk_rows}

    def scaled(loss):
        return lambda **inputs: scale * loss(**inputs)

    fused, plain = (outputs_and_gradients(scaled(loss), inputs) for loss in (fused_loss, plain_loss))
    assert_as_good_as_torch(fused, plain, outputs_and_gradients(scaled(plain_loss), in_float64(inputs)))


@CHUNKS
def test_float16_keeps_what_a_mean_over_many_rows_would_lose(chunk_rows: int, device: torch.device) -> None:
    """Each row's gradient, a thousandth of some millionths, is nothing in float16; the rows' sum is not."""
    M, C, V = 1024, 1, 20
    weight = torch.zeros(V, C, dtype=torch.float16, device=device, requires_grad=True)
    x = torch.ones(M, C, dtype=torch.float16, device=device)
    targets = torch.zeros(M, dtype=torch.int64, device=device)
    with torch.no_grad():
        weight[0] = 11.0  # the others' probability: exp(-11)
    loss, _ = lce.linear_cross_entropy(x, weight, targets, chunk_rows=64 * chunk_rows)
    (gradient,) = torch.autograd.grad(loss, weight)
    wide = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.linear_cross_entropy(x.double(), wide, targets)[0], wide)
    torch.testing.assert_close(gradient[1:].double(), expected[1:], rtol=0.02, atol=0)


@CHUNKS
def test_values_that_are_no_numbers_stay_in_their_row(chunk_rows: int, device: torch.device) -> None:
    inputs = draw(9, 8, 20, device)
    with torch.no_grad():
        inputs["x"][3] = nan
    loss, _ = lce.linear_cross_entropy(**inputs, chunk_rows=chunk_rows)
    (dx,) = torch.autograd.grad(loss, inputs["x"])
    assert loss.isnan()
    assert dx[3].isnan().all()
    assert dx[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


@CHUNKS
@pytest.mark.parametrize("target", [-2, 20, 2**32 + 1])
def test_a_target_outside_the_vocabulary_is_nan_in_its_row(target: int, chunk_rows: int, device: torch.device) -> None:
    inputs = draw(9, 8, 20, device)
    inputs["targets"][7] = target
    loss, _ = lce.linear_cross_entropy(**inputs, chunk_rows=chunk_rows)
    (dx,) = torch.autograd.grad(loss, inputs["x"])
    assert loss.isnan()
    assert dx[7].isnan().all()
    assert dx[:7].isfinite().all()


@CHUNKS
def test_the_inputs_stay_as_they_were_and_a_gradient_may_be_taken_twice(chunk_rows: int, device: torch.device) -> None:
    inputs = draw(9, 8, 20, device)
    before = {name: value.detach().clone() for name, value in inputs.items()}
    leaves = (inputs["x"], inputs["weight"])
    loss, _ = lce.linear_cross_entropy(**inputs, chunk_rows=chunk_rows)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_rows_beyond_32_bits_are_scaled(device: torch.device) -> None:
    """Rows 2^30 elements apart, of memory that is never touched in between; the last begins at element 2^31."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 40), (2**30, 1))
    x, scale = torch.randn(3, 40, dtype=torch.float16, device=device), torch.tensor(0.5, device=device)
    near = torch.empty_like(x)
    far.copy_(x)
    run(x, *lce.plan_scale(device_of(x), far, scale, near), *lce.plan_scale(device_of(x), far, scale, far))
    assert torch.equal(near, x / 2)
    assert torch.equal(far.clone(), x / 2)


# What is left out


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")
@CHUNKS
def test_no_gradient_no_work(chunk_rows: int, memory: Memory) -> None:
    M, V = 9, 20
    inputs = draw(M, 8, V, torch.device("cpu"))
    with torch.no_grad():
        loss, _ = lce.linear_cross_entropy(**inputs, chunk_rows=chunk_rows)
    assert memory.stored == 8 * M  # losses and what counts
    assert memory.loaded == 4 * M * lce.padded(V) + 8 * M + 4 * M  # logits, targets, the targets' logits
    assert not loss.requires_grad
    frozen = {name: value.detach() for name, value in inputs.items()}
    assert torch.equal(lce.linear_cross_entropy(**frozen, chunk_rows=chunk_rows)[0], loss)
    assert memory.stored == 2 * 8 * M


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")
@CHUNKS
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_factor_costs_nothing(frozen: str, chunk_rows: int, memory: Memory) -> None:
    M, C, V = 9, 8, 20
    inputs = draw(M, C, V, torch.device("cpu"))
    inputs[frozen].requires_grad_(False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss, _ = lce.linear_cross_entropy(**inputs, chunk_rows=chunk_rows)
        stored = memory.stored
        loss.backward()
    products = sum(event.name in ("aten::mm", "aten::addmm_") for event in profile.events())
    assert products == 2 * (math.ceil(M / chunk_rows) if chunk_rows else 1)  # the logits and one gradient
    scaled = V * C if frozen == "x" and chunk_rows else M * C  # dweight; dx, or x for dweight
    assert memory.stored - stored == 4 * scaled
    assert inputs[frozen].grad is None


@pytest.mark.skipif(not INTERPRETED, reason="what kernels are given is seen in Triton's interpreter")
def test_a_chunk_of_logits_is_all_there_is(memory: Memory) -> None:
    M, C, V = 80, 2, 200
    inputs = draw(M, C, V, torch.device("cpu"))
    for chunk_rows, rows in ((16, 16), (0, M), (100, M)):
        lce.linear_cross_entropy(**inputs, chunk_rows=chunk_rows)
        assert max(end - first for first, end in memory.spans) == 4 * rows * lce.padded(V)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's own reads are none of torch's")
@CHUNKS
def test_no_value_reaches_the_host(chunk_rows: int) -> None:
    inputs = draw(9, 8, 20, torch.device("cpu"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        lce.linear_cross_entropy(**inputs, chunk_rows=chunk_rows)[0].backward()
    names = {event.name for event in profile.events()}
    assert any(name.startswith("nanofuse::") and name.endswith("backward") for name in names)
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}


# As an op


@pytest.mark.parametrize(
    ("needs", "mean", "dtype"),
    [
        ((True, True), True, torch.bfloat16),
        ((True, False), False, torch.float32),
        ((False, True), True, torch.float32),
        ((False, False), False, torch.bfloat16),
    ],
)
def test_opcheck(needs: tuple[bool, bool], mean: bool, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, targets = draw(5, 8, 37, device, dtype).values()
    targets[2] = -1
    x, weight = (t.detach().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True))
    arguments, ops = (x, weight, targets, -1, mean, 0.1, 0.01, 36), torch.ops.nanofuse
    whole, chunked = (*arguments, any(needs)), (*arguments, 2, *needs)
    torch.library.opcheck(ops.linear_cross_entropy.default, whole)
    torch.library.opcheck(ops.chunked_linear_cross_entropy.default, chunked)
    with torch.no_grad():
        loss, divisor, dlogits = ops.linear_cross_entropy(*whole)
        _, _, dx, dweight = ops.chunked_linear_cross_entropy(*chunked)
    dloss = torch.ones_like(loss)
    if any(needs):
        backward = (dloss, divisor, dlogits, x.detach(), weight.detach(), *needs)
        torch.library.opcheck(ops.linear_cross_entropy_backward.default, backward)
    torch.library.opcheck(ops.chunked_linear_cross_entropy_backward.default, (dloss, divisor, dx, dweight, dtype))


def test_compiled_for_any_number_of_rows(device: torch.device, compiler: None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lce.linear_cross_entropy, fullgraph=True, dynamic=True)
    for M in (6, 9):
        inputs = draw(M, 8, 20, device)
        leaves = (inputs["x"], inputs["weight"])
        (loss, _), (expected, _) = compiled(**inputs), lce.linear_cross_entropy(**inputs)
        assert torch.equal(loss, expected)
        for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert torch.equal(got, want)


# Refused

GOOD = {
    "x": torch.zeros(2, 3, 8),
    "weight": torch.zeros(10, 8),
    "targets": torch.zeros(2, 3, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"x": torch.zeros(2, 3, 8).double()}, "x: got torch.float64, expected torch.float32 or"),
        ({"x": torch.zeros(())}, r"x: got shape \(\), expected one channel or more"),
        ({"x": torch.zeros(2, 3, 0)}, r"x: got shape \(2, 3, 0\), expected one channel or more"),
        ({"weight": torch.zeros(10, 7)}, r"weight: got shape \(10, 7\), expected \(any, 8\)"),
        ({"weight": torch.zeros(10, 8).half()}, "weight: got torch.float16, expected torch.float32"),
        ({"weight": torch.zeros(10, 8, device="meta")}, "weight: got a tensor on meta, expected"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, r"targets: got shape \(6,\), expected \(2, 3\)"),
        ({"targets": torch.zeros(2, 3)}, "targets: got torch.float32, expected torch.int64"),
        ({"reduction": "none"}, "reduction: got 'none', expected 'mean' or 'sum'"),
        ({"n_vocab": 11}, "n_vocab: got 11, expected 1 to 10"),
        ({"chunk_rows": -1}, "chunk_rows: got -1, expected 0"),
    ],
)
def test_refused_with_what_came_and_what_was_expected(bad: dict[str, Any], message: str, device: torch.device) -> None:
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value
        for name, value in {**GOOD, **bad}.items()
    }
    with pytest.raises(ValueError, match=message):
        lce.linear_cross_entropy(**arguments)
