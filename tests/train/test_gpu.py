"""The tests that need a CUDA device: what the CPU tests check, where the device could differ. `pytest -m gpu`"""

import dataclasses
import functools
import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import FUSED, select
from kernels.capture import WARM_UP
from kernels.fused.mlp import ways
from model import GPT, GPTConfig
from model.attention import SDPA
from model.recompute import MODES
from tests.train import steps
from tests.train.runs import last, logged, resume, run
from tests.train.test_golden import TRACES, recorded, relative, train
from train.choices import Layer, choose_mlp, why_not
from train.compile import compile_model, compile_module
from train.data import Batch
from train.distributed import World
from train.dryrun import Job, build, dry_run
from train.errors import UserError
from train.graph import GraphedStep
from train.profile import OTHER, read

CUDA = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def compiled(model: GPT) -> torch.nn.Module:
    """The model as a run compiles it."""
    compile = functools.partial(compile_module, device=CUDA)
    return compile_model(model, compile, in_parts=True)


@pytest.mark.parametrize("mode", ["eager", "compiled in parts"])
@pytest.mark.parametrize("name", TRACES)
def test_the_recorded_losses(name: str, mode: str) -> None:
    got = train(TRACES[name], mode=mode, device=CUDA)
    assert relative(got.loss, recorded(TRACES[name]).loss) < 1e-4  # sums in another order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_run_learns_what_the_cpu_learns(tmp_path: Path, dtype: str, compile: bool) -> None:
    settings = dict(dropout=0.0, max_iters=12)
    run(tmp_path / "cpu", **settings)
    run(tmp_path / "gpu", **settings, device="cuda", dtype=dtype, compile=compile)
    expected, got = logged(tmp_path / "cpu", "eval"), logged(tmp_path / "gpu", "eval")
    tolerance = 1e-3 if dtype == "float32" else 2e-2  # TF32; half precision: more rounding
    for iteration, record in expected.items():
        assert got[iteration]["val_loss"] == pytest.approx(record["val_loss"], rel=tolerance)


@pytest.mark.parametrize("compile", [pytest.param(False, marks=pytest.mark.smoke), True])
def test_resume_goes_on_where_the_run_was(tmp_path: Path, compile: bool) -> None:
    settings = dict(device="cuda", dtype="bfloat16", compile=compile)
    run(tmp_path / "whole", max_iters=12, **settings)
    run(tmp_path / "halves", max_iters=6, **settings)
    resume(tmp_path / "halves", max_iters=12)
    assert last(tmp_path / "halves")["iter_num"] == 12
    expected, got = logged(tmp_path / "whole"), logged(tmp_path / "halves")
    for iteration, record in expected.items():  # the embedding's gradient has no fixed order of summation
        assert got[iteration]["loss"] == pytest.approx(record["loss"], rel=2e-3)


def assert_same(got: list[tuple], expected: list[tuple], nan_ok: bool = False) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, nan_ok=nan_ok)


def assert_replayed(
    *, kernels: str, compile: bool = False, size: int = steps.B, recompute: str = "none", **settings: Any
) -> None:
    """A step in real graphs trains as an eager one does, and evaluates the same. Dropout uses the same seeds, also
    where it is recomputed. The capture, in the middle of a run, changes nothing."""
    ops, accumulation = select(kernels, CUDA), settings.get("accumulation", 1)
    eager = steps.make(ops, device=CUDA, **settings)
    captured = steps.make(ops, device=CUDA, recompute=recompute, **settings)
    if compile:
        eager.model, captured.model = compiled(eager.model), compiled(captured.model)
    for step in (eager, captured):
        steps.train(step, accumulation, 2, CUDA, size)
    before, generator = steps.everything(captured), torch.cuda.get_rng_state()
    graphed = GraphedStep(captured, (size, steps.T), evaluates=True)
    steps.assert_same(steps.everything(captured), before)
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    for evaluated in range(2):
        got, expected = (steps.train(step, accumulation, 10, CUDA, size) for step in (graphed, eager))
        assert_same(got, expected, nan_ok=captured.scaler.enabled)  # a gradient that overflowed
        if not (evaluated or compile):
            batches = [steps.batch(100 + k, 1, CUDA, size) for k in range(3)]
            assert steps.evaluated(graphed, batches) == steps.evaluated(captured, batches)


B16 = torch.bfloat16


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize(
    ("dtype", "accumulation", "dropout", "options"),
    [
        *((dtype, 1, 0.0, {}) for dtype in (torch.float32, B16, torch.float16)),
        *((dtype, 3, 0.2, {}) for dtype in (torch.float32, B16, torch.float16)),
        *((dtype, 2, 0.2, {"compile": True}) for dtype in (torch.float32, B16, torch.float16)),
        *((B16, 2, 0.2, {"recompute": mode}) for mode in MODES[1:]),
        pytest.param(B16, 1, 0.2, {"size": 1}, marks=pytest.mark.smoke, id="one sequence"),
    ],
)
def test_a_replayed_step_is_the_eager_step(
    kernels: str, dtype: torch.dtype, accumulation: int, dropout: float, options: dict
) -> None:
    assert_replayed(kernels=kernels, dtype=dtype, accumulation=accumulation, dropout=dropout, **options)


@pytest.mark.parametrize(("kernels", "chunk"), [("reference", 0), ("fused", 0), ("fused", 4096)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", MODES)
def test_the_memory_that_a_step_takes_is_the_estimate(recompute: str, dropout: float, kernels: str, chunk: int) -> None:
    """The step is large, so that an allocator's rounding and a library's workspace matter little."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    shape = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=False, dropout=dropout)
    job = Job(shape, 8, select(kernels, CUDA), recompute=recompute, loss_chunk=chunk)
    step = build(dataclasses.replace(job, on="cuda"))
    x, y = torch.randint(50304, (2, 1, 8, 1024), device=CUDA)
    torch.cuda.reset_peak_memory_stats()
    for i in range(3):
        step(Batch(x, y, (i,)), 1e-4)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(dry_run(job).total, rel=0.05)


def test_a_capture_that_fails_is_one_line_and_the_step_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    step, twin = (steps.make(dropout=0.2, device=CUDA) for _ in range(2))
    gather, runs = step.optimizer.gather, iter(range(WARM_UP))

    def fails() -> None:
        gather()
        if next(runs, None) is None:
            raise RuntimeError("no such thing in a capture")

    monkeypatch.setattr(step.optimizer, "gather", fails)
    with pytest.raises(UserError, match=r"no such thing in a capture; --no-cuda_graphs goes on without"):
        GraphedStep(step, (steps.B, steps.T))
    monkeypatch.undo()
    assert_same(steps.train(step, 1, 3, CUDA), steps.train(twin, 1, 3, CUDA))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
def test_a_run_on_the_second_device(tmp_path: Path) -> None:
    """Its graphs are captured on that device. Empty graphs would leave the losses at 0."""
    before = torch.cuda.current_device()
    try:
        run(tmp_path / "second", device="cuda:1", dropout=0.0)
    finally:
        torch.cuda.set_device(before)
    run(tmp_path / "first", device="cuda:0", dropout=0.0)
    expected = logged(tmp_path / "first")
    for iteration, record in logged(tmp_path / "second").items():
        assert record["loss"] == pytest.approx(expected[iteration]["loss"], rel=1e-3)


# Attention


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("empty_cache")
def test_a_run_says_which_attention_and_which_mlp_it_took(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for run_again in ("", ", as an earlier run measured"):
        run(tmp_path / f"out{run_again[:2]}", device="cuda", dtype="bfloat16")
        said = capsys.readouterr().out
        assert re.search(rf"^attention: .* flash .* a layer, forward and backward{run_again}$", said, re.MULTILINE)
        assert re.search(rf"^mlp: forward .* a layer{run_again}; backward .* a layer{run_again}$", said, re.MULTILINE)


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_tiles_of_the_mlp_are_right_and_timed(dtype: torch.dtype) -> None:
    layer = Layer(GPTConfig(), 4, dtype, CUDA)
    _, said = choose_mlp(FUSED, layer, World())
    assert "wrong" not in said
    for names, part in zip(ways(torch.empty(0, dtype=dtype, device=CUDA)), said.split("; "), strict=True):
        assert all(f"{name} " in part for name in names)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("backend", [*SDPA, "flash_attn", "fa3", "fa4"])
def test_every_attention_is_captured(backend: str, compile: bool, dropout: float) -> None:
    config = GPTConfig(block_size=steps.T, n_head=2, n_embd=16, dropout=dropout)  # of steps.make
    layer = Layer(config, steps.B, torch.bfloat16, CUDA)
    if reason := why_not(backend, layer):
        pytest.skip(f"{backend} does not run here: {reason}")
    options = dict(dropout=dropout, dtype=torch.bfloat16, attention=backend)
    assert_replayed(kernels="reference", compile=compile, **options)


# The profile


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("compile", [False, True])
def test_a_profile_sees_the_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture, cuda_graphs: bool, compile: bool
) -> None:
    """Also those of replayed graphs. Every instant belongs to a row, and almost none to unknown kernels."""
    settings = dict(device="cuda", dtype="bfloat16", compile=compile, cuda_graphs=cuda_graphs, max_iters=12)
    run(tmp_path / "out", profile=True, eval_interval=50, **settings)
    output = capsys.readouterr().out
    assert "profile: 5 steps of" in output
    timeline = read(json.loads((tmp_path / "out" / "trace.json").read_bytes()), cuda=True)
    assert sum(timeline.rows.values()) == pytest.approx(timeline.wall)
    for row in ("matmuls", "attention forward", "attention backward", "LayerNorm forward", "LayerNorm backward"):
        assert timeline.rows[row] > 0, f"{row}; unknown: {[name for row, name in timeline.names if row == OTHER]}"
    names = {name for _, name in timeline.names}
    for kernel in ("add_layer_norm_fwd_kernel", "add_layer_norm_bwd_kernel", "adamw_update_kernel"):
        assert any(kernel in name for name in names), kernel
    assert timeline.rows[OTHER] < 0.05 * timeline.wall
    assert last(tmp_path / "out")["iter_num"] == 12
