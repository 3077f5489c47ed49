"""What the model computes, held against a plain function in float64 that shares no code with it."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from model import GPT, GPTConfig, Precision
from tests.model.small import batch, make
from tests.model.test_attention import formula

SHAPES = {
    "usual": {},
    "odd": dict(T=7, block_size=13, vocab_size=37, n_layer=3, n_head=3, n_embd=27, bias=False, gelu="tanh"),
    "one of all": dict(B=1, block_size=1, vocab_size=2, n_layer=1, n_head=1, n_embd=1),
}


def definition(w: Mapping[str, Tensor], config: GPTConfig, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, loss) of GPT-2 in the dtype of its weights, written with nothing but arithmetic."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        return y + w.get(f"{name}.bias", 0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def gelu(x: Tensor) -> Tensor:
        if config.gelu == "erf":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: idx.size(1)]
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        y = formula(linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), config.n_head)
        x = x + linear(y, f"{block}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    counted = targets != -1
    return logits, -log_probs[counted].gather(1, targets[counted][:, None]).mean()


def truth(model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits, loss, gradients by name) in float64."""
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits, loss = definition(weights, model.config, idx, targets)
    loss.backward()
    return logits.detach(), loss.detach(), {name: w.grad for name, w in weights.items()}


def error(got: Tensor, expected: Tensor) -> float:
    """Relative to the tensor's norm: what rounding makes of it, however small single elements are."""
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("name", SHAPES)
def test_float64_is_the_definition(name):
    shape = dict(SHAPES[name])
    size = {key: shape.pop(key) for key in ("B", "T") if key in shape}
    model = make(precision=Precision(torch.float64, torch.float64), **shape)
    idx, targets = batch(model, **size)
    expected_logits, expected_loss, gradients = truth(model, idx, targets)
    model.double()
    logits, loss = model(idx, targets)
    last, nothing = model(idx)
    loss.backward()
    torch.testing.assert_close(logits, expected_logits, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(last, expected_logits[:, -1:], rtol=1e-11, atol=1e-12)
    assert nothing is None
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=1e-12)
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[parameter], rtol=1e-9, atol=1e-11, msg=parameter)


@pytest.mark.parametrize("how", [torch.float32, torch.bfloat16, "autocast"])
def test_it_is_the_definition_but_for_rounding(how: torch.dtype | str) -> None:
    """By itself in each dtype, and under autocast, as nanoGPT's scripts use it."""
    autocast = how == "autocast"
    dtype = torch.bfloat16 if autocast else how
    model = make(precision=Precision() if autocast else Precision(dtype))
    idx, targets = batch(model)
    expected_logits, expected_loss, gradients = truth(model, idx, targets)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, loss = model(idx, targets)
        last, _ = model(idx)
        sampled = model.generate(idx[:, :15], 3)
    loss.backward()
    eps, several = torch.finfo(dtype).eps, 4 if dtype == torch.bfloat16 else 16
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert eps / 50 < error(logits, expected_logits) < several * eps  # below, it was not computed in that dtype
    assert error(last, expected_logits[:, -1:]) < several * eps
    assert error(loss, expected_loss) < several / 4 * eps
    gradient = torch.cat([model.get_parameter(name).grad.flatten() for name in gradients])
    assert error(gradient, torch.cat([expected.flatten() for expected in gradients.values()])) < several * eps
    assert sampled.shape == (3, 18)
