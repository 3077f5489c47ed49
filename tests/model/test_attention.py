"""Attention by every backend: the same function, and no copies but those that its table names."""

import math
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from model.attention import BACKENDS, SDPA, KVCache, causal_attention
from tests.model import flash_packages

H = 3
PACKAGES = ("flash_attn", "fa3", "fa4")
HERE = ("auto", "flash", "math", *PACKAGES)  # what a CPU can run, the last three by stand-ins
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


def assert_right(y: Tensor, dqkv: Tensor, qkv: Tensor, dy: Tensor) -> None:
    assert y.dtype == dqkv.dtype == qkv.dtype
    epsilon = EPSILON[qkv.dtype]
    for ours, exact in zip((y, dqkv), truth(qkv, dy), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", EPSILON)
def test_the_formula(backend: str, dtype: torch.dtype) -> None:
    qkv, dy = inputs(dtype)
    y = causal_attention(qkv, H, 0.0, backend)
    assert_right(y, torch.autograd.grad(y, qkv, dy)[0], qkv, dy)


# What is copied


class Written(TorchDispatchMode):
    """Names of the operations whose results lie in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        read = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if any(x.untyped_storage()._cdata not in read for x in tree_leaves(results) if isinstance(x, Tensor)):
            self.names.append(func.overloadpacket.__name__)
        return results


KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
WRITTEN = {
    "flash": [KERNEL, f"{KERNEL}_backward", "stack"],
    "flash_attn": ["forward", "empty"],
    "fa3": ["forward", "empty"],
}


@pytest.mark.parametrize("backend", WRITTEN)
def test_what_is_copied(backend: str) -> None:
    """Nothing but the kernel's own results, and the three gradients into one where it does not write them so."""
    qkv, dy = inputs()
    with Written() as written:
        y = causal_attention(qkv, H, 0.0, backend)
        torch.autograd.grad(y, qkv, dy)
    assert written.names == WRITTEN[backend]


@pytest.mark.parametrize("backend", PACKAGES)
def test_a_package_gets_views_and_its_gradient_is_taken_as_it_is(backend: str) -> None:
    qkv, dy = inputs()
    y = causal_attention(qkv, H, 0.0, backend)
    (dqkv,) = torch.autograd.grad(y, qkv, dy)
    assert {x.untyped_storage().data_ptr() for x in flash_packages.got} == {qkv.data_ptr()}
    assert [x.shape for x in flash_packages.got] == ([(2, 13, H, 8)] * 3 if backend == "fa4" else [(2, 13, 3, H, 8)])
    if backend != "fa4":
        assert dqkv.data_ptr() == flash_packages.dqkvs[0].data_ptr()


# Dropout


DROPPING = [("auto", torch.float32), ("auto", torch.bfloat16), ("math", torch.float32), ("flash_attn", torch.float32)]


def rest(attention: Callable[..., Tensor], dtype: torch.dtype, p: float, backend: str) -> Tensor:
    """With v all ones, y is what dropout left of each row's weights."""
    qkv, _ = inputs(dtype, B=64, T=32)
    with torch.no_grad():
        qkv.view(64, 32, 3, -1)[:, :, 2] = 1
    return attention(qkv, H, p, backend).float()


@pytest.mark.parametrize(("backend", "dtype"), DROPPING)
def test_dropout_falls_on_the_weights(backend: str, dtype: torch.dtype) -> None:
    for p in (0.1, 0.4):
        y = rest(causal_attention, dtype, p, backend)
        assert y.mean().item() == pytest.approx(1, abs=0.02)
        first = y[:, 0].view(64, H, -1)[..., 0]  # of one weight
        assert (first == 0).float().mean().item() == pytest.approx(p, abs=0.1)
    assert rest(causal_attention, dtype, 0.0, backend).std().item() < 3e-3


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_dropout_compiled() -> None:
    """Whatever was compiled before, for another p."""
    torch._dynamo.reset()
    compiled = torch.compile(causal_attention)
    for p in (0.1, 0.4, 0.8):
        assert rest(compiled, torch.bfloat16, p, "auto").mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("backend", "dtype"), DROPPING)
def test_the_backward_pass_drops_the_same_weights(backend: str, dtype: torch.dtype) -> None:
    """y is linear in v: <y, dy> = <v, dv>."""
    qkv, dy = inputs(dtype)
    y = causal_attention(qkv, H, 0.3, backend)
    (dqkv,) = torch.autograd.grad(y, qkv, dy)
    v, dv = (x.view(2, 13, 3, -1)[:, :, 2].double() for x in (qkv, dqkv))
    terms = y.double() * dy
    assert (v * dv).sum().item() == pytest.approx(terms.sum().item(), abs=1e-3 * terms.abs().sum().item())


def kernels_allowed(backend: str, p: float) -> list[str]:
    """The kernels that torch may choose from, where it is asked."""
    allowed: list[str] = []

    class Asked(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                cuda = torch.backends.cuda
                enabled = (cuda.cudnn_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled)
                allowed.extend(name for name, on in zip(SDPA, (*enabled, cuda.math_sdp_enabled), strict=True) if on())
            return func(*args, **(kwargs or {}))

    with Asked():
        causal_attention(inputs(torch.float16)[0], H, p, backend)
    return allowed


def test_cudnn_is_not_asked_for_dropout_that_it_may_round() -> None:
    assert "cudnn" in kernels_allowed("auto", 0.1875)
    assert kernels_allowed("auto", 0.2) == ["flash", "efficient", "math"]
    assert kernels_allowed("math", 0.2) == kernels_allowed("math", 0.25) == ["math"]


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cudnn", r"attention: cudnn may round dropout to sixteenths, got 0\.2"),
        ("fa3", "attention: fa3 has no dropout, got 0.2"),
        ("fa4", "attention: fa4 has no dropout, got 0.2"),
        ("flesh", r"attention: got 'flesh', expected auto \| cudnn \| .* \| fa4"),
    ],
)
def test_refused(backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_attention(inputs(torch.float16)[0], H, 0.2, backend)


# In the model


def model(backend: str, n_layer: int = 2) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=n_layer, n_head=4, n_embd=32), attention=backend)


def batch(T: int = 16) -> tuple[Tensor, Tensor]:
    idx, targets = torch.randint(40, (2, 3, T), generator=torch.Generator().manual_seed(1))
    return idx, targets


def loss_and_gradient(net, of: GPT) -> tuple[Tensor, Tensor]:
    loss = net(*batch())[1]
    loss.backward()
    return loss.detach(), of.transformer.h[0].attn.c_attn.weight.grad


def test_a_model_asks_the_backend_that_it_was_given() -> None:
    model("fa3")(*batch())
    assert len(flash_packages.got) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_cache_any_will_do(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that this machine cannot run."""
    flash_packages.remove(monkeypatch)
    net, idx = model(backend).eval(), batch()[0]
    expected = model("auto").eval()(idx)[0]
    cache = KVCache(net.config, 3, "cpu", torch.float32)
    with torch.no_grad():
        net(idx[:, :7], cache=cache)
        for i in range(7, 16):
            logits, _ = net(idx[:, i : i + 1], cache=cache)
    torch.testing.assert_close(logits, expected)


# Compiled


def compiled(net: GPT, graphs: list[str], *, fullgraph: bool):
    """By the compiler's front half; the forward graphs' code is kept."""
    torch._dynamo.reset()

    def keep(graph: torch.fx.GraphModule, _):
        graphs.append(graph.code)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=lambda graph, _: make_boxed_func(graph))
    return torch.compile(net, backend=backend, fullgraph=fullgraph)


IN_THE_GRAPH = {"auto": KERNEL, "math": "_safe_softmax", "flash_attn": "stand_in"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", IN_THE_GRAPH)
def test_compiled_whole(backend: str) -> None:
    eager, net, graphs = model(backend), model(backend), []
    got = loss_and_gradient(compiled(net, graphs, fullgraph=True), net)
    torch.testing.assert_close(got, loss_and_gradient(eager, eager))
    assert len(graphs) == 1
    assert IN_THE_GRAPH[backend] in graphs[0]


@pytest.mark.slow
def test_a_backend_that_the_compiler_does_not_know_is_called_between_graphs() -> None:
    eager, net, graphs = model("fa4", 12), model("fa4", 12), []
    run = compiled(net, graphs, fullgraph=False)
    torch.testing.assert_close(loss_and_gradient(run, net), loss_and_gradient(eager, eager))
    assert graphs
    assert not flash_packages.traced
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(*batch())[1].backward()
