"""TrainConfig: every setting of a training run, with nanoGPT's names and defaults wherever it has them.

A run's settings come in two layers. The base is the default job, a resumed checkpoint's own settings, or the
plain defaults (`choose_base`). Over it lie the settings that the command line names by preset, config file
or `--key=value`, the last one winning (`parse`). `compose` puts one over the other and validates the result.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from train.errors import UserError, shown
from train.settings import Parsed, Value, check_values, parse_settings, setting, settings_of, typed

FLOAT32 = 3.4e38  # the device computes with these settings in float32
MOST_TOKENS = 2**28  # in one step: the host holds its batch
MOST_ROWS = 2**22  # tokens in a micro-batch: more fill no device better, and settings that fit are found in seconds
ABOUT = "Train a GPT. With nothing else: the default job, which needs no network and no preparation."


@dataclass(frozen=True)
class TrainConfig:
    """Primitive values only: a checkpoint stores them as a dict and loads them with `weights_only=True`."""

    out_dir: str = setting("out", "folder of the checkpoint, metrics.jsonl and the loss curve", group="I/O", path=True)
    eval_interval: int = setting(2000, "iterations between evaluations", low=1)
    log_interval: int = setting(1, "iterations between console lines", low=1)
    eval_iters: int = setting(200, "batches of each split in an evaluation", low=1, below=10**7)
    eval_only: bool = setting(False, "evaluate once and stop; nothing is written")
    always_save_checkpoint: bool = setting(True, "save after every evaluation, not only after the best so far")
    keep_checkpoints: int = setting(2, "checkpoints kept, the newest included; the best one besides", low=1)
    init_from: str = setting("scratch", "scratch, resume, gpt2*, or a model.safetensors, ckpt.pt or folder", path=True)
    bpe_dir: str = setting("", "folder of GPT-2's encoder.json, for a machine without network", path=True)

    wandb_log: bool = setting(False, "log to Weights & Biases", group="wandb, TensorBoard")
    wandb_project: str = setting("owt", "Weights & Biases project")
    wandb_run_name: str = setting("gpt2", "Weights & Biases run name")
    tensorboard_log: bool = setting(False, "log to TensorBoard, under out_dir")

    dataset: str = setting("openwebtext", "folder under data/, or an absolute path", group="data", path=True)
    gradient_accumulation_steps: int = setting(1, "micro-batches in a step, over all ranks", low=1, below=2**20)
    batch_size: int = setting(12, "sequences in a micro-batch", low=1)
    block_size: int = setting(1024, "tokens in a sequence", low=1)
    seed: int = setting(1337, "seed of the weights, the batches and dropout", low=0)

    n_layer: int = setting(12, "number of blocks", group="model", low=1, below=1025)
    n_head: int = setting(12, "attention heads; must divide n_embd", low=1)
    n_embd: int = setting(768, "width", low=1, below=2**17)
    dropout: float = setting(0.0, "0 for pretraining, 0.1 or more for finetuning", low=0, below=1)
    bias: bool = setting(False, "biases in Linear and LayerNorm")
    gelu: str = setting("auto", "auto: erf for a new model, tanh for OpenAI's weights", choices=("auto", "erf", "tanh"))

    learning_rate: float = setting(6e-4, "largest rate, reached after warmup", group="AdamW", low=0, below=FLOAT32)
    max_iters: int = setting(600000, "steps in all", low=0)
    max_minutes: float = setting(0.0, "stop after this many minutes; 0: no limit", low=0)
    patience: int = setting(0, "stop after this many evaluations without improvement; 0: never", low=0)
    weight_decay: float = setting(1e-1, "weight decay of tensors of two or more dimensions", low=0, below=FLOAT32)
    beta1: float = setting(0.9, "decay of the mean gradient", low=0, below=1)
    beta2: float = setting(0.95, "decay of the mean squared gradient", low=0, below=1)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", low=0, below=FLOAT32)

    decay_lr: bool = setting(True, "warm up, then follow a cosine; off: constant", group="learning rate")
    warmup_iters: int = setting(2000, "steps of linear warmup", low=0)
    lr_decay_iters: int = setting(600000, "step at which the cosine ends; about max_iters", low=0)
    min_lr: float = setting(6e-5, "learning rate after that step; about learning_rate / 10", low=0, below=FLOAT32)

    backend: str = setting(
        "auto", "between processes; auto: nccl on CUDA, gloo on a CPU", group="system", choices=("auto", "nccl", "gloo")
    )
    device: str = setting("auto", "where to run: auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "precision of the matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(True, "torch.compile the model")
    cuda_graphs: bool = setting(True, "capture the step in CUDA graphs, where there is CUDA")
    shard: bool = setting(False, "share out parameters, gradients and moments over the processes (FSDP2)")
    residual_dtype: str = setting(
        "auto",
        "dtype of the residual stream; auto: bfloat16 on a GPU that computes in it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    kernels: str = setting("auto", "Triton's or torch's; auto: fused on CUDA", choices=("auto", "fused", "reference"))
    attention: str = setting(
        "auto",
        "auto: fastest on CUDA",
        choices=("auto", "cudnn", "flash", "efficient", "math", "flash_attn", "fa3", "fa4"),
    )
    loss_chunk: int = setting(-1, "rows of logits at a time, fused; 0: all; -1: all if memory allows", low=-1)
    recompute: str = setting("none", "what is computed again, to save memory", choices=("none", "mlp", "block"))
    mfu_formula: str = setting("nanogpt", "FLOPs a token; nanogpt: 6N + 12LHQT, 6n: 6N", choices=("nanogpt", "6n"))
    peak_flops: float = setting(0.0, "FLOP/s of one device, for the MFU; 0: from the table, or measured", low=0)
    rehearse: str = setting(
        "",
        "check the run for this GPU, without one, and train nothing; bare: the GPU at hand, or h100",
        choices=("", "auto", "a100", "h100", "h200", "b200", "l4", "4090", "l40s", "a10"),
        bare="auto",
    )
    profile: bool = setting(False, "profile a few steps: out_dir/trace.json, and where their time goes")


def check_each(config: TrainConfig) -> None:
    """UserError unless every setting by itself is one that some machine could make work."""
    check_values(config)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device, re.ASCII):
        raise UserError(f"device: got {shown(config.device)}, expected auto, cpu, cuda, cuda:N or mps")
    for name in ("out_dir", "dataset", "init_from"):
        if not getattr(config, name):  # --out_dir=$UNSET, for example
            raise UserError(f"{name}: got '', expected a name")


def notes(parsed: Parsed, config: TrainConfig) -> list[str]:
    """Lines for the user about settings that do less than they seem to."""
    lines = list(parsed.notes)
    if config.decay_lr and config.warmup_iters > config.lr_decay_iters:
        lines.append(
            f"warmup_iters: {config.warmup_iters} is more than lr_decay_iters ({config.lr_decay_iters}): the rate "
            f"rises for {config.warmup_iters} steps, then it is min_lr, without a cosine, as in nanoGPT"
        )
    return lines


def parse(argv: list[str]) -> Parsed:
    """The settings that a training command line names: presets, config files and overrides in argv order.

    Prints the help and raises SystemExit for --help. UserError as in `parse_settings`.
    """
    usage = "[PRESET | CONFIG FILE ...]"
    return parse_settings(TrainConfig, argv, "python -m train", ABOUT, positional=usage, presets=True)


def choose_base(
    parsed: Parsed, *, gpu: bool, stored: Mapping[str, Value] | None = None
) -> tuple[Mapping[str, Value], str]:
    """(the settings below those that the user named, and why these). stored: those in the checkpoint that is resumed.

    A preset or a config file lies over the plain defaults, as in nanoGPT. Without one, a resumed run goes on with its
    own settings, and a new run is the default job for this machine.
    """
    init_from = parsed.settings.get("init_from", TrainConfig.init_from)
    if not parsed.sources and init_from == "resume" and stored is not None:
        return stored, "the settings stored in the checkpoint"
    if not parsed.sources and init_from == "scratch":
        name, reason = ("docs", "the device is a GPU") if gpu else ("docs_cpu", "the device is a CPU")
        return parse([name]).settings, f"preset {name}: no preset was named, and {reason}"
    return {}, "the defaults"


def compose(parsed: Parsed, base: Mapping[str, Value]) -> TrainConfig:
    """`base` under the settings that were named, validated: UserError for a value that no machine could make work.

    Keys of `base` that are no setting are left out: the checkpoint of a fork may carry some. min_lr above learning_rate
    is allowed, as in nanoGPT: the schedule is defined, it rises. So is warmup_iters of lr_decay_iters or more: a
    schedule without a cosine.
    """
    settings = settings_of(TrainConfig)
    values = {**base, **parsed.settings}
    config = TrainConfig(**{name: typed(settings[name], value) for name, value in values.items() if name in settings})
    check_each(config)
    rows = config.batch_size * config.block_size
    step = config.gradient_accumulation_steps * rows
    for product, tokens, most in (
        ("gradient_accumulation_steps * batch_size * block_size", step, MOST_TOKENS),
        ("batch_size * block_size", rows, MOST_ROWS),
    ):
        if tokens > most:
            raise UserError(f"{product}: got {tokens} tokens, expected at most {most}")
    if config.init_from == "scratch" and config.n_embd % config.n_head:  # weights have both
        raise UserError(f"n_embd: got {config.n_embd}, expected a multiple of n_head ({config.n_head})")
    return config
