"""Attention by every backend: the same function, and no copies but those that its table names."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from model.attention import PACKAGES, SDPA, KVCache, causal_attention
from tests.model import flash_packages
from tests.model.held import Made
from tests.model.small import batch, make

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


def formula(qkv: Tensor, n_head: int, mask: Tensor | float = 1.0) -> Tensor:
    """y (B, T, C) of qkv (B, T, 3C), in its dtype. mask: of the weights."""
    B, T, C3 = qkv.shape
    q, k, v = (x.view(B, T, n_head, -1).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    scores = q @ k.mT / math.sqrt(q.size(-1)) + torch.full((T, T), -math.inf).triu(1)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True) * mask
    return (weights @ v).transpose(1, 2).reshape(B, T, C3 // 3)


def truth(qkv: Tensor, dy: Tensor, mask: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """y and dqkv in float64."""
    qkv = qkv.detach().double().requires_grad_()
    y = formula(qkv, H, mask)
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


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize(("T", "p"), [(1, 0.5), (13, 0.0), (70, 0.3)])
def test_on_a_cpu_the_formula_with_the_mask_that_was_drawn(dtype: torch.dtype, T: int, p: float) -> None:
    qkv, dy = inputs(dtype, T=T)
    packed = qkv.view(2, T, 3, H, 8)
    torch.manual_seed(5)
    y = cpu.attention(packed, p).flatten(2)
    torch.manual_seed(5)
    keep, scale = cpu.random_mask(packed, p, (2, H, T, T))  # the bits of attention's mask, as numbers
    dqkv = torch.autograd.grad(y, qkv, dy)[0]
    for ours, exact in zip((y, dqkv), truth(qkv, dy, keep.double() * scale), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= EPSILON[dtype] * exact.abs().max()


@pytest.mark.parametrize("backend", ["auto", "math"])
def test_dropout_is_asked_of_the_backend(backend: str) -> None:
    qkv, _ = inputs()
    packed = qkv.view(2, 13, 3, H, 8)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    torch.manual_seed(5)
    y = causal_attention(qkv, H, 0.3, backend)
    torch.manual_seed(5)
    if backend == "auto":
        expected = cpu.attention(packed, 0.3)
    else:
        expected = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(y, expected.flatten(2))


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


def test_sampling_needs_no_backend_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache, and for one token, any will do. Elsewhere a model asks the one that it was given."""
    flash_packages.remove(monkeypatch)
    net, auto = (make(attention=backend).eval() for backend in ("fa4", "auto"))
    idx, _ = batch(net)
    cache = KVCache(net.config, 3, "cpu", torch.float32)
    with torch.no_grad():
        net(idx[:, :15], cache=cache)
        torch.testing.assert_close(net(idx[:, 15:], cache=cache)[0], auto(idx)[0])
        torch.testing.assert_close(net(idx[:, :1])[0], auto(idx[:, :1])[0])
    with pytest.raises(ImportError):
        net(idx)


@pytest.mark.slow
def test_a_compiled_model_breaks_around_a_backend_that_the_compiler_does_not_know() -> None:
    """Once for all layers."""
    eager, net = (make(attention="fa4", n_layer=12) for _ in range(2))
    pair = batch(net)
    run = torch.compile(net, backend="aot_eager")
    losses = [compute(*pair)[1] for compute in (eager, run)]
    torch.testing.assert_close(*losses)
    weights = (m.transformer.h[0].attn.c_attn.weight for m in (eager, net))
    torch.testing.assert_close(*(torch.autograd.grad(*both)[0] for both in zip(losses, weights, strict=True)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(*pair)
