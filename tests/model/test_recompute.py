"""Activation checkpointing: the same gradients to the bit, from less that is kept."""

import pytest
import torch
from torch import nn

from kernels import FUSED, REFERENCE, Ops
from kernels.launch import INTERPRETED
from model import GPT, Precision
from model.recompute import MODES
from tests.model.held import Made
from tests.model.small import batch, make
from tests.model.test_fused import DEVICE


def made(ops: Ops, recompute: str, dtype: torch.dtype = torch.float32) -> GPT:
    return make(ops, precision=Precision(dtype), recompute=recompute, dropout=0.2).to(DEVICE)


def loss_and_gradients(run: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(2)
    loss = run(*batch(run))[1]
    return [loss.detach(), *torch.autograd.grad(loss, list(run.parameters()))]


@pytest.mark.parametrize(
    ("ops", "dtype"), [(REFERENCE, torch.bfloat16), pytest.param(FUSED, torch.float32, marks=pytest.mark.slow)]
)
def test_the_same_gradients(ops: Ops, dtype: torch.dtype) -> None:
    expected, *others = (loss_and_gradients(made(ops, mode, dtype=dtype)) for mode in MODES)
    for results in others:
        torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "ops"), [("mlp", REFERENCE), ("block", FUSED)])
def test_the_same_gradients_compiled(recompute: str, ops: Ops, compiler: None) -> None:
    """Against itself: compiled, other masks are drawn than eager ones. Twice: the second finds the graph made."""
    found = []
    for mode in ("none", recompute):
        torch.compiler.reset()
        compiled = torch.compile(made(ops, mode), fullgraph=True)
        found.append([loss_and_gradients(compiled) for _ in range(2)][1])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ops", [REFERENCE, FUSED], ids=lambda ops: ops.name)
def test_nothing_random_and_no_attention_is_computed_again(ops: Ops) -> None:
    random = ["nanofuse_cpu::random_keep", "aten::native_dropout", "aten::randint"]
    if not INTERPRETED:
        random.append("aten::_scaled_dot_product")  # on a CPU it has no dropout

    def kept(made: Made) -> int:
        return sum(name.startswith(tuple(random)) and "backward" not in name for name in made.ops)

    model = made(ops, "block")
    idx, targets = batch(model)
    with Made() as forward:
        loss = model(idx, targets)[1]
    with Made() as backward:
        loss.backward()
    # masks: one for the embedding, three a block; or the seeds of all, and attention's own
    assert kept(forward) == (1 + 3 * 2 if ops is REFERENCE else 1 + 2)
    assert kept(backward) == 0
    norms = "aten::native_layer_norm" if ops is REFERENCE else "nanofuse::add_layer_norm"
    assert (forward.ops.count(norms), backward.ops.count(norms)) == (5, 4)  # all but the last, which no block has
