"""Kernel benchmarks: what is timed is right, everything that is not has its reason, and samples come out as taken."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import kernels
from bench.kernels import LIGER, TIMED, Contest, directions, rows, work_of
from bench.results import WRONG, Kernel
from bench.rules import NO_TIME, RECOMPILED
from kernels import reference, timing
from kernels.cases import CASES, Case
from tests.clock import Clock

CPU = torch.device("cpu")
FP32 = torch.float32
SHAPE = (8, 16)
EVERY = ("forward", "backward", "both")
BY_NAME = {case.name: case for case in TIMED}
TOY = replace(BY_NAME["gelu, erf"], name="toy", fused=reference.gelu, cpu_shapes=(SHAPE,))


@pytest.fixture(autouse=True)
def everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused functions count as runnable: the toy's is plain torch. What is compiled is compiled without Inductor."""
    monkeypatch.setattr(kernels, "require_gpu", lambda device: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)  # warm caches will do here


def measured(case: Case, direction: str = "forward") -> dict[str, Kernel]:
    found = Contest(case, case.cpu_shapes[0], FP32, CPU).measure(direction, seconds=0)
    return {row.variant: row for row in found}


@pytest.mark.parametrize(("direction", "seconds"), [("forward", 1.0), ("backward", 10.0), ("both", 11.0)])
def test_a_direction_is_timed_and_nothing_else(direction: str, seconds: float, clock: Clock) -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock.let_pass(1.0)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            clock.let_pass(10.0)
            return dy

    slow = replace(TOY, fused=lambda x, approximate: reference.gelu(Slow.apply(x), approximate))
    contest = Contest(slow, SHAPE, FP32, CPU)
    found = contest.measure(direction, seconds=0, least=7)
    names = [f"toy 8×16 float32 {direction} {variant}" for variant in ("fused", "reference", "compiled")]
    assert [(row.name, len(row.seconds), row.skipped) for row in found] == [(name, 7, "") for name in names]
    assert found[0].seconds == [seconds] * 7


def greedy(x: Tensor, approximate: str, *, calls: Iterator[int] = count()) -> Tensor:  # noqa: B008
    if next(calls):  # the check's was the first
        raise torch.OutOfMemoryError("CUDA out of memory")
    return reference.gelu(x, approximate)


def broken(**inputs: Any) -> Tensor:
    raise RuntimeError("an illegal memory access\nwas encountered")


@pytest.mark.parametrize(
    ("variant", "function", "skipped"),
    [
        ("fused", lambda x, approximate: reference.gelu(x, approximate) + (x - x.detach()) * 1e-2, "wrong: dx: "),
        ("fused", broken, "wrong: an illegal memory access"),
        ("fused", greedy, "CUDA out of memory"),
        ("compiled", broken, "an illegal memory access"),
        ("compiled", lambda x, approximate: 0 * x, "disagrees with the reference: output 0: "),
    ],
)
def test_what_fails_is_left_out_alone_unless_ours_is_wrong(
    variant: str, function: Callable[..., Tensor], skipped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a case is timed if ours is wrong."""
    if variant == "compiled":
        monkeypatch.setattr(torch, "compile", lambda compiled, **options: function)
    found = measured(replace(TOY, fused=function) if variant == "fused" else TOY)
    row = found.pop(variant)
    assert row.skipped.startswith(skipped)
    assert not row.seconds
    for other in found.values():
        assert bool(other.seconds) == (not skipped.startswith("wrong"))
        assert other.skipped == ("" if other.seconds else "not timed, since fused is wrong")


def test_what_is_compiled_again_under_the_clock_has_no_samples() -> None:
    calls: list[Tensor] = []

    def restless(x: Tensor, approximate: str) -> Tensor:
        calls.append(x)  # compiled code is for one length of this list
        return reference.gelu(x, approximate)

    found = measured(replace(TOY, reference=restless))
    assert (found["compiled"].skipped, found["compiled"].seconds) == (WRONG + RECOMPILED, [])
    assert all(found[name].seconds for name in ("fused", "reference"))


def test_where_ours_cannot_run_it_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = measured(TOY)
    assert found["fused"].skipped == "Triton's kernels need a CUDA device; its interpreter is no benchmark"
    assert found["reference"].seconds


def test_what_works_in_place_is_checked_by_what_it_leaves() -> None:
    case = replace(BY_NAME["adamw"], cpu_shapes=((1000, 601),), fused=reference.adamw)
    contest = Contest(case, (1000, 601), FP32, CPU)
    before = contest._inputs["param"].clone()
    found = contest.measure("forward", seconds=0, least=5)
    assert [row.variant for row in found if row.seconds] == ["fused", "reference", "compiled"]
    assert torch.equal(contest._inputs["param"], before)  # each sample has its own

    def forgets(**inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.adamw(**inputs | {"exp_avg": inputs["exp_avg"].clone()})

    assert measured(replace(case, fused=forgets))["fused"].skipped.startswith("wrong: exp_avg: ")


# Cases and budgets


def test_the_time_is_kept_by_leaving_out_cases(clock: Clock) -> None:
    """A case takes 6 s to check, and 0.1 s a round; one that would not end is not begun, by the slowest so far. The
    first shape of every case comes first."""

    def working(**inputs: Any) -> Tensor:
        clock.let_pass(0.1)
        return reference.gelu(**inputs)

    def slow_inputs(*given: Any) -> dict[str, Any]:
        clock.let_pass(3.0)
        return TOY.make_inputs(*given)

    toy = replace(TOY, fused=working, make_inputs=slow_inputs, backward_bytes=None)
    cases = tuple(replace(toy, name=f"toy {i}", cpu_shapes=(SHAPE, (2, 16))) for i in range(4))
    found = list(rows(CPU, 30.0, cases))
    assert clock() <= 30.0
    order = list(dict.fromkeys((row.case, row.shape[0]) for row in found))
    assert order == [(case.name, size) for size in (8, 2) for case in cases]
    timed = dict.fromkeys((row.case, row.shape[0]) for row in found if row.seconds)
    assert list(timed) == order[:4]
    assert {row.variant for row in found if row.case == "toy 0" and row.seconds} == {"fused", "reference", "compiled"}
    assert {row.skipped for row in found if (row.case, row.shape[0]) not in timed} == {NO_TIME}
    assert {row.skipped for row in rows(CPU, 5.0, (toy,))} == {NO_TIME}  # its check took all of it


def test_work_and_the_shape_that_is_checked() -> None:
    scores = 2 * 3 * 10 * 10 * 5 * 7  # batch, length, length, heads, head size; half of them masked
    bf16, norm = torch.bfloat16, BY_NAME["layer_norm"]
    moved = norm.forward_bytes(4, 8, 2), norm.backward_bytes(4, 8, 2)
    for name, shape, expected in (
        ("mlp, erf, tiles 1", (4, 8, 16), [(None, 2048), (None, 4096), (None, 6144)]),
        ("linear_cross_entropy", (4, 8, 16), [(None, None), (None, None), (None, 3072)]),
        ("attention", (3, 10, 5, 7), [(None, scores), (None, scores * 5 // 2), (None, scores * 7 // 2)]),
        ("layer_norm", (4, 8), [(moved[0], None), (moved[1], None), (sum(moved), None)]),
    ):
        assert [work_of(BY_NAME[name], shape, bf16, direction) for direction in EVERY] == expected
    for name, shape, checked in (
        ("layer_norm", (32768, 768), 32768),
        ("linear_cross_entropy", (32768, 768, 50304), 2048),  # float64 takes too much
        ("adamw", (124_373_760, 124_354_560), 124_373_760),  # it has no rows
    ):
        assert kernels.checked(BY_NAME[name], shape, bf16) == (checked, *shape[1:])


# Other people's kernels


@pytest.mark.parametrize("name", LIGER)
def test_ligers_counterparts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins with its signatures: the arguments reach them, and logits that they write over harm nobody."""

    def cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
        loss = torch.nn.functional.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)
        input.detach().zero_()
        return loss

    def linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return torch.nn.functional.cross_entropy(input @ weight.T, target, ignore_index=ignore_index)

    functional = types.SimpleNamespace(
        liger_layer_norm=lambda X, W, B, eps: torch.nn.functional.layer_norm(X, W.shape, W, B, eps),
        liger_cross_entropy=cross_entropy,
        liger_fused_linear_cross_entropy=linear_cross_entropy,
    )
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    case = BY_NAME[name]
    contest = Contest(replace(case, fused=case.reference), case.shapes[1], FP32, CPU)
    found = contest.measure("both", seconds=0)
    assert [row.variant for row in found if row.seconds] == ["fused", "reference", "compiled", "liger"]
    fresh = case.make_inputs(case.shapes[1], FP32, CPU)
    for key, given in contest._inputs.items():
        assert not isinstance(given, Tensor) or torch.equal(given, fresh[key])


def test_attention_is_timed_by_every_backend_that_runs_and_the_others_say_why_not() -> None:
    case = BY_NAME["attention"]
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


# pytest bench/

BENCH = """
from dataclasses import replace
import torch
from bench import bench_rows, kernels
from bench.bench_rows import contest, kernel, pytest_generate_tests, pytestmark, session, test_kernel
from tests.bench.test_kernels import TOY

kernels.require_gpu = lambda device: None
real = torch.compile
torch.compile = lambda function, options=None: real(function, backend="eager")
wrong = replace(TOY, name="off", fused=lambda **inputs: 1.5 * TOY.reference(**inputs))
bench_rows.TIMED = tuple(replace(case, backward_bytes=None) for case in (TOY, wrong))
kernels.by_turns = lambda works, device, seconds, least: {name: [0.1, 0.3, 1e-7, 0.7, 1 / 3] for name in works}
"""


@pytest.mark.slow
def test_pytest_bench(tmp_path: Path) -> None:
    """Samples come out to the last bit, rates beside them; a wrong kernel fails, and its case is not timed."""
    (tmp_path / "bench_toys.py").write_text(BENCH)
    # not as a worker of xdist's, where pytest-benchmark would not measure
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "bench.conftest"]
    command += [str(tmp_path / "bench_toys.py"), "-rfs", "--benchmark-max-time=0", f"--benchmark-json={tmp_path}/out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    for said in (
        "1 failed, 3 passed, 2 skipped",
        "wrong: output 0: ",
        "not timed, since fused is wrong",
        "measured ceiling of a copy",
    ):
        assert said in done.stdout
    fused = json.loads((tmp_path / "out").read_text())["benchmarks"][0]
    assert fused["name"] == "test_kernel[toy-8x16-forward-fused]"
    assert fused["group"].startswith("toy 8x16 ")
    assert fused["stats"]["data"] == [0.1, 0.3, 1e-7, 0.7, 1 / 3]
    info, median = fused["extra_info"], 0.3
    moved = TOY.forward_bytes(*SHAPE, getattr(torch, info["dtype"]).itemsize)
    assert (info["bytes"], info["flops"], info["flops_per_second"]) == (moved, None, None)
    assert info["bytes_per_second"] == pytest.approx(moved / median)
    assert info["share_of_ceiling"] > 0
    assert info["times_faster_than_compiled"] == 1.0
