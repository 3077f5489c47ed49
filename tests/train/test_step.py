"""One optimizer step, compared with the same step by hand and with torch's parts."""

import copy

import pytest
import torch
from torch import nn

from kernels import REFERENCE
from model import GPT, GPTConfig, Precision
from model.groups import param_groups
from train.data import Batch
from train.optim import FlatAdamW, LossScale
from train.step import TrainStep

LR = 2**-7  # exact in float32, the dtype in which the device holds it


def small_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    shape = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, dropout=dropout, bias=True)
    exact = dtype == torch.float64
    model = GPT(shape, precision=Precision(dtype, dtype if exact else torch.float32))
    return model.double() if exact else model


def optimizer(model: nn.Module, several: bool = False) -> FlatAdamW:
    """Its own rate differs from the step's, which must come with the call."""
    return FlatAdamW(model, REFERENCE, learning_rate=1.0, betas=(0.9, 0.95), weight_decay=0.1, several=several)


def make_batch(accumulation: int = 1, seeds: tuple[int, ...] | None = None) -> Batch:
    tokens = torch.randint(11, (accumulation, 4, 9), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), seeds or tuple(range(accumulation)))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


@pytest.mark.parametrize(("grad_clip", "accumulation"), [(0.0, 1), (0.05, 1), (1e6, 1), (0.05, 3)])
def test_a_step_is_that_of_torch_with_one_large_batch(grad_clip, accumulation):
    ours, theirs = (small_model(dtype=torch.float64) for _ in range(2))
    step = TrainStep(ours, optimizer(ours, several=accumulation > 1), grad_clip=grad_clip)
    reference = torch.optim.AdamW(param_groups(theirs, 0.1), lr=LR, betas=(0.9, 0.95), fused=True)
    batch = make_batch(accumulation)
    for _ in range(3):
        result = step(batch, LR)
        loss = theirs(batch.x.reshape(-1, 8), batch.y.reshape(-1, 8))[1]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or float("inf"))
        reference.step()
        reference.zero_grad()
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)  # before clipping
        assert norm > 0.05
    results = weights(ours), weights(theirs)
    for result in results:  # the keys' biases have gradients of rounding errors only; Adam makes full steps of these
        result["transformer.h.0.attn.c_attn.bias"][16:32] = 0
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_gradients_that_would_overwrite_each_other_are_refused():
    model = small_model()
    with pytest.raises(AssertionError, match="would be lost"):
        TrainStep(model, optimizer(model), grad_clip=0.0)(make_batch(2), LR)


def test_every_tensor_has_a_saved_step_count_of_its_own():
    """torch's AdamW may load them. It increments each one in place."""
    adam = optimizer(small_model())
    steps = [entry["step"] for entry in adam.state_dict()["state"].values()]
    assert len({step.untyped_storage().data_ptr() for step in steps}) == len(steps) > 1


def test_dropout_is_a_function_of_the_seeds():
    def loss(seeds: tuple[int, ...], state: int) -> tuple[float, float]:
        model = small_model(dropout=0.5)
        torch.manual_seed(state)  # the generator's state before must not matter
        step = TrainStep(model, optimizer(model, several=True), grad_clip=1.0)
        result = step(make_batch(2, seeds=seeds), LR)
        return result.loss.item(), result.grad_norm.item()

    assert loss((1, 2), state=0) == loss((1, 2), state=99)
    assert len({loss(seeds, 0) for seeds in [(1, 2), (1, 4), (3, 2)]}) == 3  # every micro-step has its own seed


def test_float16_skips_the_update_that_overflowed_and_goes_on():
    model = small_model(dtype=torch.float16)
    adam = optimizer(model, several=True)
    scaler = LossScale(torch.device("cpu"), enabled=True, scale=2.0**40)
    step = TrainStep(model, adam, grad_clip=1.0, scaler=scaler)
    before = weights(model)
    skipped = step(make_batch(2), LR)
    assert not skipped.grad_norm.isfinite()
    assert skipped.loss.isfinite()  # reported without the scale
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in adam.state.values())
    assert scaler.scale == 2.0**39

    scaler.scale.fill_(2.0**10)
    step(make_batch(2), LR)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert any((value != before[name]).any() for name, value in model.state_dict().items())


def test_a_scale_changes_neither_loss_nor_norm_nor_update():
    """In float32, with a power of two, every bit is the same."""
    results, models = [], []
    for scaler in (None, LossScale(torch.device("cpu"), enabled=True, scale=2.0**12)):
        model = small_model()
        step = TrainStep(model, optimizer(model, several=True), grad_clip=0.1, scaler=scaler)
        results.append([step(make_batch(2), LR) for _ in range(3)])
        models.append(weights(model))
    assert results[0] == results[1]
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)
