"""The variants of a training step: nanoGPT's way, from this tree or from nanoGPT's checkout, and ours in each mode.

A variant's `build` makes a step with given weights. A step takes a batch and returns its mean loss, on the device.
"""

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.results import SIZES, Shape, Step
from bench.rules import only_compiled
from kernels import REFERENCE, Ops, select
from model import GPT, GPTConfig, Precision
from model.config import GPT2_SIZES
from model.gpt import param_groups
from model.work import FORMULAS, flops_per_token
from train.choices import Layer, choose_attention, choose_mlp
from train.compile import compile_model, compile_module
from train.data import Batch
from train.distributed import World
from train.errors import UserError, shown
from train.graph import GraphedStep
from train.hardware import resolve_stream
from train.optim import FlatAdamW
from train.step import TrainStep


@dataclass(frozen=True)
class Workload:
    name: str
    config: GPTConfig
    batch_size: int
    accumulation: int = 1

    @property
    def tokens(self) -> int:
        return self.accumulation * self.batch_size * self.config.block_size

    @property
    def shape(self) -> Shape:
        """The shape as a results file stores it."""
        sizes = (getattr(self.config, name) for name in SIZES)
        return Shape(*sizes, int(self.config.bias), self.batch_size, self.accumulation)

    def row(
        self, variant: str, *, compares: bool = True, dtype: torch.dtype = torch.bfloat16, seconds: Sequence[float] = ()
    ) -> Step:
        """A row of a results file. seconds: its samples."""
        flops = {formula: float(flops_per_token(self.config, formula) * self.tokens) for formula in FORMULAS}
        computed = str(dtype).removeprefix("torch.")
        return Step(self.name, variant, compares, computed, self.tokens, flops, self.shape, list(seconds))


_CHAR = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "bias": False}
_CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 96, "bias": False}
_GPT2 = GPTConfig(bias=False)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cpu", GPTConfig(**_CPU), 12),  # what a machine without a GPU runs by default
        Workload("shakespeare_char", GPTConfig(**_CHAR, dropout=0.2), 64),  # many small launches
        Workload("gpt2", _GPT2, 32),
        Workload("gpt2-batch-1", _GPT2, 1),  # shows the host's overhead
        Workload("gpt2-batch-4", _GPT2, 4),
        Workload("gpt2-medium", replace(_GPT2, **GPT2_SIZES["gpt2-medium"]), 16),
        Workload("gpt2-large", replace(_GPT2, **GPT2_SIZES["gpt2-large"]), 8),
        Workload("gpt2-xl", replace(_GPT2, **GPT2_SIZES["gpt2-xl"]), 4),
    )
}
DEFAULTS = {"cpu": "cpu", "cuda": "gpt2,shakespeare_char,gpt2-batch-1"}


def chosen(setting: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Split names at commas. UserError for an unknown name."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{setting}: got {shown(unknown[0])}, expected some of: {', '.join(known)}")
    return names


StepFunction = Callable[[Batch], Tensor]
Trained = tuple[nn.Module, torch.optim.Optimizer]


class Setting(NamedTuple):
    """The values that all variants of a comparison share."""

    workload: Workload
    weights: dict[str, Tensor]
    device: torch.device
    dtype: torch.dtype  # of our matmuls, and of the reference's autocast
    learning_rate: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    grad_clip: float = 1.0


class Variant(NamedTuple):
    name: str
    build: Callable[[Setting], StepFunction]
    compares: bool = True  # False: a rung, a step between the reference's and ours
    float32: bool = False  # its matmuls are in float32, whichever dtype the others use
    compiled: bool = False  # by torch.compile


def _plain(setting: Setting) -> Trained:
    """This tree's reference, with torch's fused AdamW."""
    model = GPT(setting.workload.config, REFERENCE).to(setting.device)
    groups = param_groups(model, setting.weight_decay)
    fused = setting.device.type == "cuda"
    return model, torch.optim.AdamW(groups, lr=setting.learning_rate, betas=setting.betas, fused=fused)


def reference(
    name: str = "reference",
    make: Callable[[Setting], Trained] = _plain,
    *,
    compile: bool,
    float32: bool,
    kind: str = "",
    compares: bool = True,
) -> Variant:
    """Plain torch, as nanoGPT trains: autocast unless `float32`, gradients clipped, then freed after the update.

    make: makes model and optimizer. kind: goes between its name and its mode.
    """

    def build(setting: Setting) -> StepFunction:
        model, optimizer = make(setting)
        model.load_state_dict(setting.weights)
        parameters = list(model.parameters())
        if compile:
            model = only_compiled(model)

        def step(batch: Batch) -> Tensor:
            losses = []
            for x, y in zip(batch.x, batch.y, strict=True):
                with contextlib.nullcontext() if float32 else torch.autocast(setting.device.type, setting.dtype):
                    loss = model(x, y)[1] / len(batch.seeds)
                loss.backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, setting.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return torch.stack(losses).sum()

        return step

    return Variant(f"{name}{kind} {'compiled' if compile else 'eager'}", build, compares, float32, compile)


def nanogpt(folder: str, **mode: Any) -> Variant:
    """A nanoGPT checkout's model and optimizer, otherwise `reference` in that mode. Its files are not changed.
    UserError if `folder` has no model.py."""
    path = Path(folder, "model.py")
    if not os.path.isfile(path):
        raise UserError(f"nanogpt_dir: got {shown(folder)}, expected a nanoGPT checkout, with its model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    theirs = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = theirs  # its dataclass looks for its module there
    spec.loader.exec_module(theirs)

    def make(setting: Setting) -> Trained:
        config = {f.name: getattr(setting.workload.config, f.name) for f in fields(theirs.GPTConfig)}
        with contextlib.redirect_stdout(io.StringIO()):
            model = theirs.GPT(theirs.GPTConfig(**config)).to(setting.device)
            return model, model.configure_optimizers(
                setting.weight_decay, setting.learning_rate, setting.betas, setting.device.type
            )

    return reference("nanoGPT", make, **mode)


def ours(
    name: str,
    *,
    ops: Ops | None = None,
    compile: bool = False,
    graphed: bool = False,
    attention: str = "auto",
    compares: bool = True,
) -> Variant:
    """The project's step. ops: None for the device's own choice."""

    def build(setting: Setting) -> StepFunction:
        workload, device = setting.workload, setting.device
        layer = Layer(workload.config, workload.batch_size, setting.dtype, device)
        bundle, _ = choose_mlp(select("auto", device), layer, World()) if ops is None else (ops, "")
        backend, _ = choose_attention(attention, layer, World())
        precision = Precision(setting.dtype, resolve_stream("auto", setting.dtype, device.type))
        model = GPT(workload.config, bundle, precision=precision, attention=backend)
        model.to(device).load_state_dict(setting.weights)
        optimizer = FlatAdamW(
            model,
            bundle,
            learning_rate=setting.learning_rate,
            betas=setting.betas,
            weight_decay=setting.weight_decay,
            several=workload.accumulation > 1,
        )
        module = model
        if compile:
            checked = partial(only_compiled, compile=partial(compile_module, device=device))
            module = compile_model(model, checked, in_parts=device.type == "cuda")
        step = TrainStep(module, optimizer, grad_clip=setting.grad_clip, accumulation=workload.accumulation)
        if graphed:
            step = GraphedStep(step, (workload.batch_size, workload.config.block_size))
        return lambda batch: step(batch, setting.learning_rate).loss

    return Variant(name, build, compares, compiled=compile)


def variants(device: torch.device, dtype: torch.dtype, nanogpt_dir: str = "") -> list[Variant]:
    """All variants, in the order from the reference's modes to ours."""
    on_cpu = device.type != "cuda"
    modes = [{"float32": on_cpu or dtype == torch.float32}]  # nanoGPT has no autocast on a CPU
    if on_cpu and dtype != torch.float32:  # but plain torch has: this shows how much of our gain is only bfloat16
        modes.append({"float32": False, "kind": " autocast", "compares": False})
    every = []
    for mode in modes:
        for compile in (False, True):
            every += [nanogpt(nanogpt_dir, compile=compile, **mode)] if nanogpt_dir else []
            every.append(reference(compile=compile, **mode))
    every.append(ours("ours eager"))
    if on_cpu:
        return [*every, ours("ours compiled", compile=True)]
    every.append(ours("ours graphed", graphed=True))
    fused, bundle = select("auto", device), REFERENCE
    if fused is not REFERENCE:
        rung = {"compile": True, "compares": False}
        every.append(ours("flat state, no casts", ops=REFERENCE, attention="flash", **rung))
        every.append(ours("attention", ops=REFERENCE, **rung))
        for name, operation in (
            ("LayerNorm", "add_layer_norm"),
            ("cross-entropy", "linear_cross_entropy"),
            ("GELU", "mlp"),
            ("embedding", "embedding"),
        ):
            bundle = replace(bundle, **{operation: getattr(fused, operation)})
            every.append(ours(name, ops=bundle, **rung))
    # the last one is what `python -m train --compile` runs on a GPU
    return [*every, ours("ours compiled", compile=True), ours("ours compiled + graphed", compile=True, graphed=True)]
