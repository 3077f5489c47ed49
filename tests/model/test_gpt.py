"""The model as an object: its parameters, how they start, its modes and the calls that nanoGPT's users know."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from model import GPT, GPTConfig
from model.pretrained import export_gpt2
from tests.model.small import SHAPE, batch, make


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_have_nanogpts_names_and_the_values_that_its_seed_draws(bias: bool) -> None:
    """nanoGPT: every layer built in order, each drawing torch's default, then normals over all, then c_proj again."""
    c = 32

    def block() -> nn.ModuleDict:
        attn = {"c_attn": nn.Linear(c, 3 * c, bias=bias), "c_proj": nn.Linear(c, c, bias=bias)}
        mlp = {"c_fc": nn.Linear(c, 4 * c, bias=bias), "c_proj": nn.Linear(4 * c, c, bias=bias)}
        norms = {name: nn.LayerNorm(c, bias=bias) for name in ("ln_1", "ln_2")}
        return nn.ModuleDict({"attn": nn.ModuleDict(attn), "mlp": nn.ModuleDict(mlp), **norms})

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    torch.manual_seed(5)
    parts = {"wte": nn.Embedding(40, c), "wpe": nn.Embedding(16, c), "h": nn.ModuleList([block(), block()])}
    transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(c, bias=bias)})
    theirs = nn.ModuleDict({"transformer": transformer, "lm_head": nn.Linear(c, 40, bias=False)})
    transformer.wte.weight = theirs.lm_head.weight
    theirs.apply(initialise)
    for name, parameter in theirs.named_parameters():
        if name.endswith("c_proj.weight"):
            nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(4))
    after = torch.rand(3)

    torch.manual_seed(5)
    model = GPT(GPTConfig(**SHAPE, bias=bias))
    assert torch.equal(torch.rand(3), after)  # no draw more, none less
    state, expected = model.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert {name for name, _ in model.named_parameters()} == expected.keys() - {"lm_head.weight"}
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def test_dropout_only_in_training():
    model = make(dropout=0.5)
    pair = batch(model)
    assert model(*pair)[1] != model(*pair)[1]
    assert model.eval()(*pair)[1] == make()(*pair)[1]


def test_crop_block_size():
    model = make()
    idx, targets = batch(model, T=9)
    with pytest.raises(ValueError, match="got 17, expected at most the model's 16"):
        model.crop_block_size(17)
    _, before = model(idx, targets)
    model.crop_block_size(9)
    _, after = model(idx, targets)
    assert torch.equal(before, after)
    after.backward()
    assert model.transformer.wpe.weight.grad.shape == (9, 32)
    assert model.transformer.wpe.weight.untyped_storage().nbytes() == 9 * 32 * 4
    with pytest.raises(ValueError, match=r"got 10 tokens, expected at most 9 \(block_size\)"):
        model(torch.zeros(1, 10, dtype=torch.int64))


def test_the_config_is_nanogpts_by_default_and_a_shape_that_cannot_be_built_is_refused():
    gpt2 = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    assert dataclasses.asdict(GPTConfig()) == gpt2 | dict(dropout=0.0, bias=True, gelu="erf")
    for changes, message in (
        (dict(n_embd=30), r"n_embd: got 30, expected a multiple of n_head \(4\)"),
        (dict(vocab_size=0), "vocab_size: got 0, expected 1 or more"),
        (dict(dropout=1.0), "dropout: got 1.0, expected 0 or more and less than 1"),
        (dict(gelu="relu"), "gelu: got 'relu', expected 'erf' or 'tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            GPTConfig(**SHAPE | changes)


def test_configure_optimizers_makes_nanogpts_groups():
    model = make()
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay, matrices in zip(optimizer.param_groups, (0.1, 0.0), (True, False), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (6e-4, (0.9, 0.95), decay)
        assert list(map(id, group["params"])) == [id(p) for p in model.parameters() if (p.dim() >= 2) == matrices]


def test_estimate_mfu_is_of_an_a100():
    model = make()
    n = sum(p.numel() for p in model.parameters()) - 16 * 32
    expected = (6 * n + 12 * 2 * 4 * 8 * 16) * 16 * 5 / 0.25 / 312e12
    assert model.estimate_mfu(fwdbwd_per_iter=5, dt=0.25) == pytest.approx(expected)


def test_from_pretrained_takes_another_dropout_alone(tmp_path):
    export_gpt2(make(dropout=0.1), tmp_path)
    for options, dropout in ((dict(dropout=0.2), 0.2), (None, 0.0)):
        assert GPT.from_pretrained(str(tmp_path), options).config == GPTConfig(**SHAPE, dropout=dropout)
    with pytest.raises(ValueError, match="override_args: got bias, expected dropout"):
        GPT.from_pretrained(str(tmp_path), {"bias": False})


def test_somebody_elses_package_of_the_name_kernels(tmp_path: Path) -> None:
    """PyPI has one. Where it is imported instead of ours, the user is told what to do."""
    foreign = tmp_path / "kernels"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("def get_kernel(): ...\n")
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
    command = [sys.executable, "-m", "train", "--max_iters=0"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert str(foreign / "__init__.py") in last
    assert "pip uninstall kernels" in last
