"""All decisions of a run, made and checked from its settings, its data and its shapes.

Nothing is built here. All that is written is the corpus `docs`, if it is missing, and measured times (`choices.py`). A
run (`__main__.py`) and a rehearsal (`rehearse.py`) share these checks. Only the run has its device.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import Ops, missing, select, too_wide
from model import GPTConfig, Precision
from model.attention import BACKENDS, why_not_dropout
from model.config import GPT2_SIZES
from model.pretrained import from_checkpoint, gpt2_shape
from model.work import flops_per_token, num_params
from train.checkpoint import MODEL_ARGS
from train.choices import Layer, choose_attention, choose_mlp
from train.config import TrainConfig
from train.corpora import dataset_folder
from train.data import Dataset, checkpoint_tokenizer, difference, weights_tokenizer
from train.distributed import World
from train.dryrun import Job
from train.errors import UserError
from train.hardware import Peak, card_at, device_name, peak_flops, resolve_dtype, resolve_stream, unused_gpu
from train.log import say
from train.memory import check_memory, free_memory, job_of, rows_at_a_time
from train.prepare import ensure_docs
from train.text import GPT2_TOKENS

# In these versions CUPTI assigns a replayed graph's kernels to the wrong launch. Its notes name a fix in 13.1 Update 1.
GRAPHS_MISREAD = ("13.0", "13.1")
SHAPE = ("n_layer", "n_head", "n_embd", "bias", "gelu")  # settings that loaded weights determine


@dataclass(frozen=True)
class Plan:
    """All decisions of a run."""

    config: TrainConfig  # its shape settings are those of `shape`
    dataset: Dataset
    device: torch.device  # of this rank
    world: World
    shape: GPTConfig
    ops: Ops
    precision: Precision
    attention: str  # one of model.attention.BACKENDS
    peak: Peak  # of one device
    lines: list[str]  # messages for the user
    tokenizer: dict[str, Any]  # as in meta.json: the data's, or that of the loaded weights if the data names none
    job: Job  # this rank's part in a step

    @property
    def sharded(self) -> bool:
        """Whether weights, moments and gradients are split over the ranks."""
        return self.config.shard and self.world.size > 1

    @property
    def accumulation(self) -> int:
        """Micro-steps of this rank in one step."""
        return self.config.gradient_accumulation_steps // self.world.size

    @property
    def tokens(self) -> int:
        """Tokens of all ranks in one step."""
        return self.config.gradient_accumulation_steps * self.config.batch_size * self.config.block_size

    @property
    def flops(self) -> float:
        """FLOPs of all ranks in one step."""
        return flops_per_token(self.shape, self.config.mfu_formula) * self.tokens


def decide(
    config: TrainConfig, named: set[str], why: str, checkpoint: dict | None, world: World, device: torch.device
) -> Plan:
    """The plan of one rank. UserError if the run is not possible.

    named: the settings that the user wrote. why: where the others come from. checkpoint: the one to resume from, or
    whose weights a new run takes.
    """
    dtype = resolve_dtype(config.dtype, device)
    check_together(config, world, device.type, dtype)
    dataset = open_dataset(config.dataset, world)
    shape = model_shape(config, named, checkpoint, dataset.vocab_size)
    ops, chunk, kernels = choose_ops(config, device, dtype, dataset.vocab_size, shape.n_embd)
    got = f"device: got {device_name(device)}, which computes in {dtype} with {ops.name} kernels"
    world.check_alike(got, dtype, ops.name, remedy="set --dtype and --kernels to what all GPUs can do")
    tokenizer = check_data(config, dataset, shape, checkpoint)
    config = dataclasses.replace(config, **{name: getattr(shape, name) for name in (*SHAPE, "block_size")})
    free = free_memory(device)  # first: torch's allocator keeps the memory that measuring attention takes
    layer = Layer(shape, config.batch_size, dtype, device)
    backend, attention = choose_attention(config.attention, layer, world)
    where = {"card": card_at(device)} if device.type == "cuda" else {"on": "cpu" if device.type == "cpu" else "meta"}
    job = job_of(config, world, shape, ops, dtype, loss_chunk=chunk, resumed=checkpoint is not None, **where)
    memory = "" if config.eval_only else check_memory(job, str(device), free, world.size)
    ops, mlp = choose_mlp(ops, layer, world)
    peak = Peak(config.peak_flops, "as set") if config.peak_flops else peak_flops(device, dtype)
    precision = Precision(dtype, resolve_stream(config.residual_dtype, dtype, device.type))
    plan = Plan(config, dataset, device, world, shape, ops, precision, backend, peak, [], tokenizer, job)
    shared = f"parameters, gradients and moments shared out over {world.size} processes; no CUDA graphs"
    lines = (
        f"{why}; dataset {config.dataset}, {len(dataset.train):,} tokens to train on",
        f"device: {device_name(device)} x {world.size}, {str(dtype).removeprefix('torch.')}, {ops.name} kernels"
        + (unused_gpu() if config.device == "auto" else ""),
        kernels,
        f"peak: {peak.flops / 1e12:.4g} TFLOP/s, {peak.source}",
        attention,
        mlp,
        f"number of parameters: {num_params(shape) / 1e6:.2f}M; tokens per iteration: {plan.tokens:,}",
        memory,
        config.shard and f"shard: {shared if plan.sharded else 'one process, nothing to share out'}",
    )
    plan.lines.extend(line for line in lines if line)
    return plan


def check_together(config: TrainConfig, world: World, device: str, dtype: torch.dtype) -> None:
    """UserError for settings that do not work with this number of processes, this device or this dtype."""
    if config.gradient_accumulation_steps % world.size:
        raise UserError(
            f"gradient_accumulation_steps: got {config.gradient_accumulation_steps}, expected a multiple of the "
            f"{world.size} processes, which share them out"
        )
    start = config.init_from  # checked here: before a dataset is asked for, which may be large
    if start not in ("scratch", "resume", *GPT2_SIZES) and not os.path.exists(start):
        offered = f"scratch, resume, {', '.join(GPT2_SIZES)}, or a path"
        raise UserError(f"init_from={start}: no such file or folder; expected {offered}")
    if config.profile and device == "mps":
        raise UserError("profile: got True, expected False on mps, whose kernels torch's profiler does not see")
    if reason := why_not_dropout(config.attention, config.dropout):
        able = ", ".join(name for name in BACKENDS if not why_not_dropout(name, config.dropout))
        raise UserError(
            f"attention: got {config.attention!r}, expected one of: {able} (with dropout={config.dropout}): {reason}"
        )
    if config.shard and world.size > 1 and dtype == torch.float16:
        raise UserError("dtype: got float16, expected bfloat16 or float32 with shard=True, which has no loss scale")


def open_dataset(name: str, world: World) -> Dataset:
    """The dataset in data/<name> or in an absolute path. `docs` is made if it is missing; this needs no network."""
    folder = dataset_folder(name)
    if folder == Path("data", "docs"):
        if world.local_rank == 0:  # one process per machine
            ensure_docs(folder, say)
        world.barrier()
    return Dataset(folder)


def choose_ops(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, vocab_size: int, width: int
) -> tuple[Ops, int, str]:
    """(the run's kernels; how many rows of logits their loss holds at a time, 0 for all; a message about the choice,
    may be empty). UserError for kernels that cannot run."""
    wanted = config.kernels == "fused" or (config.kernels == "auto" and device.type == "cuda")
    reason = (missing(device) or too_wide(width)) if wanted else ""
    try:
        ops = select(config.kernels, device, lambda device: reason)
    except ValueError as error:
        raise UserError(f"kernels: {error}") from error
    said = reason and f"kernels: the fused ones cannot run here, going on with the reference's: {reason}"
    fused_on_cuda = device.type == "cuda" and ops.name == "fused"
    room = torch.cuda.get_device_properties(device).total_memory if fused_on_cuda else float("inf")
    why = reason and f" (the fused ones cannot run here: {reason})"
    chunk = rows_at_a_time(config, ops, dtype, vocab_size, config.block_size, room, why)
    if chunk:
        loss = functools.partial(ops.linear_cross_entropy, chunk_rows=chunk)
        ops = dataclasses.replace(ops, linear_cross_entropy=loss)
    return ops, chunk, said


def model_shape(
    config: TrainConfig, named: set[str], checkpoint: dict | None, vocab_size: int, *, download: bool = True
) -> GPTConfig:
    """The model's shape: from the settings, from the checkpoint, or from the weights that init_from names. UserError if
    a setting that the user `named` contradicts the weights, and if the weights cannot be loaded.

    vocab_size: the data's. download: False does not fetch OpenAI's weights; their shape is known without them.
    """
    gelu = None if config.gelu == "auto" else config.gelu
    own = {name: getattr(config, name) for name in MODEL_ARGS if name != "vocab_size"}
    if config.init_from == "scratch":
        return GPTConfig(vocab_size=vocab_size, gelu=gelu or "erf", **own)
    with weights_wanted(config):
        if checkpoint is not None:
            shape = from_checkpoint(checkpoint, dropout=config.dropout).config
        elif config.init_from in GPT2_SIZES and not (download or Path(config.init_from).exists()):
            given = {"vocab_size": GPT2_TOKENS, "block_size": 1024, "bias": True, "gelu": gelu or "tanh"}
            shape = GPTConfig(**GPT2_SIZES[config.init_from], **given, dropout=config.dropout)
        else:
            shape = gpt2_shape(config.init_from, dropout=config.dropout, gelu=gelu)
    weights = f"weights of init_from={config.init_from}"
    for name in SHAPE:
        came, fixed = getattr(config, name), getattr(shape, name)
        if name in named and came not in (fixed, "auto"):
            raise UserError(f"{name}: got {came}, expected {fixed}, as the {weights} have")
    if "block_size" in named and config.block_size > shape.block_size:
        known = f"{shape.block_size}, the positions that the {weights} know"
        raise UserError(f"block_size: got {config.block_size}, expected at most {known}")
    return dataclasses.replace(shape, block_size=config.block_size) if "block_size" in named else shape


def check_data(config: TrainConfig, dataset: Dataset, shape: GPTConfig, checkpoint: dict | None) -> dict[str, Any]:
    """The run's tokenizer, as in meta.json. UserError if the data are too short, if a token is not in the vocabulary,
    and if the data's tokens are not those of the loaded weights."""
    if dataset.n_vocab > shape.vocab_size:
        raise UserError(
            f"dataset={config.dataset}: it has {dataset.n_vocab} different tokens, the model {shape.vocab_size}"
        )
    dataset.check(shape.block_size, shape.vocab_size)
    if config.init_from == "scratch":
        return dataset.meta
    if checkpoint is not None:
        tokenizer = checkpoint_tokenizer(checkpoint)
    else:
        tokenizer = weights_tokenizer(config.init_from, shape.vocab_size)
    if differs := difference(tokenizer, dataset.meta):
        raise UserError(
            f"dataset={config.dataset}: expected the tokens of init_from={config.init_from}, but {differs}; prepare "
            "the text with the tokenizer of the weights, or train a new model with --init_from=scratch"
        )
    return dataset.meta if "tokenizer" in dataset.meta else tokenizer


@contextmanager
def weights_wanted(config: TrainConfig) -> Iterator[None]:
    """Inside, an error from loading weights becomes a UserError."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"init_from={config.init_from}: {error}") from error


def choose_graphs(config: TrainConfig, device: torch.device, *, sharded: bool) -> tuple[bool, str]:
    """(whether the step is captured in CUDA graphs, the same on every rank; a message about it, may be empty)."""
    cuda = torch.version.cuda
    graphs = config.cuda_graphs and device.type == "cuda" and not sharded and not config.eval_only
    if graphs and config.profile and cuda in GRAPHS_MISREAD:
        return False, (
            f"profile: this run makes no CUDA graphs, whose kernels CUDA {cuda}'s profiler misreads (kineto #1165); "
            "the steps are the same, and idle where the host is late"
        )
    return graphs, ""
