"""Sample from a trained model: python -m train.sample --out_dir=out --start="To be" """

import codecs
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model import GPT, Precision
from model.generate import generate
from model.pretrained import from_checkpoint, load_gpt2
from train.checkpoint import best_of, load, named
from train.compile import compile_module
from train.data import checkpoint_tokenizer, weights_tokenizer
from train.errors import UserError, first_line, one_line, quoted, run, safe, shown
from train.hardware import device_name, memory_suffices, resolve_device, resolve_dtype, use_device
from train.settings import command_line, setting
from train.text import GPT2_TOKENS, CharTokenizer, Tokenizer, from_meta, read_text


@dataclass(frozen=True)
class SampleConfig:
    """nanoGPT's sampling settings, by name and default, and top_p and bpe_dir."""

    init_from: str = setting(
        "resume",
        "resume (the best in out_dir), gpt2*, or a path to model.safetensors or ckpt.pt or the folder of one",
        group="model",
        path=True,
    )
    out_dir: str = setting("out", "folder of the checkpoint", path=True)
    bpe_dir: str = setting("", "folder of GPT-2's encoder.json, for a machine without network", path=True)

    start: str = setting("\n", "the prompt, or FILE:prompt.txt", group="sampling")
    num_samples: int = setting(10, "samples to draw", low=1, below=10**8)
    max_new_tokens: int = setting(500, "tokens drawn for each", low=0, below=10**8)
    end_of_text: bool = setting(False, "end a sample at the end-of-text token, with GPT-2's tokenizer")
    temperature: float = setting(0.8, "below 1 less random, above 1 more; 0: always the likeliest", low=0)
    top_k: int = setting(200, "draw from the k likeliest tokens; 0: from all", low=0)
    top_p: float = setting(1.0, "draw from the likeliest tokens that hold this probability; 1: from all", low=0)
    seed: int = setting(1337, "of the draws", low=0)

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="system")
    dtype: str = setting("auto", "of the matmuls", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(False, "torch.compile the model: slow to start")


def load_model(config: SampleConfig, dtype: torch.dtype) -> tuple[GPT, Tokenizer, str]:
    """The model that the settings name, on the CPU, to compute in `dtype`; its tokenizer; where it came from."""
    source, precision = config.init_from, Precision(compute=dtype)
    path = best_of(Path(config.out_dir)) if source == "resume" else named(source)
    try:
        if path is not None:
            checkpoint = load(path)
            model = from_checkpoint(checkpoint, dropout=0.0, precision=precision)
            source, meta = f"{path}, iteration {checkpoint['iter_num']}", checkpoint_tokenizer(checkpoint)
        else:
            model = load_gpt2(source, precision=precision)
            meta = weights_tokenizer(source, model.config.vocab_size)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{path or 'init_from'}: {error}") from error
    return model, from_meta(meta, config.bpe_dir or None, model.config.vocab_size), source


def to_inference(model: GPT, device: torch.device) -> None:
    """Prepare for sampling alone: linear layers keep their weights in the compute dtype, cast once, not at every token.
    The logits are bit for bit those of before."""
    model.to(device).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # the head too, which leaves the embedding its float32
            for name, weight in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(weight.to(model.precision.compute), requires_grad=False))


def try_compile(model: GPT, device: torch.device) -> nn.Module:
    """`model`, compiled for any number of tokens. If that fails: `model` itself, and a line on stderr says why."""
    try:
        compiled = compile_module(model, device, dynamic=True)
        list(generate(compiled, torch.zeros(1, 2, dtype=torch.int64, device=device), 2, 0))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Dynamo's, Inductor's, a missing C++ compiler's, Triton's, a driver's: all kinds
        print(f"compile: not possible here, going on without it: {first_line(error)}", file=sys.stderr)
        return model
    return compiled


def read_prompt(start: str, tokenizer: Tokenizer) -> str:
    """`start`, or the text of the file that it names as FILE:path, read as a corpus is. UserError."""
    if not start.startswith("FILE:"):
        return start
    path = Path(os.path.expanduser(start.removeprefix("FILE:")))
    try:
        return "".join(read_text([path], raw=tokenizer.name == "byte"))
    except UserError as error:
        raise UserError(f"start: {error}") from None


def example_start(tokenizer: Tokenizer) -> str:
    """A prompt that `tokenizer` can encode: a line end, or else a letter."""
    chars = tokenizer.chars if isinstance(tokenizer, CharTokenizer) else ("\n",)
    return "\n" if "\n" in chars else next((char for char in chars if char.isalnum()), chars[0])


def sample_text(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig, generator: torch.Generator | None = None
) -> Iterator[str]:
    """The text of one sample, config.start first, in pieces as they are drawn, none ending inside a character.

    config: only its group "sampling" counts. generator: on the model's device. UserError, at the call, if the prompt
    cannot be encoded or a number is out of range.
    """
    hint = f"for example --start={quoted(example_start(tokenizer))}"
    if config.end_of_text and tokenizer.name != "gpt2":
        raise UserError(f"end_of_text: got True, but the tokenizer, {tokenizer.name}, has no end-of-text token")
    try:
        ids = tokenizer.encode(config.start)
        if not ids:
            raise ValueError(f"got {shown(config.start)}, expected at least one token to go on from")
    except ValueError as error:
        raise UserError(f"start: {error}; {hint}") from error
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    draw = config.max_new_tokens, config.temperature, config.top_k or None, config.top_p
    try:
        tokens = generate(model, idx, *draw, n_vocab=tokenizer.n_vocab, generator=generator)
    except ValueError as error:
        raise UserError(str(error)) from error
    numbers = map(int, tokens)  # waits for the device
    if config.end_of_text:
        numbers = itertools.takewhile(lambda token: token != GPT2_TOKENS - 1, numbers)
    drawn = itertools.chain([ids], ([token] for token in numbers))
    return codecs.iterdecode(map(tokenizer.decode_bytes, drawn), "utf-8", "replace")  # holds half a character back


@memory_suffices("--device=cpu takes none of it")
def main(argv: list[str] | None = None) -> None:
    """The command. Samples go to stdout, a line about the model to stderr."""
    config, _ = command_line(SampleConfig, argv, "python -m train.sample", "Draw samples from a trained model.")
    device = use_device(resolve_device(config.device))
    dtype = resolve_dtype(config.dtype, device)
    model, tokenizer, source = load_model(config, dtype)
    config = dataclasses.replace(config, start=read_prompt(config.start, tokenizer))
    to_inference(model, device)
    size, computed = f"{model.get_num_params() / 1e6:.2f}M parameters", str(dtype).removeprefix("torch.")
    about = f"{source}: {size}, {tokenizer.name} tokens, {computed} on {device_name(device)}"
    print(one_line(about), file=sys.stderr)
    if config.compile:
        model = try_compile(model, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    for _ in range(config.num_samples):
        for piece in sample_text(model, tokenizer, config, generator):
            print(safe(piece), end="", flush=True)
        print("\n---------------")


if __name__ == "__main__":
    run(main)
