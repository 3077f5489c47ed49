"""cross_entropy: what the registry's cases leave open."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cross_entropy as ce
from kernels import reference
from kernels.check import in_float64, outputs_and_gradients
from kernels.launch import INTERPRETED, device_of, run
from tests.kernels.checks import assert_as_good_as_torch
from tests.kernels.layouts import laid_out
from tests.kernels.memory import Memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
inf, nan = math.inf, math.nan


layouts = st.sampled_from(["packed", "sliced", "aligned", "transposed", "one row for all"])
options = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum"]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "ignore_index": st.sampled_from([-1, -100, 0, 3]),
    }
)


def draw_targets(rows: int, n_vocab: int, ignore_index: int, ignored: float) -> Tensor:
    targets = torch.randint(n_vocab, (rows,))
    targets[torch.rand(rows) < ignored] = ignore_index
    return torch.stack([targets, targets.flip(0)], dim=1)[:, 0]  # of stride 2


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(st.integers(0, 40), st.one_of(st.integers(2, 300), st.sampled_from([4096, 5000, 9001]))),
    layout=layouts,
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 20),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    kept=options,
)
def test_any_shape_stride_and_option(shape, layout, dtype, padding, ignored, kept) -> None:
    torch.manual_seed(0)
    (M, V), device = shape, "cpu" if INTERPRETED else "cuda"
    M = M if V < 1000 else M % 4
    n_vocab = max(2, V - padding)  # of one column, torch's error is nought
    logits = laid_out((3 * torch.randn(M, V, device=device)).to(dtype), layout).detach().requires_grad_()
    targets = draw_targets(M, n_vocab, kept["ignore_index"], ignored).to(device)
    inputs = {"logits": logits, "targets": targets, "n_vocab": n_vocab, **kept}
    fused, plain = (outputs_and_gradients(module.cross_entropy, inputs) for module in (ce, reference))
    assert_as_good_as_torch(fused, plain, outputs_and_gradients(reference.cross_entropy, in_float64(inputs)))
    assert fused["dlogits"][:, n_vocab:].eq(0).all()


@pytest.mark.parametrize("mean", [True, False])
def test_the_reference_is_what_the_formulas_say(mean: bool) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9, dtype=torch.float64), torch.tensor([0, 1, -1, 6, 3, 2])
    kept = {"label_smoothing": 0.2, "z_loss": 0.1, "n_vocab": 7, "reduction": "mean" if mean else "sum"}
    losses = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if target != -1:
            lse = math.log(sum(math.exp(x) for x in row[:7]))
            losses.append(0.8 * (lse - row[target]) + 0.2 * (lse - sum(row[:7]) / 7) + 0.1 * lse**2)
    expected = torch.tensor(sum(losses) / (len(losses) if mean else 1), dtype=torch.float64)
    torch.testing.assert_close(reference.cross_entropy(logits, targets, **kept), expected)
    eye = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(reference.linear_cross_entropy(logits, eye, targets, **kept)[0], expected)


# Values

HUGE = torch.finfo(torch.float32).max
ROWS = {
    "all equal": ([2.5] * 20, 7),
    "all equal and huge": ([HUGE] * 20, 7),
    "the lowest there is": ([-HUGE] * 20, 7),
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
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("row", ROWS)
def test_special_rows_are_as_torch_has_them_and_stay_rows(row: str, smoothing: float, device: torch.device) -> None:
    values, target = ROWS[row]
    logits = torch.stack([torch.randn(20), torch.tensor(values), torch.randn(20)]).to(device)
    targets = torch.tensor([4, target, 5], device=device)
    for rows in (slice(1, 2), slice(0, 3)):
        inputs = {"logits": logits[rows].clone().requires_grad_(), "targets": targets[rows], "reduction": "sum"}
        inputs["label_smoothing"] = smoothing
        fused, plain = (outputs_and_gradients(module.cross_entropy, inputs) for module in (ce, reference))
        for name, got in fused.items():
            torch.testing.assert_close(got, plain[name], equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_column_is_certain(smoothing: float, device: torch.device) -> None:
    logits = torch.randn(3, 1, device=device, requires_grad=True)
    loss = ce.cross_entropy(logits, torch.zeros(3, dtype=torch.int64, device=device), label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.abs() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_common_offset_costs_no_digits(smoothing: float, device: torch.device) -> None:
    """1e6 added to every logit, of which float32 keeps sixteenths: a log-sum-exp in one number would, too."""
    logits = (torch.randn(4, 5000) * 16).round() / 16
    targets = torch.tensor([1, 2, 3, 4], device=device)

    def results(logits: Tensor) -> dict[str, Tensor]:
        inputs = {"logits": logits.to(device).requires_grad_(), "targets": targets, "label_smoothing": smoothing}
        return outputs_and_gradients(ce.cross_entropy, inputs)

    near, far = results(logits), results(logits + 1e6)
    for name, got in far.items():
        torch.testing.assert_close(got, near[name], rtol=1e-5, atol=1e-8)


def test_an_ignored_row_is_not_read(device: torch.device) -> None:
    logits = torch.randn(3, 50, device=device)
    logits[1] = nan
    logits.requires_grad_()
    loss = ce.cross_entropy(logits, torch.tensor([1, -1, 2], device=device), z_loss=0.1, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient[1].eq(0).all()
    assert gradient[[0, 2]].ne(0).all()


def test_where_all_is_ignored_the_mean_is_nan_and_its_gradient_zero(device: torch.device) -> None:
    logits = torch.randn(3, 50, device=device, requires_grad=True)
    loss = ce.cross_entropy(logits, torch.full((3,), -1, device=device))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert gradient.eq(0).all()


def test_padding_may_hold_anything(device: torch.device) -> None:
    logits = torch.randn(3, 50, device=device)
    targets = torch.tensor([1, -1, 2], device=device)
    expected = reference.cross_entropy(logits[:, :40], targets)
    logits[:, 40:] = torch.tensor([nan, inf], device=device).repeat(5)
    logits.requires_grad_()
    loss = ce.cross_entropy(logits, targets, n_vocab=40, label_smoothing=0.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    assert gradient[:, 40:].eq(0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("target", [-2, 40, 49, 50, 2**40, -(2**40), 2**32 + 1])
def test_a_target_outside_the_vocabulary_is_nan_in_its_row(target: int, device: torch.device) -> None:
    logits = torch.randn(3, 50, device=device, requires_grad=True)
    targets = torch.tensor([1, target, 2], device=device)
    loss = ce.cross_entropy(logits, targets, n_vocab=40, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert gradient[1, :40].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_rows_beyond_32_bits(device: torch.device) -> None:
    """Rows 2^30 elements apart, of memory that is never touched in between; the gradient over the logits.

    The last row begins at element 2^31, though neither its number nor the stride takes more than 32 bits.
    """
    logits = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 40), (2**30, 1))
    logits.copy_(torch.randn(3, 40))
    inputs = {"logits": logits.clone().requires_grad_(), "targets": torch.tensor([5, 6, 7], device=device)}
    losses = torch.empty(2, 3, device=device)
    arguments = (logits, inputs["targets"], losses, None, logits, -1, 0.0, 0.0, 40)
    torch.testing.assert_close(ce.cross_entropy(logits, inputs["targets"]), reference.cross_entropy(**inputs))
    run(logits, *ce.plan_forward(device_of(logits), *arguments))
    (expected,) = torch.autograd.grad(reference.cross_entropy(**inputs, reduction="sum"), inputs["logits"])
    torch.testing.assert_close(logits.clone(), expected)


def test_only_aligned_rows_are_read_by_vectors() -> None:
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    for logits, width in (
        (rows, 8),
        (rows.float(), 4),
        (rows[:, :37], 8),
        (rows[:, 1:], 1),
        (rows.view(8, 32)[:, :5], 8),
    ):
        _, LANES, WIDTH, _ = ce.tile(logits)
        assert width == WIDTH
        assert logits.shape[1] <= LANES * WIDTH
    assert ce.tile(torch.zeros(4, 37))[2] == 1


# As an op


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")
def test_no_gradient_no_work(memory: Memory) -> None:
    logits, targets = torch.randn(6, 50), torch.arange(6)
    ce.cross_entropy(logits, targets)
    assert memory.stored == 6 * 4 * 4  # the losses, what counts, and two statistics
    loss = ce.cross_entropy(logits.requires_grad_(), targets)
    stored = memory.stored
    torch.autograd.grad(loss, logits)
    assert memory.stored - stored == 6 * 50 * 4


def test_a_gradient_may_be_taken_twice(device: torch.device) -> None:
    logits = torch.randn(6, 50, device=device, requires_grad=True)
    loss = ce.cross_entropy(logits, torch.arange(6, device=device))
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, logits)
    assert torch.equal(2 * first, second)


@pytest.mark.parametrize(("mean", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_opcheck(mean: bool, dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.randn(5, 37, device=device).to(dtype).requires_grad_()
    targets, settings = torch.tensor([0, 1, -1, 2, 30], device=device), (-1, 0.1, 0.01, 36)
    torch.library.opcheck(torch.ops.nanofuse.cross_entropy.default, (logits, targets, -1, mean, *settings[1:]))
    loss, divisor, stats = torch.ops.nanofuse.cross_entropy(logits.detach(), targets, -1, mean, *settings[1:])
    backward = (torch.ones_like(loss), logits.detach(), targets, divisor, stats, *settings)
    torch.library.opcheck(torch.ops.nanofuse.cross_entropy_backward.default, backward)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's own reads are none of torch's")
def test_no_value_reaches_the_host() -> None:
    logits = torch.randn(6, 50, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ce.cross_entropy(logits, torch.arange(6), z_loss=0.1).backward()
    names = {event.name for event in profile.events()}
    assert {"nanofuse::cross_entropy", "nanofuse::cross_entropy_backward"} <= names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}


# Refused

GOOD = {"logits": torch.zeros(3, 8), "targets": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"logits": torch.zeros(3, 8, 1)}, r"logits: got shape \(3, 8, 1\), expected \(any, any\)"),
        ({"logits": torch.zeros(3, 8).double()}, "logits: got torch.float64, expected torch.float32 or"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets: got shape \(4,\), expected \(3\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets: got torch.int32, expected torch.int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "targets: got a tensor on meta, expected"),
        ({"reduction": "none"}, "reduction: got 'none', expected 'mean' or 'sum'"),
        ({"label_smoothing": 1.5}, "label_smoothing: got 1.5, expected 0 to 1"),
        ({"z_loss": -1.0}, "z_loss: got -1.0, expected 0 or more"),
        ({"n_vocab": 0}, "n_vocab: got 0, expected 1 to 8"),
        ({"n_vocab": 9}, "n_vocab: got 9, expected 1 to 8"),
    ],
)
def test_refused_with_what_came_and_what_was_expected(bad: dict[str, Any], message: str, device: torch.device) -> None:
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value
        for name, value in {**GOOD, **bad}.items()
    }
    with pytest.raises(ValueError, match=message):
        ce.cross_entropy(**arguments)
