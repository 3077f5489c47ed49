"""Small checkpoints for the tests, in our format and in nanoGPT's."""

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

from model import GPT
from train import checkpoint
from train.errors import UserError

MODEL_ARGS = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=True, vocab_size=32, dropout=0.0)


def make_model(seed: int = 0) -> torch.nn.Module:
    """Names and tied weights as in nanoGPT's GPT, with the fewest layers that have both kinds of parameter."""
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.transformer = torch.nn.ModuleDict({"wte": torch.nn.Embedding(32, 8), "ln_f": torch.nn.LayerNorm(8)})
    model.lm_head = torch.nn.Linear(8, 32, bias=False)
    model.transformer.wte.weight = model.lm_head.weight
    return model


def make_adamw(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **({"lr": 1e-3, "betas": (0.9, 0.95)} | options))


def train(model: torch.nn.Module, optimizer: torch.optim.AdamW, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def make_nanogpt(**changes) -> dict:
    """A checkpoint as nanoGPT's train.py saves it."""
    model = make_model()
    optimizer = make_adamw(model)
    train(model, optimizer, 3)
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "model_args": MODEL_ARGS,
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.25),
        "config": {"out_dir": "out", "dropout": 0.0, "compile": True},
    } | changes


def make_checkpoint(iteration: int = 3, best_iter: int = -1, **changes) -> dict:
    """One of ours in which every weight equals its iteration, so that a mix of two would show."""
    made = make_nanogpt(iter_num=iteration, best_val_loss=1.5, nanofuse={"gelu": "erf", "best_iter": best_iter})
    for tensor in made["model"].values():
        torch.nn.init.constant_(tensor, iteration)
    return made | changes


def save_gpt(model: GPT, **ours) -> None:
    """Write out/ckpt.pt in the current folder, of iteration 7."""
    args = {name: getattr(model.config, name) for name in MODEL_ARGS}
    made = make_nanogpt(model=model.state_dict(), model_args=args, iter_num=7, best_val_loss=1.5, config={})
    checkpoint.save(Path("out"), made | {"nanofuse": {"gelu": model.config.gelu} | ours}, keep=1)


def assert_same(a: object, b: object) -> None:
    """Also in types; tensors in every bit."""
    leaves, layout = tree_flatten(a)
    others, other_layout = tree_flatten(b)
    assert layout == other_layout
    for x, y in zip(leaves, others, strict=True):
        assert type(x) is type(y)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved_iterations(out_dir: Path) -> list[int]:
    """Of ckpt.pt and those before it, the newest first."""
    paths = [out_dir / "ckpt.pt", *sorted(out_dir.glob("ckpt-previous-*.pt"))]
    return [checkpoint.load(path)["iter_num"] for path in paths]
