"""A very short training job for tests of the command: its data and its settings."""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
CHARS = "abcdefghijklmnopqrstuvwxyz .,!?\n"
JOB = dict(
    dataset="letters",
    n_layer=1,
    n_head=2,
    n_embd=32,
    block_size=16,
    batch_size=2,
    learning_rate=0.01,
    warmup_iters=2,
    lr_decay_iters=20,
    compile=False,
    device="cpu",
    dtype="float32",
    peak_flops=3e11,
)


def make_data(folder: Path, *, train: int = 3000, val: int = 500, chars: str = CHARS) -> Path:
    """A prepared dataset of letters with different frequencies."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, length in (("train", train), ("val", val)):
        (rng.zipf(1.5, length) % len(chars)).astype("<u2").tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(chars), "tokenizer": "char", "dtype": "uint16", "chars": list(chars)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def arguments(**settings) -> list[str]:
    """JOB with changes, as command line arguments."""
    return [f"--{name}={value}" for name, value in (JOB | settings).items()]
