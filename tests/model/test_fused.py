"""GPT with the fused kernels: the model that it is with the reference's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.check import disagreement
from kernels.launch import INTERPRETED
from model import GPT, Precision
from tests.kernels.rounding import round_to_nearest
from tests.model.small import batch, make

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def made(ops: Ops, dtype: torch.dtype = torch.float32, **changes) -> GPT:
    stream = torch.float64 if dtype == torch.float64 else torch.float32
    model = make(ops, precision=Precision(dtype, stream), n_head=3, n_embd=36, **changes).to(DEVICE)
    return model.double() if dtype == torch.float64 else model


def loss_and_gradients(model: GPT, run: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """run: the compiled model."""
    model.zero_grad()
    _, loss = (model if run is None else run)(*batch(model))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("dtype", "bias", "gelu"),
    [(torch.float32, True, "erf"), (torch.float32, False, "tanh"), (torch.bfloat16, True, "erf")],
)
def test_same_loss_and_gradients(dtype: torch.dtype, bias: bool, gelu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where rounding is all over the place, each gradient as a whole is no further from the truth."""
    round_to_nearest(monkeypatch)
    fused, plain, exact = (
        loss_and_gradients(made(ops, of, bias=bias, gelu=gelu))
        for ops, of in ((FUSED, dtype), (REFERENCE, dtype), (REFERENCE, torch.float64))
    )
    if dtype == torch.float32:
        assert not disagreement(fused, plain, exact)
        return
    assert abs(fused["loss"] - exact["loss"]) < 4 * torch.finfo(torch.bfloat16).eps
    for name in exact.keys() - {"loss"}:
        error, allowed = ((got[name].double() - exact[name]).norm().item() for got in (fused, plain))
        assert error < 1.5 * allowed, f"{name}: off by {error:.3g}, plain torch by {allowed:.3g}"


@pytest.mark.slow
def test_compiled_whole_it_is_the_same(compiler: None) -> None:
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
    model = made(ops, dropout=0.1, n_layer=3)
    for _ in range(2):
        model(*batch(model))
    model.eval()(*batch(model))
    assert len(seeds) == len(set(seeds)) == 2 * (2 * len(model.transformer.h) + 1)
