"""Training traces computed with nanoGPT's own model (`tests/golden/training_traces.json`), repeated with ours.

All losses agree to 2e-5. The gradient norms and the final weights are chaotic: the keys' biases have gradients of
rounding errors only, and AdamW turns these into full steps. In float64, from weights moved by up to half a unit in
float32's last place, the trace `bias` ends 3 % away in gradient norm. So the first norms, before chaos starts, must
agree to 2e-5. Over the whole trace the distance to float64 may be three times the larger of two distances: that of
such moved weights, and that of the recorded trace. (Eager, with an update tensor by tensor and the recording's number
of threads, the trace is the same to the bit.)
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.launch import INTERPRETED
from model import GPT, GPTConfig, Precision
from tests.train.tape import tape
from train.compile import compile_model, compile_module
from train.data import Batch
from train.graph import GraphedStep
from train.optim import FlatAdamW
from train.step import TrainStep

CPU = torch.device("cpu")
TRACES = json.loads((Path(__file__).parents[1] / "golden" / "training_traces.json").read_text())["cases"]
CALM = 2  # steps before rounding errors grow: the first gradient, and the one after an update. A compiled step rounds
# differently, so only its first gradient counts.


class Trace(NamedTuple):
    loss: torch.Tensor
    grad_norm: torch.Tensor
    final_abs_sum: torch.Tensor


def recorded(case: dict) -> Trace:
    sums = [case["final_abs_sum"][name] for name in case["parameters"]]
    return Trace(*(torch.tensor(values, dtype=torch.float64) for values in (case["loss"], case["grad_norm"], sums)))


def golden_model(case: dict, dtype: torch.dtype = torch.float32, nudge: int = 0, ops: Ops = REFERENCE) -> GPT:
    """nudge: a seed, with which weights are moved by up to half a unit in float32's last place; 0 for none."""
    model = GPT(GPTConfig(**case["config"]), ops, precision=Precision(dtype, dtype)).to(dtype)
    parameters = dict(model.named_parameters())
    assert sorted(parameters) == case["parameters"]
    for k, name in enumerate(sorted(parameters)):
        wave = torch.sin(0.37 * torch.arange(parameters[name].numel(), dtype=torch.float64) + k)
        values = 1 + 0.1 * wave if ".ln_" in name and name.endswith("weight") else 0.02 * wave
        values = values.float().to(dtype)
        if nudge:
            noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(nudge), dtype=dtype) - 0.5
            values = values * (1 + noise * 2**-23)
        parameters[name].data.copy_(values.view_as(parameters[name]))
    return model


def golden_batch(case: dict, step: int, device: torch.device = CPU) -> Batch:
    accumulation, config = case["gradient_accumulation_steps"], case["config"]
    n = (step * accumulation + torch.arange(accumulation)).view(-1, 1, 1)
    b = torch.arange(case["batch_size"]).view(1, -1, 1)
    t = torch.arange(config["block_size"] + 1).view(1, 1, -1)
    tokens = (7 * b * b + 3 * t + 5 * b * t + 11 * n + (t * t) // 5) % config["vocab_size"]
    tokens = tokens.to(device)
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), (0,) * accumulation)


def train(
    case: dict,
    *,
    dtype: torch.dtype = torch.float32,
    mode: str = "eager",
    nudge: int = 0,
    ops: Ops = REFERENCE,
    steps: int | None = None,
    device: torch.device = CPU,
) -> Trace:
    """mode: eager, graphed (a tape replaces the graph), compiled, compiled in parts."""
    model = golden_model(case, dtype, nudge, ops).to(device)
    several = case["gradient_accumulation_steps"] > 1
    settings = {name: case[name] for name in ("learning_rate", "betas", "weight_decay")}
    optimizer = FlatAdamW(model, ops, **settings, several=several)
    compiled = model
    if mode.startswith("compiled"):
        compile = functools.partial(compile_module, device=device)
        compiled = compile_model(model, compile, in_parts=mode == "compiled in parts")
    step = TrainStep(compiled, optimizer, grad_clip=case["grad_clip"], accumulation=case["gradient_accumulation_steps"])
    if mode == "graphed":
        shape = case["batch_size"], case["config"]["block_size"]
        step = GraphedStep(step, shape, capture=tape)
    batches = [golden_batch(case, i, device) for i in range(steps or len(case["loss"]))]
    results = [step(batch, case["learning_rate"]) for batch in batches]
    parameters = dict(model.named_parameters())
    sums = torch.stack([parameters[name].detach().double().abs().sum() for name in case["parameters"]])
    return Trace(*(torch.stack(column).double().cpu() for column in zip(*results, strict=True)), sums.cpu())


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs() / expected.abs()).max().item()


@pytest.mark.parametrize("name", TRACES)
def test_the_recorded_logits(name: str) -> None:
    case = TRACES[name]
    batch = golden_batch(case, 0)
    logits, _ = golden_model(case)(batch.x[0], batch.y[0])
    torch.testing.assert_close(logits[0, 0, :8], torch.tensor(case["logits_0_0_first8"]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(logits[-1, -1, -8:], torch.tensor(case["logits_last_last8"]), rtol=2e-5, atol=1e-6)


@functools.cache
def exact(name: str, nudge: int = 0) -> Trace:
    return train(TRACES[name], dtype=torch.float64, nudge=nudge)


@pytest.mark.parametrize(
    "mode",
    ["eager", "graphed", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("compiled", "compiled in parts"))],
)
@pytest.mark.parametrize("name", TRACES)
def test_the_recorded_trace(name: str, mode: str, request: pytest.FixtureRequest) -> None:
    if mode.startswith("compiled"):
        request.getfixturevalue("compiler")
    golden, truth = recorded(TRACES[name]), exact(name)
    neighbours = [golden, *(exact(name, nudge) for nudge in (1, 2, 3))]
    norms, sums = (
        max(relative(getattr(trace, field), getattr(truth, field)) for trace in neighbours)
        for field in ("grad_norm", "final_abs_sum")
    )
    got = train(TRACES[name], mode=mode)
    calm = 1 if mode.startswith("compiled") else CALM
    assert relative(got.loss, golden.loss) < 2e-5
    assert relative(got.grad_norm[:calm], golden.grad_norm[:calm]) < 2e-5
    assert relative(got.grad_norm, truth.grad_norm) < max(3 * norms, 2e-5)
    assert relative(got.final_abs_sum, truth.final_abs_sum) < max(3 * sums, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="fused kernels run on a CPU only in Triton's interpreter")
@pytest.mark.parametrize("name", TRACES)
def test_the_recorded_trace_with_fused_kernels(name: str) -> None:
    """Only its beginning, because the interpreter takes a second per step."""
    case = TRACES[name]
    steps = 2 if case["gradient_accumulation_steps"] > 1 else 4
    golden, got = recorded(case), train(case, ops=FUSED, steps=steps)
    assert relative(got.loss, golden.loss[:steps]) < 2e-5
    assert relative(got.grad_norm[:CALM], golden.grad_norm[:CALM]) < 2e-5
