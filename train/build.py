"""What a run is made of: the model by init_from, the kernels in it, on its device, compiled; the data."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir  # TORCHINDUCTOR_CACHE_DIR, or the default

from kernels import Ops, missing, select
from model import GPT, GPTConfig
from model.pretrained import from_checkpoint, load_gpt2
from train.checkpoint import MODEL_ARGS, MOMENTS
from train.config import TrainConfig
from train.data import Batch, Dataset
from train.distributed import World
from train.errors import UserError, first_line
from train.hardware import synchronize
from train.optim import FlatAdamW
from train.prepare import ensure_docs
from train.step import Evaluation

LOSS_CHUNK = 4096  # rows of logits, where not all are held: enough for the matmuls to stay large
# CUPTI gives a replayed graph's kernels to the wrong launch. Its notes call that mended in 13.1 Update 1.
GRAPHS_MISREAD = ("13.0", "13.1")
SHAPE = ("n_layer", "n_head", "n_embd", "bias", "gelu")  # what weights fix once and for all


def open_dataset(name: str, world: World) -> Dataset:
    """data/<name>, or the folder of an absolute path. The corpus `docs`, which needs no network, is made if missing."""
    folder = Path("data") / name
    if name == "docs":
        if world.local_rank == 0:  # one a machine
            ensure_docs(folder)
        world.barrier()
    return Dataset(folder)


def choose_ops(
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    vocab_size: int,
    lacks: Callable[[torch.device], str] = missing,
) -> tuple[Ops, int, str]:
    """The run's kernels; how many rows of logits their loss holds at a time, 0 for all; what to say of the choice or
    nothing. UserError for kernels that cannot run. lacks: as for `kernels.select`.
    """
    lacks = functools.cache(lacks)  # it compiles and launches a kernel
    try:
        ops = select(config.kernels, device, lacks)
    except ValueError as error:
        raise UserError(f"kernels: {error}") from error
    reason = lacks(device) if config.kernels == "auto" and device.type == "cuda" else ""
    said = reason and f"kernels: the fused ones cannot run here, going on with the reference's: {reason}"
    ask = device.type == "cuda" and ops.name == "fused" and config.loss_chunk < 0
    room = torch.cuda.get_device_properties(device).total_memory if ask else float("inf")
    why = reason and f" (the fused ones cannot run here: {reason})"
    chunk = rows_at_a_time(config, ops, dtype, vocab_size, config.block_size, room, why)
    if ops.name == "reference":
        return ops, 0, said
    loss = functools.partial(ops.linear_cross_entropy, chunk_rows=chunk)
    return dataclasses.replace(ops, linear_cross_entropy=loss), chunk, said


def rows_at_a_time(
    config: TrainConfig, ops: Ops, dtype: torch.dtype, vocab_size: int, block_size: int, room: float, why: str = ""
) -> int:
    """How many rows of logits the loss holds at a time, 0 for all: as set, or in chunks where all of them would fill a
    quarter of `room`, the device's bytes. UserError for chunks of the reference kernels; why: what explains these."""
    chunk = config.loss_chunk
    if ops.name == "reference":
        if chunk > 0:
            raise UserError(f"loss_chunk: got {chunk}, expected 0 or -1: the reference kernels hold all logits{why}")
        return 0
    logits = config.batch_size * block_size * vocab_size * dtype.itemsize
    return chunk if chunk >= 0 else LOSS_CHUNK if logits > room / 4 else 0


def choose_graphs(
    config: TrainConfig, device: torch.device, *, sharded: bool, cuda: str | None = torch.version.cuda
) -> tuple[bool, str]:
    """Whether the step is captured in CUDA graphs, the same on every rank, and what to say of it or nothing.

    cuda: the version of CUDA that torch was built for, as torch.version has it.
    """
    graphs = config.cuda_graphs and device.type == "cuda" and not sharded and not config.eval_only
    if graphs and config.profile and cuda in GRAPHS_MISREAD:
        return False, (
            f"profile: this run makes no CUDA graphs, whose kernels CUDA {cuda}'s profiler misreads (kineto #1165); "
            "the steps are the same, and idle where the host is late"
        )
    return graphs, ""


def build_model(config: TrainConfig, named: set[str], dataset: Dataset, checkpoint: dict | None, ops: Ops) -> GPT:
    """A new model, OpenAI's, or the checkpoint's. `named`: the settings that the user wrote; none may contradict it.

    Raises UserError where one does, where weights cannot be had, where the data is shorter than a new model's
    block_size, and where its vocabulary is larger than a given model's.
    """
    gelu = None if config.gelu == "auto" else config.gelu
    if config.init_from == "scratch":
        dataset.check_length(config.block_size)  # before memory is taken for that many positions
        shape = {name: getattr(config, name) for name in MODEL_ARGS if name != "vocab_size"}
        torch.manual_seed(config.seed)
        return GPT(GPTConfig(vocab_size=dataset.vocab_size, gelu=gelu or "erf", **shape), ops)
    try:
        if checkpoint is not None:
            model = from_checkpoint(checkpoint, dropout=config.dropout, ops=ops)
        else:
            model = load_gpt2(config.init_from, dropout=config.dropout, gelu=gelu, ops=ops)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"init_from={config.init_from}: {error}") from error
    check_shape(config, named, model.config)
    if "block_size" in named and config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    check_vocabulary(config, dataset, model.config)
    return model


def check_vocabulary(config: TrainConfig, dataset: Dataset, shape: GPTConfig) -> None:
    """UserError where the data has more tokens than given weights know."""
    if dataset.n_vocab > shape.vocab_size:
        raise UserError(
            f"dataset={config.dataset}: it has {dataset.n_vocab} different tokens, the model {shape.vocab_size}"
        )


def check_shape(config: TrainConfig, named: set[str], shape: GPTConfig) -> None:
    """UserError where a setting that the user wrote contradicts the shape that given weights have."""
    for name in SHAPE:
        came, fixed = getattr(config, name), getattr(shape, name)
        if name in named and came not in (fixed, "auto"):
            raise UserError(
                f"{name}: got {came}, expected {fixed}, as the weights of init_from={config.init_from} have"
            )
    if "block_size" in named and config.block_size > shape.block_size:
        raise UserError(
            f"block_size: got {config.block_size}, expected at most {shape.block_size}, the positions that the "
            f"weights of init_from={config.init_from} know"
        )


def optimizer_state(checkpoint: dict, model: GPT) -> dict:
    """The checkpoint's AdamW state; where `model` was cropped, with the moments of its position embeddings cut too."""
    state, kept = checkpoint["optimizer"], model.config.block_size
    matrices = [p for p in model.parameters() if p.dim() >= 2]  # in the optimizer's order
    index = next(i for i, p in enumerate(matrices) if p is model.transformer.wpe.weight)
    entry = state["state"].get(index)
    if kept == checkpoint["model_args"]["block_size"] or not isinstance(entry, dict):
        return state
    cut = {key: value[:kept] if key in MOMENTS and value.ndim == 2 else value for key, value in entry.items()}
    return {**state, "state": {**state["state"], index: cut}}


def adopt_shape(config: TrainConfig, model: GPT) -> TrainConfig:
    """The settings, with the shape that the model really has: what the log and the checkpoint shall say."""
    return dataclasses.replace(config, **{name: getattr(model.config, name) for name in (*SHAPE, "block_size")})


def place(config: TrainConfig, model: GPT, ops: Ops, world: World, device: torch.device) -> torch.optim.AdamW:
    """Put `model`, still on the host, on the device, or this rank's share of it; its optimizer, `FlatAdamW` or
    `ShardedAdamW`."""
    settings = {
        "learning_rate": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }
    if config.shard and world.size > 1:
        from train import shard  # only here: torch takes a second to import what it needs

        shard.share_out(model, world, device)
        return shard.ShardedAdamW(model, **settings)
    model.to(device)
    return FlatAdamW(model, ops, **settings, in_float32=config.gradient_accumulation_steps > 1)


def gather_states(model: GPT, optimizer: torch.optim.AdamW, world: World) -> tuple[dict, dict]:
    """The state_dicts of both. A sharded model's are whole, and on the master rank only; every rank must call."""
    if isinstance(optimizer, FlatAdamW):
        return model.state_dict(), optimizer.state_dict()
    from train import shard

    keep = world.master
    return shard.whole_model(model, keep=keep), shard.whole(optimizer.state_dict(), keep=keep)


def compile_module(function: Callable) -> Callable:
    """torch.compile for a model, or a part of one, with our operations in it."""
    register_fallbacks()
    return torch.compile(function)


def register_fallbacks() -> None:
    """Tell Inductor, before it meets our operations, that they are to be called as they are.

    It would find out by itself, but too late for the first graph. Of a sum that two of them read it would make two
    copies. And before torch 2.13 it writes out the arguments of an operation that it does not know, as deep as the
    graph goes: five times the text for every layer, so that 12 layers never end (pytorch #185937).
    """
    # only here: they take a second
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("nanofuse::"):
            op = getattr(torch.ops.nanofuse, name.removeprefix("nanofuse::")).default
            if op not in lowerings:
                make_fallback(op, tag_to_layout_constraint(get_layout_constraint_tag(op)))


def model_to_train(
    model: GPT, config: TrainConfig, device: torch.device, say: Callable[[str], None], *, by_block: bool = False
) -> nn.Module:
    """`model` as the step runs it: compiled if wanted and possible. by_block: in place and block by block, as what
    gathers a sharded block's parameters lies between blocks.

    torch.compile works at the first call, so that call is made here, on zeros, as a step and as an evaluation make it:
    where it fails, the run goes on without. It leaves gradients behind, to be cleared, and no loss: nobody may hold one
    when graphs are captured (see `GraphedStep`). A run that only evaluates is over before compiling would have paid.
    """
    if not config.compile or config.eval_only:
        return model
    say("compiling the model... (takes a ~minute)")
    begin = time.perf_counter()
    compiled = model if by_block else compile_module(model)
    for block in model.transformer.h if by_block else ():
        block.forward = compile_module(block.forward)
    shape = config.batch_size, config.block_size
    # two tensors: one in both places would be compiled for that case alone
    idx, targets = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    try:
        compiled(idx, targets)[1].backward()
        Evaluation(compiled)([Batch(idx[None], targets[None], (0,))])
        synchronize(device)
        say(f"compiled in {time.perf_counter() - begin:.1f} s, kept for the next run in {cache_dir()}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from Dynamo, Inductor, a C++ compiler that is not there, Triton, a driver: all kinds
        say(f"compile: not possible on this machine, going on without it: {first_line(error)}")
        compiled = model
        for block in model.transformer.h if by_block else ():
            del block.forward  # what the class has shows again
    return compiled
