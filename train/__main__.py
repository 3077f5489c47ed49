"""python -m train [presets and config files] [--key=value ...]: parse, build, run."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from model import GPT
from model.flops import flops_per_token
from train import checkpoint as checkpoints
from train.build import adopt_shape, build_model, model_to_train, open_dataset
from train.checkpoint_layout import MODEL_ARGS
from train.cli import Parsed, help_text
from train.config import TrainConfig, choose_base, compose, parse
from train.data import Dataset, Loader
from train.distributed import World, local_device, process_group, world_from_environment
from train.errors import UserError, run
from train.hardware import device_name, peak_flops, resolve_device, resolve_dtype
from train.log import RunLog
from train.loop import Loop, Progress
from train.optim import adamw
from train.plot import plot_run
from train.sample import sample_text
from train.step import TrainStep

ABOUT = "Train a GPT. With nothing else: the default job, which needs no network and no preparation."


def main() -> int:
    parsed = parse(sys.argv[1:])
    if parsed.help:
        print(help_text(TrainConfig, "python -m train", ABOUT, positional="[PRESET | CONFIG FILE ...]", presets=True))
        return 0
    device = resolve_device(str(parsed.settings.get("device", TrainConfig.device)))
    checkpoint = None
    out_dir = str(parsed.settings.get("out_dir", TrainConfig.out_dir))
    if parsed.settings.get("init_from") == "resume":
        checkpoint = checkpoints.load(Path(out_dir) / "ckpt.pt")
    stored = None if checkpoint is None else {**checkpoint["config"], "out_dir": out_dir}
    base = choose_base(parsed, gpu=device.type != "cpu", stored=stored)
    config = compose(parsed, base.settings)
    world = world_from_environment()
    device = local_device(resolve_device(config.device), world)
    with process_group(world, config.backend, device):
        return train(config, parsed, base.why, checkpoint, world, device)


def train(
    config: TrainConfig, parsed: Parsed, why: str, checkpoint: dict | None, world: World, device: torch.device
) -> int:
    """One rank's run from its settings to its end; the exit status. Nothing is written before all input is checked."""
    if config.gradient_accumulation_steps % world.size:
        raise UserError(
            f"gradient_accumulation_steps: got {config.gradient_accumulation_steps}, expected a multiple of the "
            f"{world.size} processes, which share them out"
        )
    dtype = resolve_dtype(config.dtype, device)
    dataset = open_dataset(config.dataset, world)
    raw_model = build_model(config, set(parsed.settings), dataset, checkpoint).to(device)
    raw_model.compute_dtype = dtype
    config = adopt_shape(config, raw_model)
    dataset.check(config.block_size, raw_model.config.vocab_size)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # float32 matmuls, where any are left
    peak = peak_flops(device, dtype) if not config.peak_flops else None

    optimizer = adamw(
        raw_model,
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    progress = Progress()
    if checkpoint is not None:
        checkpoints.load_optimizer(optimizer, checkpoint["optimizer"])
        ours = checkpoint["nanofuse"]
        progress = Progress(
            checkpoint["iter_num"],
            checkpoint["best_val_loss"],
            ours.get("stale_evals", 0),
            ours.get("judged_at", checkpoint["iter_num"]),
        )
        if scaler.is_enabled() and ours.get("scaler"):
            scaler.load_state_dict(ours["scaler"])
    resumed_at = None if checkpoint is None else checkpoint["iter_num"]
    del checkpoint  # its tensors are as large as the model's and the optimizer's together

    log = None
    if world.master:  # the first thing that writes
        log = RunLog(
            config.out_dir,
            dataclasses.asdict(config),
            device=device_name(device),
            parameters=raw_model.get_num_params(),
            resume_iter=resumed_at,
            wandb_log=config.wandb_log,
            wandb_project=config.wandb_project,
            wandb_run_name=config.wandb_run_name,
            tensorboard_log=config.tensorboard_log,
        )
    say = log.message if log is not None else lambda text: None
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    say(f"{why}; dataset {config.dataset}, {len(dataset.train):,} tokens to train on")
    say(f"device: {device_name(device)} x {world.size}, {str(dtype).removeprefix('torch.')}")
    say(
        f"peak: {config.peak_flops:g} FLOP/s, as set"
        if peak is None
        else f"peak: {peak.flops / 1e12:.4g} TFLOP/s, {peak.source}"
    )
    say(f"number of parameters: {raw_model.get_num_params() / 1e6:.2f}M; tokens per iteration: {tokens:,}")

    def save(progress: Progress) -> None:
        state = checkpoints.pack(
            raw_model.state_dict(),
            optimizer.state_dict(),
            {name: getattr(raw_model.config, name) for name in MODEL_ARGS},
            progress.iter_num,
            progress.best_val_loss,
            dataclasses.asdict(config),
            {
                "gelu": raw_model.config.gelu,
                "tokenizer": dataset.meta,
                "scaler": scaler.state_dict(),
                "stale_evals": progress.stale_evals,
                "judged_at": progress.judged_at,
            },
        )
        checkpoints.save(Path(config.out_dir), state, config.keep_checkpoints)

    model = model_to_train(raw_model, config, world, device, say)
    loader = Loader(
        dataset,
        batch_size=config.batch_size,
        block_size=config.block_size,
        accumulation=config.gradient_accumulation_steps // world.size,
        seed=config.seed,
        device=device,
        rank=world.rank,
        world_size=world.size,
        vocab_size=raw_model.config.vocab_size,
    )
    with loader:
        loop = Loop(
            config,
            world,
            device,
            model=getattr(model, "module", model),
            step=TrainStep(model, optimizer, grad_clip=config.grad_clip, scaler=scaler),
            loader=loader,
            log=log,
            save=save,
            flops=flops_per_token(raw_model.config, config.mfu_formula) * tokens,
            peak_flops=world.size * (config.peak_flops or peak.flops),
            progress=progress,
        )
        status = loop.run()
    if log is not None:
        say(loop.ended)
        if status == 0 and not config.eval_only:
            _farewell(config, loop, raw_model, dataset, say)
        log.close()
    return 128 + status if status else 0


def _farewell(config: TrainConfig, loop: Loop, model: GPT, dataset: Dataset, say: Callable[[str], None]) -> None:
    """The end of a run: its losses, what the model writes, and where everything lies."""
    say(
        f"final losses: train {loop.losses.train:.4f}, val {loop.losses.val:.4f}"
        f" (best {loop.progress.best_val_loss:.4f})"
    )
    try:
        generator = torch.Generator(model.lm_head.weight.device).manual_seed(config.seed)
        text = "".join(sample_text(model, dataset.tokenizer(config.bpe_dir or None), "\n", 300, generator=generator))
        say(f"a sample:\n{text}\n---------------")
    except UserError as error:  # GPT-2's ranks need a download once
        say(f"no sample of text: {error}")
    out_dir = Path(config.out_dir)
    checkpoint = out_dir / "ckpt.pt"
    say(f"checkpoint: {checkpoint if checkpoint.exists() else 'none was saved'}")
    say(f"metrics:    {out_dir / 'metrics.jsonl'}")
    say(f"loss curve: {plot_run(out_dir) or 'nothing to draw yet'}")


if __name__ == "__main__":
    run(main)
