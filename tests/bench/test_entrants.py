"""Who is timed against whom: Liger-Kernel, attention's backends, and ours on a GPU."""

import importlib.util
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.kernels import LIGER, TIMED, Contest, directions
from kernels.cases import CASES, Case
from tests.bench.toys import CPU, FP32, measured

pytestmark = pytest.mark.usefixtures("everything_runs")


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="Liger-Kernel is installed")
def test_a_package_that_is_not_there_is_named() -> None:
    case = replace(next(case for case in CASES if case.name == "layer_norm"), cpu_shapes=((4, 16),))
    found = measured(replace(case, fused=case.reference))
    assert found["liger"].skipped == "No module named 'liger_kernel'"
    assert found["fused"].seconds


@pytest.mark.parametrize("name", LIGER)
def test_ligers_counterparts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins with its signatures: the arguments reach them, and logits that they write over harm nobody."""
    functional = types.ModuleType("liger_kernel.transformers.functional")

    def cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
        loss = torch.nn.functional.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)
        gradient = torch.autograd.grad(loss, input, retain_graph=True)[0]
        loss = Given.apply(input, loss.detach(), gradient)
        with torch.no_grad():
            input.copy_(gradient)
        return loss

    def linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return torch.nn.functional.cross_entropy(input @ weight.T, target, ignore_index=ignore_index)

    functional.liger_layer_norm = lambda X, W, B, eps: torch.nn.functional.layer_norm(X, W.shape, W, B, eps)
    functional.liger_cross_entropy = cross_entropy
    functional.liger_fused_linear_cross_entropy = linear_cross_entropy
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    case = next(case for case in CASES if case.name == name)
    contest = Contest(replace(case, fused=case.reference), case.shapes[1], FP32, CPU)
    for direction in directions(case):
        for row in contest.measure(direction, seconds=0):
            assert row.skipped == ""
            assert row.seconds
    for given, fresh in zip(
        contest._inputs.values(), case.make_inputs(case.shapes[1], FP32, CPU).values(), strict=True
    ):
        assert not isinstance(given, Tensor) or torch.equal(given, fresh)


class Given(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx, x, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx, dloss):
        return ctx.saved_tensors[0] * dloss, None, None


def test_attention_is_timed_by_every_backend_that_runs() -> None:
    case = next(case for case in TIMED if case.name == "attention")
    found = measured(replace(case, cpu_shapes=case.shapes), "both")
    assert {"reference", "compiled", "flash", "math"} <= {name for name, row in found.items() if row.seconds}
    missing = [package for package in ("flash_attn", "fa3", "fa4") if not found[package].seconds]
    assert all(found[package].skipped for package in missing)
    assert "fused" not in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_ours_is_timed_on_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    contest = Contest(case, case.shapes[-1], torch.bfloat16, torch.device("cuda"))
    for direction in directions(case):
        by_variant = {row.variant: row for row in contest.measure(direction, seconds=0.01)}
        assert by_variant["fused"].skipped == ""
        assert len(by_variant["fused"].seconds) >= 5
