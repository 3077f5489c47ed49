"""The variants of a training step: nanoGPT's way, from this tree or from nanoGPT's checkout, and ours in each mode.

A variant's `build` makes a step with given weights. A step takes a batch and returns its mean loss, on the device.
"""

import contextlib
import dataclasses
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import results
from bench.results import Shape
from bench.rules import only_compiled
from kernels import REFERENCE, Ops, select
from model import GPT, GPTConfig, Precision
from model.flops import FORMULAS, flops_per_token
from model.groups import param_groups
from train.choices import Layer, choose_attention, choose_mlp
from train.compile import compile_model, compile_module, in_parts
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
        """Tokens of an iteration."""
        return self.accumulation * self.batch_size * self.config.block_size

    @property
    def shape(self) -> Shape:
        """The shape as a results file stores it."""
        sizes = {
            name: getattr(self.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        }
        return Shape(**sizes, bias=int(self.config.bias), batch_size=self.batch_size, accumulation=self.accumulation)

    def row(
        self, variant: str, *, compares: bool = True, dtype: torch.dtype = torch.bfloat16, seconds: Sequence[float] = ()
    ) -> results.Step:
        """A row of a results file. seconds: its samples."""
        flops = {formula: float(flops_per_token(self.config, formula) * self.tokens) for formula in FORMULAS}
        computed = str(dtype).removeprefix("torch.")
        return results.Step(
            self.name, variant, compares, computed, self.tokens, flops, self.shape, seconds=list(seconds)
        )


def _gpt2(name: str, batch_size: int, **shape: int) -> Workload:
    return Workload(name, GPTConfig(bias=False, **shape), batch_size)


_CHAR = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "bias": False}
_CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 96, "bias": False}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cpu", GPTConfig(**_CPU), 12),  # what a machine without a GPU runs by default
        Workload("shakespeare_char", GPTConfig(**_CHAR, dropout=0.2), 64),  # many small launches
        _gpt2("gpt2", 32),
        _gpt2("gpt2-batch-1", 1),  # shows the host's overhead
        _gpt2("gpt2-batch-4", 4),
        _gpt2("gpt2-medium", 16, n_layer=24, n_head=16, n_embd=1024),
        _gpt2("gpt2-large", 8, n_layer=36, n_head=20, n_embd=1280),
        _gpt2("gpt2-xl", 4, n_layer=48, n_head=25, n_embd=1600),
    )
}
DEFAULTS = {"cpu": ("cpu",), "cuda": ("gpt2", "shakespeare_char", "gpt2-batch-1")}


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


def reference(
    *,
    compile: bool,
    float32: bool,
    name: str = "reference",
    compares: bool = True,
    make: Callable[[Setting], Trained] | None = None,
) -> Variant:
    """Plain torch, as nanoGPT trains: autocast unless `float32`, gradients clipped, then freed after the update.

    make: makes model and optimizer; None: this tree's reference, with torch's fused AdamW.
    """

    def build(setting: Setting) -> StepFunction:
        model, optimizer = (make or _plain)(setting)
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

    return Variant(f"{name} {'compiled' if compile else 'eager'}", build, compares, float32, compile)


def _plain(setting: Setting) -> Trained:
    model = GPT(setting.workload.config, REFERENCE).to(setting.device)
    fused = setting.device.type == "cuda"
    groups = param_groups(model, setting.weight_decay)
    return model, torch.optim.AdamW(groups, lr=setting.learning_rate, betas=setting.betas, fused=fused)


def nanogpt(folder: str, *, compile: bool, float32: bool, name: str = "nanoGPT", compares: bool = True) -> Variant:
    """A nanoGPT checkout's model and optimizer, otherwise as `reference`. Its files are not changed. UserError if
    `folder` has no model.py."""
    path = Path(folder, "model.py")
    if not os.path.isfile(path):
        raise UserError(f"nanogpt_dir: got {shown(folder)}, expected a nanoGPT checkout, with its model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    theirs = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = theirs  # its dataclass looks for its module there
    spec.loader.exec_module(theirs)

    def make(setting: Setting) -> Trained:
        fields = {f.name: getattr(setting.workload.config, f.name) for f in dataclasses.fields(theirs.GPTConfig)}
        with contextlib.redirect_stdout(io.StringIO()):
            model = theirs.GPT(theirs.GPTConfig(**fields)).to(setting.device)
            return model, model.configure_optimizers(
                setting.weight_decay, setting.learning_rate, setting.betas, setting.device.type
            )

    return reference(compile=compile, float32=float32, name=name, compares=compares, make=make)


def ours(
    name: str,
    *,
    ops: Ops | None = None,
    compile: bool = False,
    graphed: bool = False,
    attention: str = "auto",
    float32: bool = False,
    compares: bool = True,
) -> Variant:
    """The project's step. ops: None for the device's own choice."""

    def build(setting: Setting) -> StepFunction:
        workload, device = setting.workload, setting.device
        dtype = torch.float32 if float32 else setting.dtype
        layer = Layer(workload.config, workload.batch_size, dtype, device)
        bundle, _ = choose_mlp(select("auto", device), layer, World()) if ops is None else (ops, "")
        backend, _ = choose_attention(attention, layer, World())
        precision = Precision(dtype, resolve_stream("auto", dtype, device.type))
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
            module = compile_model(model, checked, in_parts=in_parts(device))
        step = TrainStep(module, optimizer, grad_clip=setting.grad_clip)
        if graphed:
            step = GraphedStep(step, (workload.accumulation, workload.batch_size, workload.config.block_size))
        return lambda batch: step(batch, setting.learning_rate).loss

    return Variant(name, build, compares, float32, compile)


def variants(device: torch.device, dtype: torch.dtype, nanogpt_dir: str = "") -> list[Variant]:
    """All variants, in the order from the reference's modes to ours."""
    on_cpu = device.type != "cuda"
    float32 = on_cpu or dtype == torch.float32  # nanoGPT has no autocast on a CPU
    every = []
    for compile in (False, True):
        every += [nanogpt(nanogpt_dir, compile=compile, float32=float32)] if nanogpt_dir else []
        every.append(reference(compile=compile, float32=float32))
    if on_cpu and dtype != torch.float32:
        # nanoGPT has no autocast on a CPU, but plain torch has: this shows how much of our gain is only bfloat16
        for compile in (False, True):
            rung = {"compile": compile, "float32": False, "compares": False}
            every += [nanogpt(nanogpt_dir, name="nanoGPT autocast", **rung)] if nanogpt_dir else []
            every.append(reference(name="reference autocast", **rung))
    every.append(ours("ours eager"))
    if on_cpu:
        return [*every, ours("ours compiled", compile=True)]
    every.append(ours("ours graphed", graphed=True))
    fused, bundle = select("auto", device), REFERENCE
    if fused is not REFERENCE:
        every += [
            ours("flat state, no casts", ops=REFERENCE, attention="flash", compile=True, compares=False),
            ours("attention", ops=REFERENCE, compile=True, compares=False),
        ]
        for name, fields in (
            ("LayerNorm", ("layer_norm", "add_layer_norm")),
            ("cross-entropy", ("linear_cross_entropy",)),
            ("GELU", ("mlp",)),
            ("embedding", ("embedding",)),
        ):
            bundle = dataclasses.replace(bundle, **{field: getattr(fused, field) for field in fields})
            every.append(ours(name, ops=bundle, compile=True, compares=False))
    # the last one is what `python -m train --compile` runs on a GPU
    return [*every, ours("ours compiled", compile=True), ours("ours compiled + graphed", compile=True, graphed=True)]
