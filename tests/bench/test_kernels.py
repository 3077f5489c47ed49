"""Kernel benchmarks: what is timed is right, everything that is not has its reason, and samples come out as taken."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import entrants, kernels, timing
from bench.entrants import LIGER, TIMED
from bench.kernels import Contest, directions, rows, shapes, work_of
from bench.schema import Kernel, decode
from bench.tables import ceiling_share, kernels_table, rate
from kernels import reference
from kernels.cases import CASES, Case, Traffic
from kernels.cases.case import draw

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHAPE = (8, 16)
FP32 = torch.float32


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * weight.float()).to(x.dtype)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    randn = draw(device)
    return {"x": randn(*shape, dtype=dtype), "weight": randn(shape[-1], dtype=dtype)}


TOY = Case(
    name="toy",
    fused=scaled,
    reference=scaled,
    make_inputs=inputs_of,
    shapes=(SHAPE,),
    gpt_shapes=(SHAPE,),
    forward_bytes=lambda shape, dtype: Traffic(100, 7),
    backward_bytes=lambda shape, dtype: Traffic(150),
    cpu_shapes=(SHAPE,),
)


@pytest.fixture(autouse=True)
def everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused functions count as runnable, and nothing is compiled: the toys are plain torch."""
    monkeypatch.setattr(entrants, "why_not_fused", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def measured(case: Case, direction: str = "forward", **options: Any) -> dict[str, Kernel]:
    found = Contest(case, case.cpu_shapes[0], FP32, CPU).measure(direction, seconds=0, **options)
    return {row.variant: row for row in found}


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_every_variant_has_its_samples(direction: str) -> None:
    found = measured(TOY, direction, least=7)
    assert list(found) == ["fused", "reference", "compiled"]
    for row in found.values():
        assert len(row.seconds) == 7
        assert min(row.seconds) > 0
        assert row.bytes == {"forward": 100, "backward": 150, "both": 250}[direction]
        assert (row.case, row.shape, row.dtype, row.skipped) == ("toy", [8, 16], "float32", "")
        assert decode(Kernel, json.loads(json.dumps(vars(row))), "") == row


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


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_wrong_kernel_is_not_timed_nor_is_its_case(direction: str) -> None:
    found = measured(replace(TOY, fused=lambda x, weight: scaled(x, weight) + 1e-2), direction)
    assert found["fused"].skipped.startswith("wrong: output 0: 128 of 128 elements off, the worst by 0.01")
    for variant in ("reference", "compiled"):
        assert found[variant].skipped == "not timed, since fused is wrong"
    assert not any(row.seconds for row in found.values())


def test_wrong_gradients_are_found_too() -> None:
    def wrong(x: Tensor, weight: Tensor) -> Tensor:
        y = scaled(x, weight)
        return y + (x - x.detach()) * 1e-2

    assert measured(replace(TOY, fused=wrong))["fused"].skipped.startswith("wrong: dx: ")


def test_other_bits_the_second_time_are_wrong() -> None:
    flip = iter((0.0, 1e-8) * 50)

    def unsteady(x: Tensor, weight: Tensor) -> Tensor:
        return scaled(x, weight) * (1 + next(flip) * 16)

    assert measured(replace(TOY, fused=unsteady))["fused"].skipped == "wrong: output 0: other bits the second time"


def test_a_kernel_that_raises_is_wrong() -> None:
    def broken(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory access\nwas encountered")

    assert measured(replace(TOY, fused=broken))["fused"].skipped == "wrong: RuntimeError: an illegal memory access"


def test_others_that_are_wrong_are_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x, weight: 0 * x * weight)
    found = measured(TOY)
    assert found["compiled"].skipped.startswith("disagrees with the reference: output 0: ")
    assert not found["compiled"].skipped.startswith(kernels.WRONG)
    assert found["fused"].seconds
    assert found["reference"].seconds


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Callable, **options: Any) -> Callable:
        def call(**inputs: Any) -> None:
            raise RuntimeError("no working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert measured(TOY)["compiled"].skipped == "RuntimeError: no working C++ compiler found"


def test_without_a_gpu_ours_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    fused = measured(TOY)["fused"]
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert fused.skipped == "Triton's kernels need a CUDA device; its interpreter is no benchmark"


def test_out_of_memory_is_a_reason_of_one_variant() -> None:
    calls = iter(range(1000))

    def greedy(x: Tensor, weight: Tensor) -> Tensor:
        if next(calls) >= 2:  # the check's two are over
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")
        return scaled(x, weight)

    found = measured(replace(TOY, fused=greedy))
    assert found["fused"].skipped == "out of memory: CUDA out of memory. Tried to allocate 40 GiB"
    assert found["reference"].seconds


def test_where_float64_does_not_fit_fewer_rows_are_checked() -> None:
    checked = []

    def meaning(x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            checked.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("too large")
        return x * weight

    found = measured(replace(TOY, reference=meaning, cpu_shapes=((32, 16),)))
    assert checked == [32, 8, 2]
    assert found["fused"].seconds
    wrong = measured(replace(TOY, reference=meaning, fused=lambda x, weight: x + weight, cpu_shapes=((32, 16),)))
    assert wrong["fused"].skipped.startswith("wrong: ")


def test_what_works_in_place_is_checked_by_what_it_leaves_and_timed_without_copies() -> None:
    case = next(case for case in CASES if case.name == "adamw")
    assert case.in_place is not None
    case = replace(case, cpu_shapes=((1000, 601),), in_place=(reference.adamw, reference.adamw))
    storages = set()

    def spied(**inputs: Any) -> tuple[Tensor, Tensor]:
        storages.add(inputs["param"].data_ptr())
        return reference.adamw(**inputs)

    contest = Contest(replace(case, in_place=(spied, reference.adamw)), (1000, 601), FP32, CPU)
    storages.clear()
    found = contest.measure("forward", seconds=0, least=5)
    assert [row.variant for row in found if row.seconds] == ["fused", "reference", "compiled"]
    assert len(storages) == 1

    def forgets(**inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.adamw(**inputs | {"exp_avg": inputs["exp_avg"].clone()})

    assert measured(replace(case, in_place=(forgets, reference.adamw)))["fused"].skipped.startswith("wrong: exp_avg: ")


# Samples


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> timing.Clock:
    """In place of the host's."""
    clock = timing.Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    return clock


def test_samples_are_taken_by_turns(clock: timing.Clock) -> None:
    order = []

    def work(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock.let_pass(seconds)

        return run

    works = {"a": work("a", 0.25), "b": work("b", 0.5)}
    samples = timing.by_turns(works, CPU, seconds=2.0, least=2, most=100)
    assert samples == {"a": [0.25] * 3, "b": [0.5] * 3}  # 0.75 s a round, until 2 s have passed
    assert order == ["a", "b"] * 4  # the first is not counted


def test_what_is_made_for_a_sample_is_made_outside_the_clock(clock: timing.Clock) -> None:
    made: Iterator[int] = iter(range(100))
    used = []

    def prepare() -> int:
        clock.let_pass(10.0)
        return next(made)

    def work(given: int) -> None:
        used.append(given)
        clock.let_pass(0.5)

    samples = timing.by_turns({"staged": timing.Staged(prepare, work)}, CPU, seconds=0, least=4)
    assert samples == {"staged": [0.5] * 4}
    assert used == [0, 1, 2, 3, 4]  # a new one each time


# Cases and budgets


def test_rows_come_first_shapes_first_and_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "resolve_dtype", lambda name, device: FP32)
    other = replace(TOY, name="other", backward_bytes=None)
    cases = (replace(TOY, cpu_shapes=(SHAPE, (2, 16))), other)
    found = list(rows(CPU, 0.5, cases))
    order = list(dict.fromkeys((row.case, row.shape[0], row.direction) for row in found))
    every = ["forward", "backward", "both"]
    assert order == [*(("toy", 8, d) for d in every), ("other", 8, "forward"), *(("toy", 2, d) for d in every)]
    assert all(row.seconds for row in found)
    late = list(rows(CPU, 0.0, cases))
    assert [(r.case, r.shape, r.direction, r.variant) for r in late] == [
        (r.case, r.shape, r.direction, r.variant) for r in found
    ]
    assert {row.skipped for row in late} == {"no time was left"}


def test_an_interrupted_run_has_the_rows_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(x: Tensor, weight: Tensor) -> Tensor:
        raise KeyboardInterrupt

    running = rows(CPU, 1.0, (TOY, replace(TOY, name="second", fused=interrupted)))
    assert [next(running).case for _ in range(9)] == ["toy"] * 9
    with pytest.raises(KeyboardInterrupt):
        next(running)


def test_work() -> None:
    by_name = {case.name: case for case in TIMED}
    bf16 = torch.bfloat16
    linear = by_name["linear_gelu, erf, triton"]
    works = [work_of(linear, (4, 8, 16), bf16, direction) for direction in ("forward", "backward", "both")]
    assert works == [(None, 1024), (None, 2048), (None, 3072)]
    loss = by_name["linear_cross_entropy"]
    assert work_of(loss, (4, 8, 16), bf16, "forward") == (None, None)
    assert work_of(loss, (4, 8, 16), bf16, "both") == (None, 3072)
    scores = 2 * 3 * 10 * 10 * 5 * 7  # batch, length, length, heads, head size; half of them masked
    assert work_of(by_name["attention"], (3, 10, 5, 7), bf16, "forward") == (None, scores)
    assert work_of(by_name["attention"], (3, 10, 5, 7), bf16, "backward") == (None, scores * 5 // 2)
    norm = by_name["layer_norm"]
    moved = norm.forward_bytes((4, 8), bf16).dram, norm.backward_bytes((4, 8), bf16).dram
    assert work_of(norm, (4, 8), bf16, "both") == (sum(moved), None)


def meaning(case: Case) -> Callable[..., Any]:
    return case.in_place[1] if case.in_place else case.reference


def test_every_case_is_timed_at_gpts_shapes_and_every_operation_on_a_cpu() -> None:
    assert all(shapes(case, torch.device("cuda")) == case.gpt_shapes for case in TIMED)
    timed = {meaning(case) for case in TIMED if shapes(case, CPU)}
    assert timed | {reference.gelu} == {meaning(case) for case in TIMED}  # gelu: bias_gelu without the bias
    assert directions(next(case for case in CASES if case.name == "adamw")) == ("forward",)


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
    case = replace(case, fused=case.reference, cpu_shapes=(case.shapes[1],))
    for direction in directions(case):
        for row in measured(case, direction).values():
            assert row.skipped == ""
            assert row.seconds


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


# What is shown


def test_rates_and_ratios() -> None:
    def row(variant: str, **fields: Any) -> Kernel:
        return Kernel("toy", [8, 16], "float32", "forward", variant, **fields)

    ours, theirs = row("fused", seconds=[2e-3, 1e-3, 1e-3], bytes=10**9), row("compiled", seconds=[3e-3], bytes=10**9)
    assert rate(ours) == "1000 GB/s"
    assert ceiling_share(ours, matmul=1e12, copy=2e12) == 0.5
    product = row("fused", seconds=[1e-3], flops=10**9)
    assert rate(product) == "1 TFLOP/s"
    assert ceiling_share(product, matmul=4e12, copy=2e12) == 0.25
    assert ceiling_share(row("fused", seconds=[1.0]), matmul=4e12, copy=2e12) is None
    table = kernels_table([ours, theirs, row("liger", skipped="not there")], 1e12, 2e12).splitlines()
    assert [line.split() for line in table[2:]] == [
        ["toy", "8x16", "forward", "fused", "1000.0", "1000", "GB/s", "50%", "3.00x"],
        ["toy", "8x16", "forward", "compiled", "3000.0", "333.3", "GB/s", "17%", "1.00x"],
    ]


def pytest_bench(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_pytest_benchmark_is_shown_the_samples_to_the_last_bit(tmp_path: Path) -> None:
    samples = [0.1, 0.3, 1e-7, 0.7, 1.0 / 3.0]
    (tmp_path / "bench_samples.py").write_text(
        "import pytest\n"
        "from bench.session import CLOCK\n"
        "@pytest.mark.benchmark(timer=CLOCK)\n"
        f"def test_it(show): show({samples})\n"
    )
    out = tmp_path / "out.json"
    done = pytest_bench("-p", "bench.conftest", str(tmp_path / "bench_samples.py"), f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["benchmarks"]
    assert found["stats"]["data"] == samples


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_pytest_bench_end_to_end(tmp_path: Path) -> None:
    out, options = tmp_path / "out.json", ("--benchmark-max-time=0.1", "--benchmark-storage", str(tmp_path))
    chosen = ("bench/", "-k", "kernel and embedding and not both", "-rs", *options)
    done = pytest_bench(*chosen, f"--benchmark-json={out}", "--benchmark-only", "--benchmark-save=first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton's kernels need a CUDA device" in done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    groups = {(b["group"], b["params"]["variant"]) for b in found}
    names = [f"embedding 16x256x384x512 {found[0]['extra_info']['dtype']} {d}" for d in ("forward", "backward")]
    assert {group for group, _ in groups} == set(names)
    assert {variant for _, variant in groups} >= {"reference"}
    for one in found:
        assert one["stats"]["rounds"] == len(one["stats"]["data"]) >= 5
        info = one["extra_info"]
        assert info["bytes_per_second"] == pytest.approx(info["bytes"] / one["stats"]["median"])
        assert info["share_of_ceiling"] > 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("embedding") and "reference" in line)
    stats = next(b["stats"] for b in found if b["group"] == names[0] and b["params"]["variant"] == "reference")
    assert f"{1e6 * stats['median']:.1f}" in line.split()
    again = pytest_bench(*chosen, "--benchmark-compare=0001")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "(0001_first)" in again.stdout


@pytest.mark.slow
def test_plain_pytest_does_not_measure() -> None:
    done = pytest_bench("--collect-only", "-qq", "-k", "test_kernel or bench_kernels")
    assert "bench/bench_kernels.py" not in done.stdout


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
