"""The ways to make a training step: as nanoGPT does, in this tree or in its own checkout, and ours, mode by mode.

A variant's `build` makes a step over given weights; a step takes a batch and returns its mean loss, on the device.
"""

import contextlib
import dataclasses
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.compiling import only_compiled
from bench.workloads import Workload
from kernels import REFERENCE, Ops, select
from model import GPT, Precision
from train.choices import AttentionShape, MLPShape, choose_attention, choose_mlp
from train.compile import compile_module
from train.data import Batch
from train.distributed import World
from train.errors import UserError
from train.graph import GraphedStep
from train.optim import FlatAdamW, param_groups
from train.step import TrainStep

Step = Callable[[Batch], Tensor]


class Setting(NamedTuple):
    """What every variant of a comparison shares."""

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
    build: Callable[[Setting], Step]
    compares: bool = True  # False: a rung of the ladder between the reference's step and ours
    float32: bool = False  # it multiplies in float32 whatever the dtype of the comparison
    compiled: bool = False  # by torch.compile
    graphed: bool = False  # its launches are captured
    ours: bool = False  # it runs our code
    ops: Ops | None = REFERENCE  # None: the device's own choice


def reference(*, compile: bool, float32: bool, name: str = "reference", compares: bool = True) -> Variant:
    """Plain torch, as nanoGPT trains: autocast unless `float32`, torch's fused AdamW, gradients clipped and dropped."""

    def build(setting: Setting) -> Step:
        model = GPT(setting.workload.config, REFERENCE).to(setting.device)
        model.load_state_dict(setting.weights)
        optimizer = torch.optim.AdamW(
            param_groups(model, setting.weight_decay),
            lr=setting.learning_rate,
            betas=setting.betas,
            fused=setting.device.type == "cuda",
        )
        if compile:
            model = only_compiled(model)
        return _as_nanogpt_trains(model, optimizer, setting, float32=float32)

    return Variant(f"{name} {_mode(compile)}", build, compares, float32, compile)


def nanogpt(folder: str, *, compile: bool, float32: bool) -> Variant:
    """A nanoGPT checkout's model and optimizer, its files untouched. UserError where `folder` is none."""
    theirs = _import_nanogpt(folder)

    def build(setting: Setting) -> Step:
        fields = {f.name: getattr(setting.workload.config, f.name) for f in dataclasses.fields(theirs.GPTConfig)}
        with contextlib.redirect_stdout(io.StringIO()):
            model = theirs.GPT(theirs.GPTConfig(**fields)).to(setting.device)
            optimizer = model.configure_optimizers(
                setting.weight_decay, setting.learning_rate, setting.betas, setting.device.type
            )
        model.load_state_dict(setting.weights)
        if compile:
            model = only_compiled(model)
        return _as_nanogpt_trains(model, optimizer, setting, float32=float32)

    return Variant(f"nanoGPT {_mode(compile)}", build, float32=float32, compiled=compile)


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

    def build(setting: Setting) -> Step:
        workload, device = setting.workload, setting.device
        dtype = torch.float32 if float32 else setting.dtype
        layer = workload.config, workload.batch_size, dtype, device
        bundle, _ = choose_mlp(select("auto", device), MLPShape.of(*layer), World()) if ops is None else (ops, "")
        backend, _ = choose_attention(attention, AttentionShape.of(*layer), World())
        model = GPT(workload.config, bundle, precision=Precision(compute=dtype), attention=backend).to(device)
        model.load_state_dict(setting.weights)
        optimizer = FlatAdamW(
            model,
            bundle,
            learning_rate=setting.learning_rate,
            betas=setting.betas,
            weight_decay=setting.weight_decay,
            in_float32=workload.accumulation > 1,
        )
        module = only_compiled(model, compile_module) if compile else model
        step = TrainStep(module, optimizer, grad_clip=setting.grad_clip)
        if graphed:
            step = GraphedStep(step, (workload.accumulation, workload.batch_size, workload.config.block_size))
        return lambda batch: step(batch, setting.learning_rate).loss

    return Variant(name, build, compares, float32, compile, graphed, True, ops)


def variants(device: torch.device, dtype: torch.dtype, nanogpt_dir: str = "") -> list[Variant]:
    """In the order of the ladder: the reference's modes, rung by rung to ours."""
    float32 = device.type != "cuda" or dtype == torch.float32  # nanoGPT has no autocast on a CPU
    modes = [{"compile": compile, "float32": float32} for compile in (False, True)]
    theirs = [variant for mode in modes for variant in _references(nanogpt_dir, mode)]
    if device.type != "cuda":
        # what nanoGPT does not do on a CPU, and plain torch could: without it, all of ours would seem to be our doing
        name = "reference autocast"
        rungs = [reference(**mode | {"float32": False}, name=name, compares=False) for mode in modes]
        return [
            *theirs,
            *(rungs if dtype != torch.float32 else []),
            ours("ours eager"),
            ours("ours compiled", compile=True),
        ]
    fused = select("auto", device)
    modes = [ours("ours eager"), ours("ours graphed", graphed=True)]
    if fused is REFERENCE:
        return [*theirs, *modes, ours("ours compiled", compile=True), _fastest()]
    rungs = [
        ours("flat state, no casts", ops=REFERENCE, attention="flash", compile=True, compares=False),
        ours("attention", ops=REFERENCE, compile=True, compares=False),
    ]
    bundle = REFERENCE
    for name, fields in (
        ("LayerNorm", ("layer_norm", "add_layer_norm")),
        ("cross-entropy", ("linear_cross_entropy",)),
        ("GELU", ("mlp",)),
        ("embedding", ("embedding",)),
    ):
        bundle = dataclasses.replace(bundle, **{field: getattr(fused, field) for field in fields})
        rungs.append(ours(name, ops=bundle, compile=True, compares=False))
    return [*theirs, *modes, *rungs, ours("ours compiled", compile=True), _fastest()]


def _references(nanogpt_dir: str, mode: dict[str, bool]) -> list[Variant]:
    return [*([nanogpt(nanogpt_dir, **mode)] if nanogpt_dir else []), reference(**mode)]


def _fastest() -> Variant:
    """What `python -m train --compile` runs on a GPU."""
    return ours("ours compiled + graphed", compile=True, graphed=True)


def _mode(compile: bool) -> str:
    return "compiled" if compile else "eager"


def _as_nanogpt_trains(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting, *, float32: bool) -> Step:
    """Accumulate, under autocast unless `float32`; clip, update, drop the gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

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


def _import_nanogpt(folder: str):
    path = Path(folder, "model.py")
    if not path.is_file():
        raise UserError(f"nanogpt_dir: got {folder!r}, expected a nanoGPT checkout, with its model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    theirs = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = theirs  # its dataclass looks its module up
    spec.loader.exec_module(theirs)
    return theirs
