"""python -m train [presets and config files] [--key=value ...]: parse, build, run."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

from train.config import TrainConfig, choose_base, compose, parse
from train.errors import UserError, ending, run

if __name__ == "__main__":  # --help, and a setting that is wrong, before torch is imported: that takes seconds
    with ending():
        parse(sys.argv[1:])

import torch

from model import GPT, GPTConfig
from model.attention import BACKENDS, why_not_dropout
from model.flops import flops_per_token
from train import checkpoint as checkpoints
from train.attention_choice import AttentionShape, choose_attention
from train.build import (
    adopt_shape,
    build_model,
    choose_graphs,
    choose_ops,
    gather_states,
    model_to_train,
    open_dataset,
    optimizer_state,
    place,
)
from train.checkpoint import MODEL_ARGS
from train.data import Dataset, Loader
from train.distributed import Reducer, World, local_device, process_group, world_from_environment
from train.graph import GraphedStep
from train.hardware import (
    DTYPES,
    Peak,
    allow_tf32,
    device_name,
    peak_flops,
    resolve_device,
    resolve_dtype,
    use_device,
)
from train.log import RunLog, check_sinks
from train.loop import Loop, Progress
from train.memory import as_planned_for, check_memory, free_memory, job_of
from train.optim import LossScale
from train.plot import plot_run
from train.profile import ProfiledStep, profiled_step
from train.sample import SampleConfig, sample_text
from train.step import Evaluation, TrainStep


def main() -> int:
    parsed = parse(sys.argv[1:])
    absent = bool(parsed.settings.get("rehearse"))  # the device is not there: everything is checked, nothing trained
    device = None if absent else resolve_device(str(parsed.settings.get("device", TrainConfig.device)))
    checkpoint = stored = None
    if parsed.settings.get("init_from") == "resume":
        out_dir = str(parsed.settings.get("out_dir", TrainConfig.out_dir))
        checkpoint = checkpoints.load(Path(out_dir) / "ckpt.pt")
        stored = {**checkpoint["config"], "out_dir": out_dir}
        if not checkpoint["nanofuse"]:  # nanoGPT's: it has no auto, and wrote down what its own machine had
            for name in ("device", "dtype", "backend"):
                stored.pop(name, None)
    base = choose_base(parsed, gpu=absent or device.type != "cpu", stored=stored)
    config = compose(parsed, base.settings)
    world = world_from_environment()
    if absent:
        from train.rehearse import rehearse  # only here: no run needs it

        _check_together(config, world, "cuda", DTYPES.get(config.dtype, torch.bfloat16))
        say = print if world.master else lambda text: None
        why = " over ".join([*reversed(parsed.sources), base.why])
        return rehearse(config, set(parsed.settings), why, checkpoint, world, say)
    device = use_device(local_device(resolve_device(config.device), world))
    with process_group(world, config.backend, device):
        status = train(config, set(parsed.settings), base.why, checkpoint, world, device)
    if world.size > 1:
        # Past the interpreter's own end: threads of torch's communication that still ask for the GIL during it abort
        # the process ("terminate called without an active exception"), and torchrun takes the run for failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def train(
    config: TrainConfig, named: set[str], why: str, checkpoint: dict | None, world: World, device: torch.device
) -> int:
    """One rank's run from its settings to its end; the exit status. Nothing is written before all input is checked.

    named: the settings that the user wrote. why: where the others come from. checkpoint: the one to go on from.
    """
    dtype, sharded = resolve_dtype(config.dtype, device), config.shard and world.size > 1
    _check_together(config, world, device.type, dtype)
    check_sinks(config)
    dataset = open_dataset(config.dataset, world)
    ops, chunk, kernels = choose_ops(config, device, dtype, dataset.vocab_size)
    raw_model = build_model(config, named, dataset, checkpoint, ops)
    raw_model.compute_dtype, raw_model.stream_dtype = dtype, getattr(torch, config.residual_dtype)
    raw_model.recompute = config.recompute
    config = adopt_shape(config, raw_model)
    dataset.check(config.block_size, raw_model.config.vocab_size)
    free = free_memory(device)  # before attention is measured, whose blocks torch's allocator keeps
    allow_tf32(device)
    raw_model.attention, attention = choose_attention(
        config.attention, AttentionShape.of(raw_model, config.batch_size, device), world
    )
    memory = ""
    if not config.eval_only:
        at = as_planned_for(device)
        job = job_of(config, raw_model.config, ops, dtype, world, chunk, resumed=checkpoint is not None, **at)
        memory = check_memory(job, str(device), free, world.size)
    optimizer = place(config, raw_model, ops, world, device)
    peak = Peak(config.peak_flops, "as set") if config.peak_flops else peak_flops(device, dtype)
    scaler = LossScale(device, enabled=dtype == torch.float16)
    progress, resumed_at = Progress(), None
    if checkpoint is not None:
        progress = _restore(checkpoint, raw_model, optimizer, scaler)
        resumed_at = progress.iter_num
        del checkpoint  # its tensors are as large as the model's and the optimizer's together

    log = None
    if world.master:
        parameters = raw_model.get_num_params()
        log = RunLog(config, device=device_name(device), parameters=parameters, resume_iter=resumed_at)
    say = log.message if log is not None else lambda text: None
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    say(f"{why}; dataset {config.dataset}, {len(dataset.train):,} tokens to train on")
    say(f"device: {device_name(device)} x {world.size}, {str(dtype).removeprefix('torch.')}, {ops.name} kernels")
    if kernels:
        say(kernels)
    say(f"peak: {peak.flops / 1e12:.4g} TFLOP/s, {peak.source}")
    if attention:
        say(f"attention: {attention}")
    say(f"number of parameters: {raw_model.get_num_params() / 1e6:.2f}M; tokens per iteration: {tokens:,}")
    if memory:
        say(memory)
    if config.shard:
        shared = f"parameters, gradients and moments shared out over {world.size} processes; no CUDA graphs"
        say(f"shard: {shared if sharded else 'one process, nothing to share out'}")

    def save(progress: Progress) -> None:
        states = gather_states(raw_model, optimizer, world) if sharded or world.master else None
        if world.master:
            state = _pack(config, raw_model.config, *states, scaler, dataset, progress)
            checkpoints.save(Path(config.out_dir), state, config.keep_checkpoints)

    model = model_to_train(raw_model, config, device, say, by_block=sharded)
    optimizer.clear()
    accumulation = config.gradient_accumulation_steps // world.size
    reducer = Reducer(world, optimizer.flat) if world.size > 1 and not sharded else None
    step = TrainStep(model, optimizer, grad_clip=config.grad_clip, scaler=scaler, reducer=reducer)
    evaluation = Evaluation(model)
    graphs, without = choose_graphs(config, device, sharded=sharded)
    if without:
        say(without)
    if graphs:
        step = GraphedStep(step, (accumulation, config.batch_size, config.block_size), evaluation)
        evaluation = step.evaluation
    if config.profile and world.master:
        step = profiled_step(step, config, raw_model, world, progress.iter_num, say)
    loader = Loader(
        dataset,
        batch_size=config.batch_size,
        block_size=config.block_size,
        accumulation=accumulation,
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
            evaluation=evaluation,
            step=step,
            loader=loader,
            log=log,
            save=save,
            flops=flops_per_token(raw_model.config, config.mfu_formula) * tokens,
            peak_flops=world.size * peak.flops,
            progress=progress,
        )
        try:
            status = loop.run()
        finally:
            if isinstance(step, ProfiledStep):
                step.end()
    if log is not None:
        say(loop.ended)
        if status == 0 and not config.eval_only:
            _farewell(config, loop, None if sharded else raw_model, dataset, say)
        log.close()
    return 128 + status if status else 0


def _check_together(config: TrainConfig, world: World, device: str, dtype: torch.dtype) -> None:
    """UserError for settings that this many processes, this device or this dtype cannot do."""
    if config.gradient_accumulation_steps % world.size:
        raise UserError(
            f"gradient_accumulation_steps: got {config.gradient_accumulation_steps}, expected a multiple of the "
            f"{world.size} processes, which share them out"
        )
    if config.profile and device == "mps":
        raise UserError("profile: got True, expected False on mps, whose kernels torch's profiler does not see")
    if reason := why_not_dropout(config.attention, config.dropout):
        able = ", ".join(name for name in BACKENDS if not why_not_dropout(name, config.dropout))
        raise UserError(
            f"attention: got {config.attention!r}, expected one of: {able} (with dropout={config.dropout}): {reason}"
        )
    if config.shard and world.size > 1 and dtype == torch.float16:
        raise UserError("dtype: got float16, expected bfloat16 or float32 with shard=True, which has no loss scale")


def _restore(checkpoint: dict, model: GPT, optimizer: torch.optim.AdamW, scaler: LossScale) -> Progress:
    """Give the optimizer and the scaler what the checkpoint holds for them; where the run stood."""
    checkpoints.load_optimizer(optimizer, optimizer_state(checkpoint, model))
    ours, iter_num = checkpoint["nanofuse"], checkpoint["iter_num"]
    if scaler.enabled and ours.get("scaler"):
        scaler.load_state_dict(ours["scaler"])
    # nanoGPT saves right after an evaluation, and does not count those without improvement
    stale_evals, judged_at = ours.get("stale_evals", 0), ours.get("judged_at", iter_num)
    return Progress(iter_num, checkpoint["best_val_loss"], stale_evals, judged_at)


def _pack(
    config: TrainConfig,
    shape: GPTConfig,
    model_state: dict,
    optimizer_state: dict,
    scaler: LossScale,
    dataset: Dataset,
    progress: Progress,
) -> dict:
    """The checkpoint of the present state."""
    return checkpoints.pack(
        model_state,
        optimizer_state,
        {name: getattr(shape, name) for name in MODEL_ARGS},
        progress.iter_num,
        progress.best_val_loss,
        dataclasses.asdict(config),
        {
            "gelu": shape.gelu,
            "tokenizer": dataset.meta,
            "scaler": scaler.state_dict(),
            "stale_evals": progress.stale_evals,
            "judged_at": progress.judged_at,
        },
    )


def _farewell(config: TrainConfig, loop: Loop, model: GPT | None, dataset: Dataset, say: Callable[[str], None]) -> None:
    """The end of a run: its losses, what the model writes, and where everything lies.

    model: None where this rank does not have it.
    """
    losses, best = loop.losses, loop.progress.best_val_loss
    say(f"final losses: train {losses.train:.4f}, val {losses.val:.4f} (best {best:.4f})")
    try:
        if model is None:
            raise UserError("the model is shared out; python -m train.sample reads it from the checkpoint")
        tokenizer = dataset.tokenizer(config.bpe_dir or None)
        start = "\n" if tokenizer.name != "char" or "\n" in tokenizer.chars else tokenizer.chars[0]
        generator = torch.Generator(model.lm_head.weight.device).manual_seed(config.seed)
        text = "".join(sample_text(model, tokenizer, SampleConfig(start=start, max_new_tokens=300), generator))
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
