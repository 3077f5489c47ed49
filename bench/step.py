"""Time whole training steps: python -m bench.step --nanogpt_dir=DIR. Ours beside nanoGPT's, eager and compiled.

All variants live in one process and take turns, a block of iterations each, so that a machine whose speed drifts slows
all of them; the ratios are of medians. Each is fed the same batches and starts from the same weights, and before
anything is timed its losses, in eval mode, are checked against nanoGPT's. nanoGPT is read from a folder that is named,
its model.py untouched, and driven as its train.py drives it (autocast where its train.py has it: not on a CPU).
"""

import contextlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import select
from model import GPT, GPTConfig
from model.flops import flops_per_token
from train.build import open_dataset
from train.cli import Parsed, help_text, parse_settings
from train.config import compose, preset
from train.data import Batch, Loader
from train.distributed import World
from train.errors import UserError, run
from train.files import replacing
from train.hardware import device_name, peak_flops, resolve_device, resolve_dtype, synchronize
from train.metrics import mfu
from train.optim import FlatAdamW
from train.settings import check_values, setting
from train.step import TrainStep

CHECKED = 5  # steps, without dropout, whose losses must agree before the clock runs
AGREE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative; what low precision costs in them

Step = Callable[[Batch], Tensor]  # one optimizer step; the loss


@dataclass(frozen=True)
class StepBenchConfig:
    nanogpt_dir: str = setting("", "folder of a nanoGPT checkout (its model.py); empty: only ours")
    workload: str = setting("docs_cpu", "the preset whose shape, batch and optimizer are timed")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dropout: float = setting(-1.0, "of both, while timed; -1: the workload's", low=-1, below=1)
    dtype: str = setting("auto", "of our matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    rounds: int = setting(8, "turns that each variant takes", low=1)
    iters: int = setting(20, "iterations in a turn", low=1)
    out: str = setting("", "results file; empty: bench/results/step-<device type>-<workload>-<date>.json")


class Variant(NamedTuple):
    model: nn.Module
    step: Step


def ours(
    weights: dict[str, Tensor], shape: GPTConfig, config, device: torch.device, dtype, *, compile: bool
) -> Variant:
    ops = select("auto", device)
    model = GPT(shape, ops).to(device)
    model.load_state_dict(weights)
    model.compute_dtype = dtype
    optimizer = FlatAdamW(
        model,
        ops,
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        in_float32=config.gradient_accumulation_steps > 1,
    )
    step = TrainStep(torch.compile(model) if compile else model, optimizer, grad_clip=config.grad_clip)
    return Variant(model, lambda batch: step(batch, config.learning_rate).loss)


def nanogpts(folder: str, weights, shape: GPTConfig, config, device: torch.device, *, compile: bool) -> Variant:
    path = Path(folder, "model.py")
    if not path.is_file():
        raise UserError(f"nanogpt_dir: got {folder!r}, expected a nanoGPT checkout, with its model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    theirs = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = theirs  # its dataclass looks its module up
    spec.loader.exec_module(theirs)
    fields = {name: value for name, value in asdict(shape).items() if name != "gelu"}
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs.GPT(theirs.GPTConfig(**fields)).to(device)
        betas = config.beta1, config.beta2
        optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, device.type)
    model.load_state_dict(weights)
    net = torch.compile(model) if compile else model
    autocast = device.type == "cuda"

    def step(batch: Batch) -> Tensor:
        losses = []
        for x, y in zip(batch.x, batch.y, strict=True):
            with torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = net(x, y)[1] / len(batch.seeds)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    return Variant(model, step)


def check(name: str, losses: list[float], expected: list[float], tolerance: float) -> None:
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    if not worst < tolerance:
        raise UserError(f"{name}: its losses are off by {worst:.1e}, expected {tolerance:.0e} at most; not timed")


def measure(settings: StepBenchConfig) -> dict:
    """Build, check and time every variant. Returns the results as they are written to the file."""
    config = compose(Parsed(), preset(settings.workload))
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    dataset = open_dataset(config.dataset, World())
    shape = GPTConfig(
        **{k: getattr(config, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "bias")},
        dropout=config.dropout if settings.dropout < 0 else settings.dropout,
        vocab_size=dataset.vocab_size,
    )
    torch.manual_seed(config.seed)
    weights = GPT(shape).state_dict()
    variants: dict[str, Variant] = {}
    for compile in (False, True):
        mode = "compiled" if compile else "eager"
        if settings.nanogpt_dir:
            variants[f"nanoGPT {mode}"] = nanogpts(
                settings.nanogpt_dir, weights, shape, config, device, compile=compile
            )
        variants[f"ours {mode}"] = ours(weights, shape, config, device, dtype, compile=compile)
    accumulation = config.gradient_accumulation_steps
    sizes = {"batch_size": config.batch_size, "block_size": config.block_size, "accumulation": accumulation}
    with Loader(dataset, **sizes, seed=config.seed, device=device) as loader:
        losses = {}
        for name, (model, step) in variants.items():
            model.eval()
            losses[name] = [step(loader.train(i)).item() for i in range(CHECKED)]
            model.train()
            step(loader.train(0))  # compiled anew
        expected = next(iter(losses.values()))
        for name in variants:
            check(name, losses[name], expected, AGREE[dtype if name.startswith("ours") else torch.float32])
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(settings.rounds):
            for name, (_, step) in variants.items():
                samples[name] += timed(step, loader, turn * settings.iters, settings.iters, device)
    tokens = accumulation * config.batch_size * config.block_size
    return {
        "workload": settings.workload,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dropout": shape.dropout,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
        "command": "python -m bench.step " + " ".join(a for a in sys.argv[1:] if "nanogpt_dir" not in a),
        "flops_per_iteration": flops_per_token(shape, "nanogpt") * tokens,
        "peak_flops": asdict(peak_flops(device, dtype)),
        "losses": losses,
        "milliseconds": samples,
    }


def timed(step: Step, loader: Loader, first: int, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` iterations, loading included."""
    samples = []
    synchronize(device)
    for i in range(first, first + count):
        begin = time.perf_counter()
        step(loader.train(i))
        synchronize(device)
        samples.append(1e3 * (time.perf_counter() - begin))
    return samples


def commit() -> str:
    """The commit that was measured, with a + where the tree differs from it; unknown outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(results: dict) -> str:
    """The results as a Markdown table: median, p10 and p90 ms, MFU, and the ratio to nanoGPT's better mode."""
    medians = {name: statistics.median(values) for name, values in results["milliseconds"].items()}
    best = min((ms for name, ms in medians.items() if name.startswith("nanoGPT")), default=None)
    lines = ["| step | ms/iter | p10 | p90 | MFU | speed-up |", "|---|---|---|---|---|---|"]
    for name, values in results["milliseconds"].items():
        low, *_, high = statistics.quantiles(values, n=10)
        share = mfu(results["flops_per_iteration"], medians[name] / 1e3, results["peak_flops"]["flops"])
        faster = f"{best / medians[name]:.2f}x" if best else ""
        lines.append(f"| {name} | {medians[name]:.2f} | {low:.2f} | {high:.2f} | {share:.1%} | {faster} |")
    return "\n".join(lines)


def main() -> None:
    parsed = parse_settings(StepBenchConfig, sys.argv[1:], presets=False)
    if parsed.help:
        print(help_text(StepBenchConfig, "python -m bench.step", "Time training steps: ours beside nanoGPT's."))
        return
    settings = StepBenchConfig(**parsed.settings)
    check_values(settings)
    results = measure(settings)
    print(f"{settings.workload}, dropout {results['dropout']}, on {results['device']}, {results['threads']} threads")
    print(f"ours in {results['dtype']}")
    print(table(results))
    stem = f"step-{resolve_device(settings.device).type}-{settings.workload}-{results['date']}.json"
    path = Path(settings.out or Path("bench", "results", stem))
    os.makedirs(path.parent, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(results, indent=1).encode())
    print(f"written to {path}")


if __name__ == "__main__":
    run(main)
