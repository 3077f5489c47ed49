"""Attention by every backend: the same function, and no copies but those that its table names."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from model import GPT, GPTConfig
from model.attention import PACKAGES, SDPA, KVCache, causal_attention
from tests.model import flash_packages
from tests.model.held import Made

H = 3
EPSILON = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_packages.install(monkeypatch)


def inputs(dtype: torch.dtype = torch.float32, B: int = 2, T: int = 13, Q: int = 8) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of y."""
    generator = torch.Generator().manual_seed(0)
    qkv, dy = (torch.randn(B, T, n * H * Q, generator=generator, dtype=torch.float64) for n in (3, 1))
    return qkv.to(dtype).requires_grad_(), dy.to(dtype)


def truth(qkv: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dqkv by the formula, in float64."""
    qkv = qkv.detach().double().requires_grad_()
    B, T, C3 = qkv.shape
    q, k, v = (x.view(B, T, H, -1).transpose(1, 2) for x in qkv.split(C3 // 3, dim=2))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
    y = (scores.masked_fill(ahead, -math.inf).softmax(-1) @ v).transpose(1, 2).reshape(B, T, C3 // 3)
    return y, torch.autograd.grad(y, qkv, dy.double())[0]


KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(("auto", dtype) for dtype in EPSILON),
        ("flash", torch.bfloat16),
        *((backend, torch.float32) for backend in ("flash", "math", *PACKAGES)),
    ],
)
def test_the_formula_without_copies(backend: str, dtype: torch.dtype) -> None:
    """Packages get qkv itself or views of it. torch's kernels also get views, and autograd makes their three gradients
    one."""
    qkv, dy = inputs(dtype)
    with Made() as made:
        y = causal_attention(qkv, H, 0.0, backend)
        dqkv = torch.autograd.grad(y, qkv, dy)[0]
    assert y.dtype == dqkv.dtype == dtype
    for ours, exact in zip((y, dqkv), truth(qkv, dy), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=EPSILON[dtype], atol=EPSILON[dtype])
    if dtype == torch.float32 and backend in ("auto", "flash"):
        assert made.written == [KERNEL, f"{KERNEL}_backward", "stack"]
    asked = {x.untyped_storage().data_ptr() for x in flash_packages.got}
    assert asked == ({qkv.data_ptr()} if backend in PACKAGES else set())


# Dropout


@pytest.mark.parametrize("backend", ["auto", "math"])
def test_dropout_falls_on_the_weights_and_again_in_the_backward_pass(backend: str) -> None:
    qkv, dy = inputs(B=64, T=32)
    with torch.no_grad():
        qkv.view(64, 32, 3, -1)[:, :, 2] = 1
    for p in (0.0, 0.1, 0.4):
        y = causal_attention(qkv, H, p, backend)
        assert y.mean().item() == pytest.approx(1, abs=0.02)  # with v all ones, y is what is left of a row's weights
        first = y[:, 0].view(64, H, -1)[..., 0]  # of one weight
        assert (first == 0).float().mean().item() == pytest.approx(p, abs=0.1)
        (dqkv,) = torch.autograd.grad(y, qkv, dy)
        dv = dqkv.view(64, 32, 3, -1)[:, :, 2]
        terms = y.double() * dy
        # y is linear in v: <y, dy> = <v, dv>
        assert dv.double().sum().item() == pytest.approx(terms.sum().item(), abs=1e-5 * terms.abs().sum().item())


def test_cudnn_is_not_asked_for_dropout_that_it_may_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("model.attention.sdpa_kernel", lambda kernels: asked.append(kernels) or nullcontext())
    for backend, p in (("auto", 0.1875), ("auto", 0.2), ("math", 0.2), ("math", 0.25)):
        causal_attention(inputs(torch.float16)[0], H, p, backend)
    assert asked == [[SDPA[name] for name in ("flash", "efficient", "math")], SDPA["math"], SDPA["math"]]


def test_dropout_reaches_a_package_or_is_refused() -> None:
    causal_attention(inputs()[0], H, 0.3, "flash_attn")
    assert flash_packages.dropped == [0.3]
    for backend, message in (
        ("cudnn", r"attention: cudnn may round dropout to sixteenths, got 0\.2"),
        ("fa3", "attention: fa3 has no dropout, got 0.2"),
        ("fa4", "attention: fa4 has no dropout, got 0.2"),
        ("flesh", r"attention: got 'flesh', expected auto \| cudnn \| .* \| fa4"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_attention(inputs(torch.float16)[0], H, 0.2, backend)


# In the model


def model(backend: str, n_layer: int = 2) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=n_layer, n_head=4, n_embd=32), attention=backend)


def batch() -> tuple[Tensor, Tensor]:
    idx, targets = torch.randint(40, (2, 3, 16), generator=torch.Generator().manual_seed(1))
    return idx, targets


def test_sampling_needs_no_backend_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache, and for one token, any will do. Elsewhere a model asks the one that it was given."""
    flash_packages.remove(monkeypatch)
    net, idx = model("fa4").eval(), batch()[0]
    cache = KVCache(net.config, 3, "cpu", torch.float32)
    with torch.no_grad():
        net(idx[:, :15], cache=cache)
        torch.testing.assert_close(net(idx[:, 15:], cache=cache)[0], model("auto").eval()(idx)[0])
        torch.testing.assert_close(net(idx[:, :1])[0], model("auto").eval()(idx[:, :1])[0])
    with pytest.raises(ImportError):
        net(idx)


@pytest.mark.slow
def test_a_compiled_model_breaks_around_a_backend_that_the_compiler_does_not_know() -> None:
    """Once for all layers."""
    torch._dynamo.reset()
    eager, net = model("fa4", 12), model("fa4", 12)
    run = torch.compile(net, backend="aot_eager")
    losses = [compute(*batch())[1] for compute in (eager, run)]
    torch.testing.assert_close(*losses)
    weights = (m.transformer.h[0].attn.c_attn.weight for m in (eager, net))
    torch.testing.assert_close(*(torch.autograd.grad(*pair)[0] for pair in zip(losses, weights, strict=True)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(*batch())
