"""Export a checkpoint for `transformers`: python -m train.export --out_dir=out --to=FOLDER

The folder gets GPT-2's layout: config.json and model.safetensors; tokenizer.json and tokenizer_config.json, from which
AutoTokenizer makes the checkpoint's tokenizer; and meta.json, which tells our own commands which tokenizer it is.

Every tokenizer here is a byte pair encoding: GPT-2's has merges, and characters and bytes are one without merges.
"""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.pretrained import CONFIG, MADE_BY, WEIGHTS, export_gpt2, from_checkpoint
from train.checkpoint import best_of, load
from train.data import checkpoint_tokenizer
from train.errors import UserError, one_line, run
from train.files import holds, making_folder, replace_together, staging_folder
from train.settings import command_line, setting
from train.text import END_OF_TEXT, GPT2_TOKENS, SPELLING, CharTokenizer, GPT2Tokenizer, Tokenizer, from_meta

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "meta.json")
FILES = (WEIGHTS, CONFIG, *TOKENIZER)


@dataclass(frozen=True)
class ExportConfig:
    out_dir: str = setting("out", "folder of the checkpoint", path=True)
    to: str = setting("", "folder to write the model and its tokenizer into", path=True)
    bpe_dir: str = setting("", "folder of GPT-2's encoder.json, for a machine without network", path=True)


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, dict[str, Any]]:
    """{file name: content} of a tokenizer, for `transformers` and for our commands."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splitting, joining = byte_level | {"use_regex": False}, byte_level
    merges, special = [], []
    if isinstance(tokenizer, CharTokenizer):
        vocab = {char: token for token, char in enumerate(tokenizer.chars)}
        splitting, joining = None, {"type": "Fuse"}
    elif isinstance(tokenizer, GPT2Tokenizer):
        tokens = [tokenizer.decode_bytes([token]) for token in range(GPT2_TOKENS - 1)]
        vocab = {spelled(token): rank for rank, token in enumerate(tokens)} | {END_OF_TEXT: GPT2_TOKENS - 1}
        merges = [list(map(spelled, pair)) for pair in merged(tokens)]
        splitting = byte_level | {"use_regex": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = [{"id": GPT2_TOKENS - 1, "content": END_OF_TEXT, "special": True, **flags}]
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    else:
        vocab = {spelled(bytes([byte])): byte for byte in range(tokenizer.n_vocab)}
    described = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": splitting,
        "post_processor": None,
        "decoder": joining,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return dict(zip(TOKENIZER, (described, config, tokenizer.meta()), strict=True))


def spelled(token: bytes) -> str:
    """`token` in GPT-2's spelling."""
    return "".join(map(SPELLING.__getitem__, token))


def merged(tokens: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts that byte pair encoding makes each token of, tokens in the order of their merges."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def check_folder(folder: Path) -> None:
    """UserError if `folder` holds files with an export's names that no export wrote: another model's, a dataset's."""
    there = [name for name in FILES if os.path.lexists(folder / name)]
    if there and not holds(folder / CONFIG, f'"made_by": "{MADE_BY}"'):
        raise UserError(f"to: {folder} holds {there[0]}, which is not of an export; name another folder")


def main(argv: list[str] | None = None) -> None:
    about = "Write a checkpoint as a Hugging Face GPT-2 folder."
    config, _ = command_line(ExportConfig, argv, "python -m train.export", about)
    if not config.to:
        raise UserError("to: got '', expected a folder, as in --to=my-gpt2")
    path, folder = best_of(Path(config.out_dir)), Path(config.to)
    check_folder(folder)
    checkpoint = load(path)
    try:
        model = from_checkpoint(checkpoint)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    meta: dict[str, Any] = {}
    try:
        meta = checkpoint_tokenizer(checkpoint)
        tokenizer = from_meta(meta, config.bpe_dir or None, model.config.vocab_size)
        files = tokenizer_files(tokenizer, model.config.block_size)
        said = f"its tokenizer ({tokenizer.name}), too: transformers.AutoTokenizer.from_pretrained({str(folder)!r})"
    except UserError as error:  # GPT-2's needs a download; nanoGPT's checkpoints name only their dataset
        files, said = {}, f"without a tokenizer: {error}"
        if "table" in meta:  # a table of words: it tells which data the weights belong to
            files["meta.json"] = {name: meta[name] for name in ("vocab_size", "table")}
    try:
        with making_folder(folder), staging_folder(folder) as staging:
            export_gpt2(model, staging)
            for name, content in files.items():
                (staging / name).write_bytes(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            replace_together(staging, folder, FILES)  # those of an earlier export go
    except ImportError as error:
        raise UserError(str(error)) from error
    except UserError as error:
        raise UserError(f"to: {error}") from None
    how = f"read it with transformers.GPT2LMHeadModel.from_pretrained({str(folder)!r})"
    print(one_line(f"{folder}: iteration {checkpoint['iter_num']} of {path}, written; {how}"))
    print(one_line(f"{folder}: {said}"))


if __name__ == "__main__":
    run(main)
