"""GPT with the fused kernels: the model that it is with the reference's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.check import disagreement
from model import GPT, GPTConfig, Precision
from tests.kernels.rounding import round_to_nearest
from tests.model.small import DEVICE, batch, make

SHAPE = dict(vocab_size=53, n_head=3, n_embd=36)


def made(ops: Ops, dtype: torch.dtype = torch.float32, **changes) -> GPT:
    stream = torch.float64 if dtype == torch.float64 else torch.float32
    model = make(ops, precision=Precision(dtype, stream), **SHAPE | changes).to(DEVICE)
    return model.double() if dtype == torch.float64 else model


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """32 of the targets count: a power of two, whose reciprocal costs bfloat16 no rounding."""
    idx, targets = batch(GPTConfig(block_size=16, vocab_size=53))
    return idx.to(DEVICE), targets.to(DEVICE)


def loss_and_gradients(model: GPT, run: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """run: the compiled model."""
    model.zero_grad()
    _, loss = (model if run is None else run)(*pair())
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("bias", "gelu"), [(True, "erf"), (False, "tanh")])
def test_same_loss_and_gradients(bias: bool, gelu: str) -> None:
    changes = dict(bias=bias, gelu=gelu)
    fused, plain = (loss_and_gradients(made(ops, **changes)) for ops in (FUSED, REFERENCE))
    exact = loss_and_gradients(made(REFERENCE, torch.float64, **changes))
    assert not disagreement(fused, plain, exact)


def test_no_further_from_the_truth_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is all over the place there; of each gradient as a whole it is not larger than plain torch's."""
    round_to_nearest(monkeypatch)
    fused, plain = (loss_and_gradients(made(ops, torch.bfloat16)) for ops in (FUSED, REFERENCE))
    exact = loss_and_gradients(made(REFERENCE, torch.float64))
    assert abs(fused["loss"] - exact["loss"]) < 4 * torch.finfo(torch.bfloat16).eps
    for name in exact:
        error, allowed = ((got[name].double() - exact[name]).norm().item() for got in (fused, plain))
        assert error < 1.5 * allowed or name == "loss", f"{name}: off by {error:.3g}, plain torch by {allowed:.3g}"


def test_several_sequences_are_sampled_as_with_the_reference() -> None:
    """With the cache, and past block_size, where the window slides."""
    prompt = pair()[0][:, :10]
    fused, plain = (made(ops).generate(prompt, 4, temperature=0) for ops in (FUSED, REFERENCE))
    assert torch.equal(fused, plain)
    assert len(plain[:, 10:].unique()) > 4  # tokens vary


@pytest.mark.slow
def test_compiled_whole_it_is_the_same(compiler: None) -> None:
    torch.compiler.reset()
    model = made(FUSED)
    eager, compiled = (loss_and_gradients(model, run) for run in (None, torch.compile(model, fullgraph=True)))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_every_operation_that_drops_has_a_seed_of_its_own() -> None:
    """One draw for all of them, a new one for each call of the model. An evaluation drops nothing."""
    seeds: list[int] = []

    def spied(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seeds.extend(x[0].item() for x in args if isinstance(x, torch.Tensor) and x.shape == (2,))
            return operation(*args, **kwargs)

        return call

    ops = replace(FUSED, embedding=spied(FUSED.embedding), add_layer_norm=spied(FUSED.add_layer_norm))
    model = made(ops, dropout=0.1)
    for _ in range(2):
        model(*pair())
    model.eval()(*pair())
    assert len(seeds) == len(set(seeds)) == 2 * (2 * len(model.transformer.h) + 1)
