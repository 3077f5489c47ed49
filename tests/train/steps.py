"""A very small GPT, its step, its batches, and everything that a step changes."""

from collections.abc import Callable
from typing import Any

import torch

from kernels import REFERENCE, Ops
from model import GPT, GPTConfig, Precision
from train.data import Batch
from train.optim import FlatAdamW, LossScale
from train.step import TrainStep

B, T, V = 2, 8, 13
CPU = torch.device("cpu")


def small_model(
    ops: Ops = REFERENCE,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    attention: str = "auto",
    **shape: Any,
) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(**dict(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=16, dropout=0.0) | shape)
    exact = dtype == torch.float64
    precision = Precision(dtype, dtype) if exact else Precision(dtype)
    model = GPT(config, ops, precision=precision, attention=attention, recompute=recompute)
    return model.double() if exact else model


def make(
    ops: Ops = REFERENCE,
    *,
    accumulation: int = 1,
    several: bool = False,
    grad_clip: float = 0.5,
    device: torch.device = CPU,
    **model: Any,
) -> TrainStep:
    """The optimizer's own rate is not the step's, which comes with the call."""
    several = several or accumulation > 1
    model = small_model(ops, **model).to(device)
    optimizer = FlatAdamW(model, ops, learning_rate=1.0, betas=(0.9, 0.95), weight_decay=0.1, several=several)
    scaler = LossScale(device, enabled=model.precision.compute == torch.float16)
    return TrainStep(model, optimizer, grad_clip=grad_clip, accumulation=accumulation, scaler=scaler)


def batch(step: int, accumulation: int = 1, device: torch.device = CPU, size: int = B) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(V, (accumulation, size, T + 1), generator=generator).to(device)
    seeds = tuple(100 * step + micro for micro in range(accumulation))
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), seeds)


def train(
    step: Callable, accumulation: int, steps: int, device: torch.device = CPU, size: int = B
) -> list[tuple[float, float]]:
    results = [step(batch(i, accumulation, device, size), 1e-2 / (1 + i)) for i in range(steps)]
    return [(r.loss.item(), r.grad_norm.item()) for r in results]


def evaluated(step: TrainStep, batches: list[Batch]) -> list[float]:
    return [step.evaluate(batch.x[0], batch.y[0]).item() for batch in batches]


def everything(step: TrainStep) -> list[torch.Tensor]:
    """Copies of all tensors that a capture must leave unchanged. A gradient that the next one replaces is none."""
    adam, scaler, flat = step.optimizer, step.scaler, step.optimizer.flat
    tensors = [flat.param, flat.compute, flat.grad if flat.several else None, flat.exp_avg, flat.exp_avg_sq, adam.lr]
    tensors += [adam.steps, scaler.scale, scaler.growth_tracker, step.loss, step.grad_norm, torch.get_rng_state()]
    return [x.clone() for x in (*tensors, *step.model.parameters()) if x is not None]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
