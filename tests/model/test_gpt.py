"""The model as an object: its parameters, how they start, its modes and the calls that nanoGPT's users know."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from kernels import REFERENCE
from model import GPT, GPTConfig
from model.pretrained import export_gpt2

TINY = dict(block_size=16, vocab_size=40, n_layer=2, n_head=4, n_embd=32)
WEIGHTS_OF_A_BLOCK = [
    "ln_1.weight",
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "ln_2.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
]


def make(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**TINY | changes))


def tokens(*shape: int, seed: int = 0, vocab_size: int = 40) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# Parameters


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_have_nanogpts_names(bias):
    weights = [f"transformer.h.{i}.{name}" for i in range(2) for name in WEIGHTS_OF_A_BLOCK]
    weights = ["transformer.wte.weight", "transformer.wpe.weight", *weights, "transformer.ln_f.weight"]
    expected = set(weights)
    if bias:
        expected |= {name.replace(".weight", ".bias") for name in weights[2:]}
    model = make(bias=bias)
    assert {name for name, _ in model.named_parameters()} == expected
    assert set(model.state_dict()) == expected | {"lm_head.weight"}
    assert not list(model.buffers())


def test_the_head_is_the_embedding():
    model = make()
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.load_state_dict({name: torch.full_like(tensor, 3.0) for name, tensor in state.items()})
    assert model.lm_head.weight is model.transformer.wte.weight


# Initialisation


@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_draws_the_weights_that_it_draws_in_nanogpt(bias):
    """nanoGPT: every layer built in order, each drawing torch's default, then normals over all, then c_proj again."""
    c = 32
    torch.manual_seed(5)
    drawn = {"transformer.wte": nn.Embedding(40, c), "transformer.wpe": nn.Embedding(16, c)}
    for i in range(2):
        for name, fan_in, fan_out in (
            ("attn.c_attn", c, 3 * c),
            ("attn.c_proj", c, c),
            ("mlp.c_fc", c, 4 * c),
            ("mlp.c_proj", 4 * c, c),
        ):
            drawn[f"transformer.h.{i}.{name}"] = nn.Linear(fan_in, fan_out, bias=bias)
    drawn["lm_head"] = nn.Linear(c, 40, bias=False)
    drawn["transformer.wte"].weight = drawn["lm_head"].weight
    for layer in drawn.values():
        nn.init.normal_(layer.weight, 0.0, 0.02)
    for name, layer in drawn.items():
        if name.endswith("c_proj"):
            nn.init.normal_(layer.weight, 0.0, 0.02 / math.sqrt(4))
    after = torch.rand(3)

    model = make(seed=5, bias=bias)
    assert torch.equal(torch.rand(3), after)  # no draw more, none less
    for name, layer in drawn.items():
        assert torch.equal(model.state_dict()[f"{name}.weight"], layer.weight), name


# Calls


def test_logits_of_all_positions_with_targets_and_of_the_last_without():
    model, idx = make(), tokens(3, 11)
    logits, loss = model(idx, tokens(3, 11, seed=1))
    last, nothing = model(idx)
    assert logits.shape == (3, 11, 40)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert last.shape == (3, 1, 40)
    assert nothing is None
    torch.testing.assert_close(last, logits[:, -1:], rtol=1e-5, atol=1e-6)


def test_dropout_only_in_training():
    model, idx, targets = make(dropout=0.5), tokens(4, 16), tokens(4, 16, seed=1)
    assert model(idx, targets)[1] != model(idx, targets)[1]
    model.eval()
    assert model(idx, targets)[1] == model(idx, targets)[1]
    plain = make()
    plain.load_state_dict(model.state_dict())
    assert model(idx, targets)[1] == plain(idx, targets)[1]
    model.train()
    torch.manual_seed(3)
    first = model(idx, targets)[1]
    torch.manual_seed(3)
    assert model(idx, targets)[1] == first


@pytest.mark.parametrize("place", ["embedding", "attention", "attn.c_proj", "mlp.c_proj"])
def test_dropout_acts_wherever_nanogpt_has_it(place):
    """With everything else cut off, what is left through `place` alone still varies in training."""
    model, idx, targets = make(n_layer=1, dropout=0.5), tokens(2, 8), tokens(2, 8, seed=1)
    block = model.transformer.h[0]
    with torch.no_grad():
        if place != "mlp.c_proj":
            block.mlp.c_proj.weight.zero_()
        if place in ("embedding", "mlp.c_proj"):
            block.attn.c_proj.weight.zero_()
    if place != "embedding":  # the embedding's own dropout is made one that drops nothing
        plain = lambda idx, wte, wpe, dtype, *_: REFERENCE.embedding(idx, wte, wpe, dtype, 0.0)  # noqa: E731
        model.ops = dataclasses.replace(REFERENCE, embedding=plain)
    if place == "attention":
        block.ln_2.dropout = 0.0
    elif place == "attn.c_proj":
        block.attn.dropout = 0.0
    else:
        block.attn.dropout = block.ln_2.dropout = 0.0
    if place != "mlp.c_proj":
        model.transformer.ln_f.dropout = 0.0
    assert model(idx, targets)[1] != model(idx, targets)[1]


def test_more_tokens_than_block_size():
    model = make()
    model(tokens(1, 16))
    with pytest.raises(ValueError, match=r"got 17 tokens, expected at most 16 \(block_size\)"):
        model(tokens(1, 17))


def test_crop_block_size():
    model, idx, targets = make(), tokens(2, 9), tokens(2, 9, seed=1)
    _, before = model(idx, targets)
    with pytest.raises(ValueError, match="got 17, expected at most the model's 16"):
        model.crop_block_size(17)
    model.crop_block_size(9)
    assert model.config.block_size == 9
    assert model.state_dict()["transformer.wpe.weight"].shape == (9, 32)
    assert model.state_dict()["transformer.wpe.weight"].untyped_storage().nbytes() == 9 * 32 * 4
    _, after = model(idx, targets)
    assert torch.equal(before, after)
    after.backward()
    assert model.transformer.wpe.weight.grad.shape == (9, 32)
    with pytest.raises(ValueError, match="got 10 tokens"):
        model(tokens(1, 10))


def test_generate_as_in_nanogpt():
    model, idx = make().eval(), tokens(2, 5)
    torch.manual_seed(0)
    out = model.generate(idx, 20, temperature=0.8, top_k=10)
    assert (out.shape, out.dtype, out.requires_grad) == ((2, 25), torch.int64, False)
    assert torch.equal(out[:, :5], idx)
    torch.manual_seed(0)
    assert torch.equal(out, model.generate(idx, 20, 0.8, 10))


# GPTConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_embd=30), r"n_embd: got 30, expected a multiple of n_head \(4\)"),
        (dict(vocab_size=0), "vocab_size: got 0, expected 1 or more"),
        (dict(dropout=1.0), "dropout: got 1.0, expected 0 or more and less than 1"),
        (dict(dropout=float("nan")), "dropout: got nan"),
        (dict(gelu="relu"), "gelu: got 'relu', expected 'erf' or 'tanh'"),
    ],
)
def test_a_shape_that_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**TINY | changes)


def test_the_default_config_is_nanogpts():
    assert dataclasses.asdict(GPTConfig()) == dict(
        block_size=1024,
        vocab_size=50304,
        n_layer=12,
        n_head=12,
        n_embd=768,
        dropout=0.0,
        bias=True,
        gelu="erf",
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 1


# nanoGPT's own methods


def test_configure_optimizers_makes_nanogpts_groups():
    model = make(bias=True)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    decayed, others = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in others["params"])
    assert {id(p) for p in decayed["params"] + others["params"]} == {id(p) for p in model.parameters()}
    assert (decayed["lr"], decayed["betas"]) == (6e-4, (0.9, 0.95))
    _, loss = model(tokens(2, 16), tokens(2, 16, seed=1))
    loss.backward()
    optimizer.step()


def test_estimate_mfu_is_of_an_a100():
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=40))
    n = sum(p.numel() for p in model.parameters()) - 16 * 32
    expected = (6 * n + 12 * 2 * 4 * 8 * 16) * 16 * 5 / 0.25 / 312e12
    assert model.estimate_mfu(fwdbwd_per_iter=5, dt=0.25) == pytest.approx(expected)


def test_from_pretrained_reads_openais_weights(tmp_path):
    model = make(dropout=0.1)
    export_gpt2(model, tmp_path)
    again = GPT.from_pretrained(str(tmp_path), dict(dropout=0.2))
    assert again.config.dropout == 0.2
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())
    assert GPT.from_pretrained(str(tmp_path)).config.dropout == 0.0
    with pytest.raises(ValueError, match="override_args: got bias, expected dropout"):
        GPT.from_pretrained(str(tmp_path), {"bias": False})
