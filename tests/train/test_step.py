"""One optimizer step, compared with the same step by hand and with torch's parts."""

import copy

import pytest
import torch
from torch import nn

from model.gpt import param_groups
from tests.train.steps import T, batch, everything, make, small_model
from train.optim import LossScale

LR = 2**-7  # exact in float32, the dtype in which the device holds it


@pytest.mark.parametrize(("grad_clip", "accumulation"), [(0.0, 1), (0.05, 1), (1e6, 1), (0.05, 3)])
def test_a_step_is_that_of_torch_with_one_large_batch(grad_clip, accumulation):
    """And torch's AdamW goes on from its state. It increments each step count in place: they must be apart."""
    step = make(dtype=torch.float64, grad_clip=grad_clip, accumulation=accumulation)
    theirs = small_model(dtype=torch.float64)
    reference = torch.optim.AdamW(param_groups(theirs, 0.1), lr=LR, betas=(0.9, 0.95), fused=True)
    for i in range(4):
        given = batch(i, accumulation)
        result = step(given, LR)
        loss = theirs(given.x.reshape(-1, T), given.y.reshape(-1, T))[1]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or float("inf"))
        reference.step()
        reference.zero_grad()
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)  # before clipping
        assert norm > 0.05
        if i == 2:
            reference.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    results = copy.deepcopy((step.model.state_dict(), theirs.state_dict()))
    for result in results:  # the keys' biases have gradients of rounding errors only; Adam makes full steps of these
        result["transformer.h.0.attn.c_attn.bias"][16:32] = 0
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_dropout_is_a_function_of_the_seeds():
    def loss(seeds: tuple[int, ...], state: int) -> tuple[float, float]:
        step = make(dropout=0.5, accumulation=2)
        torch.manual_seed(state)  # the generator's state before must not matter
        result = step(batch(0, 2)._replace(seeds=seeds), LR)
        return result.loss.item(), result.grad_norm.item()

    assert loss((1, 2), state=0) == loss((1, 2), state=99)
    assert len({loss(seeds, 0) for seeds in [(1, 2), (1, 4), (3, 2)]}) == 3  # every micro-step has its own seed


def test_float16_skips_the_update_that_overflowed_and_goes_on():
    step = make(dtype=torch.float16, accumulation=2)
    step.scaler.scale.fill_(2.0**40)
    flat, adam = step.optimizer.flat, step.optimizer
    before = flat.param.clone()
    skipped = step(batch(0, 2), LR)
    assert not skipped.grad_norm.isfinite()
    assert skipped.loss.isfinite()  # reported without the scale
    assert torch.equal(flat.param, before)
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in adam.state.values())
    assert step.scaler.scale == 2.0**39

    step.scaler.scale.fill_(2.0**10)
    step(batch(0, 2), LR)
    assert flat.param.isfinite().all()
    assert not torch.equal(flat.param, before)


def test_a_scale_changes_neither_loss_nor_norm_nor_update():
    """In float32, with a power of two, every bit is the same."""
    scaled, plain = (make(accumulation=2, grad_clip=0.1) for _ in range(2))
    scaled.scaler = LossScale(torch.device("cpu"), enabled=True)
    scaled.scaler.scale.fill_(2.0**12)
    assert [scaled(batch(i, 2), LR) for i in range(3)] == [plain(batch(i, 2), LR) for i in range(3)]
    scaled.scaler = plain.scaler
    torch.testing.assert_close(everything(scaled), everything(plain), rtol=0, atol=0)


def test_an_evaluation_that_fails_leaves_dropout_on() -> None:
    step = make(dropout=0.2)
    with pytest.raises(IndexError):
        step.evaluate(*(10**6 + tokens[0] for tokens in batch(0, 1)[:2]))
    assert step.model.training
