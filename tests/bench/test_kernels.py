"""Kernel benchmarks: what is timed is right, everything that is not has its reason, and samples come out as taken."""

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import kernels
from bench.kernels import LIGER, TIMED, Contest, directions, rows, work_of
from bench.rules import NO_TIME, Clock
from kernels import reference
from kernels.cases import CASES, Case
from tests.bench.toys import CPU, FP32, SHAPE, TOY, inputs_of, measured, scaled

pytestmark = pytest.mark.usefixtures("everything_runs")


@pytest.fixture
def everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused functions count as runnable: the toys are plain torch. What is compiled is compiled without Inductor."""
    monkeypatch.setattr(kernels, "why_not_fused", lambda device: "")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_every_variant_has_its_samples(direction: str) -> None:
    found = measured(TOY, direction, least=7)
    assert list(found) == ["fused", "reference", "compiled"]
    for row in found.values():
        assert len(row.seconds) == 7
        assert min(row.seconds) > 0
        assert row.bytes == {"forward": 100, "backward": 150, "both": 250}[direction]
        assert (row.case, row.shape, row.dtype, row.skipped) == ("toy", [8, 16], "float32", "")


def test_directions_do_what_they_say() -> None:
    """Calls of a function and of its gradient, as the clock sees them."""
    calls: list[str] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            calls.append("forward")
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx, dy):
            calls.append("backward")
            x, weight = ctx.saved_tensors
            return dy * weight, (dy * x).sum(0)

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        return Watched.apply(x, weight)

    contest = Contest(replace(TOY, fused=watched), SHAPE, FP32, CPU)
    expected = {"forward": ["forward"], "backward": ["backward"], "both": ["forward", "backward"]}
    for direction, within in expected.items():
        (fused,) = (e for e in contest.entrants if e.name == "fused")
        work = contest._work(fused, direction)
        made = work.prepare()
        calls.clear()
        work.work(made)
        assert calls == within


def unsteady(flip: Iterator[float]) -> Callable[..., Tensor]:
    return lambda x, weight: scaled(x, weight) * (1 + next(flip))


@pytest.mark.parametrize(
    ("fused", "reason"),
    [
        (lambda x, weight: scaled(x, weight) + 1e-2, "output 0: 128 of 128 elements off, the worst by 0.01"),
        (lambda x, weight: scaled(x, weight) + (x - x.detach()) * 1e-2, "dx: "),
        (unsteady(iter((0.0, 1e-7) * 50)), "output 0: other bits the second time"),
    ],
)
def test_a_wrong_kernel_is_not_timed_nor_is_its_case(fused: Callable[..., Tensor], reason: str) -> None:
    found = measured(replace(TOY, fused=fused), "backward")
    assert found["fused"].skipped.startswith(f"wrong: {reason}")
    for variant in ("reference", "compiled"):
        assert found[variant].skipped == "not timed, since fused is wrong"
    assert not any(row.seconds for row in found.values())


def broken(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("an illegal memory access\nwas encountered")


def greedy(calls: Iterator[int]) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        if next(calls) >= 2:  # the check's two are over
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")
        return scaled(x, weight)

    return function


@pytest.mark.parametrize(
    ("variant", "function", "skipped"),
    [
        ("fused", broken, "wrong: an illegal memory access"),
        ("fused", greedy(iter(range(1000))), "CUDA out of memory. Tried to allocate 40 GiB"),
        ("compiled", broken, "an illegal memory access"),
        ("compiled", lambda x, weight: 0 * x * weight, "disagrees with the reference: output 0: "),
    ],
)
def test_what_fails_is_left_out_alone_unless_ours_is_wrong(
    variant: str, function: Callable[..., Tensor], skipped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variant == "compiled":
        monkeypatch.setattr(torch, "compile", lambda compiled, **options: function)
    found = measured(replace(TOY, fused=function) if variant == "fused" else TOY)
    assert found.pop(variant).skipped.startswith(skipped)
    assert {bool(row.seconds) for row in found.values()} == {not skipped.startswith("wrong")}


@pytest.mark.parametrize(
    ("case", "shape", "expected"),
    [
        ("layer_norm", (32768, 768), (32768, 768)),
        ("cross_entropy", (32768, 50304), (8192, 50304)),
        ("linear_cross_entropy", (32768, 768, 50304), (2048, 768, 50304)),
        ("adamw", (124_373_760, 124_354_560), (124_373_760, 124_354_560)),  # it has no rows
    ],
)
def test_where_float64_takes_too_much_fewer_rows_are_checked(case: str, shape: tuple, expected: tuple) -> None:
    (found,) = (each for each in CASES if each.name == case)
    assert kernels.checked(found, shape, torch.bfloat16) == expected


def test_what_works_in_place_is_checked_by_what_it_leaves() -> None:
    case = next(case for case in CASES if case.name == "adamw")
    assert case.in_place is not None
    case = replace(case, cpu_shapes=((1000, 601),), in_place=(reference.adamw, reference.adamw))
    contest = Contest(case, (1000, 601), FP32, CPU)
    before = contest._inputs["param"].clone()
    found = contest.measure("forward", seconds=0, least=5)
    assert [row.variant for row in found if row.seconds] == ["fused", "reference", "compiled"]
    assert torch.equal(contest._inputs["param"], before)  # each sample has its own

    def forgets(**inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.adamw(**inputs | {"exp_avg": inputs["exp_avg"].clone()})

    assert measured(replace(case, in_place=(forgets, reference.adamw)))["fused"].skipped.startswith("wrong: exp_avg: ")


# Cases and budgets


@pytest.fixture
def no_time_passes(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(kernels, "by_turns", lambda works, device, seconds, least: {name: [seconds] for name in works})


@pytest.mark.usefixtures("no_time_passes")
def test_rows_come_first_shapes_first_and_end_with_the_time() -> None:
    other = replace(TOY, name="other", backward_bytes=None)
    cases = (replace(TOY, cpu_shapes=(SHAPE, (2, 16))), other)
    found = list(rows(CPU, 9.0, cases))
    order = list(dict.fromkeys((row.case, row.shape[0], row.direction) for row in found))
    every = ["forward", "backward", "both"]
    assert order == [*(("toy", 8, d) for d in every), ("other", 8, "forward"), *(("toy", 2, d) for d in every)]
    assert min(row.seconds[0] for row in found) > kernels.LEAST_SECONDS
    late = list(rows(CPU, 0.0, cases))
    assert [(r.case, r.shape, r.direction, r.variant) for r in late] == [
        (r.case, r.shape, r.direction, r.variant) for r in found
    ]
    assert {row.skipped for row in late} == {NO_TIME}


def test_the_time_is_kept_by_leaving_out_cases(clock: Clock) -> None:
    """A case takes 6 s to check, and 0.1 s a round; one that would not end is not begun, by the slowest so far."""

    def working(x: Tensor, weight: Tensor) -> Tensor:
        clock.let_pass(0.1)
        return scaled(x, weight)

    def slow_inputs(*given: Any) -> dict[str, Any]:
        clock.let_pass(3.0)
        return inputs_of(*given)

    toy = replace(TOY, fused=working, make_inputs=slow_inputs, backward_bytes=None)
    found = list(rows(CPU, 30.0, tuple(replace(toy, name=f"toy {i}") for i in range(9))))
    assert clock() <= 30.0
    assert {row.variant for row in found if row.case == "toy 0" and row.seconds} == {"fused", "reference", "compiled"}
    timed = {row.case for row in found if row.seconds}
    assert timed == {"toy 0", "toy 1", "toy 2", "toy 3"}
    assert {row.skipped for row in found if row.case not in timed} == {NO_TIME}
    assert len({row.case for row in found}) == 9
    assert {row.skipped for row in rows(CPU, 5.0, (toy,))} == {NO_TIME}  # its check took all of it


def test_work() -> None:
    by_name = {case.name: case for case in TIMED}
    bf16 = torch.bfloat16
    mlp = by_name["mlp, erf, tiles 1"]
    works = [work_of(mlp, (4, 8, 16), bf16, direction) for direction in ("forward", "backward", "both")]
    assert works == [(None, 2048), (None, 4096), (None, 6144)]
    loss = by_name["linear_cross_entropy"]
    assert work_of(loss, (4, 8, 16), bf16, "forward") == (None, None)
    assert work_of(loss, (4, 8, 16), bf16, "both") == (None, 3072)
    scores = 2 * 3 * 10 * 10 * 5 * 7  # batch, length, length, heads, head size; half of them masked
    assert work_of(by_name["attention"], (3, 10, 5, 7), bf16, "forward") == (None, scores)
    assert work_of(by_name["attention"], (3, 10, 5, 7), bf16, "backward") == (None, scores * 5 // 2)
    norm = by_name["layer_norm"]
    moved = norm.forward_bytes((4, 8), bf16), norm.backward_bytes((4, 8), bf16)
    assert work_of(norm, (4, 8), bf16, "both") == (sum(moved), None)


# Other people's kernels


@pytest.mark.parametrize("name", LIGER)
def test_ligers_counterparts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins with its signatures: the arguments reach them, and logits that they write over harm nobody."""
    functional = types.ModuleType("liger_kernel.transformers.functional")

    def cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
        loss = torch.nn.functional.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)
        input.detach().zero_()
        return loss

    def linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return torch.nn.functional.cross_entropy(input @ weight.T, target, ignore_index=ignore_index)

    functional.liger_layer_norm = lambda X, W, B, eps: torch.nn.functional.layer_norm(X, W.shape, W, B, eps)
    functional.liger_cross_entropy = cross_entropy
    functional.liger_fused_linear_cross_entropy = linear_cross_entropy
    for module in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    case = next(case for case in CASES if case.name == name)
    contest = Contest(replace(case, fused=case.reference), case.shapes[1], FP32, CPU)
    for direction in directions(case):
        for row in contest.measure(direction, seconds=0):
            assert row.skipped == ""
            assert row.seconds
    fresh = case.make_inputs(case.shapes[1], FP32, CPU)
    for name, given in contest._inputs.items():
        assert not isinstance(given, Tensor) or torch.equal(given, fresh[name])


def test_attention_is_timed_by_every_backend_that_runs_and_the_others_say_why_not() -> None:
    case = next(case for case in TIMED if case.name == "attention")
    found = measured(replace(case, cpu_shapes=case.shapes), "both")
    assert {"reference", "compiled", "flash", "math"} <= {name for name, row in found.items() if row.seconds}
    assert all(found[package].seconds or found[package].skipped for package in ("flash_attn", "fa3", "fa4"))
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
