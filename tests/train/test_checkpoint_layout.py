"""What a checkpoint holds: nanoGPT's layout, to load and to save, and the optimizer's whole state."""

import copy
import math

import pytest
import torch

from tests.train.checkpoints import (
    MODEL_ARGS,
    assert_same,
    make_adamw,
    make_checkpoint,
    make_model,
    make_nanogpt,
    train,
)
from train import checkpoint
from train.errors import UserError
from train.state import load_optimizer


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_loads_nanogpts(tmp_path, prefix):
    theirs, expected = make_nanogpt(), make_nanogpt()
    expected["model"]["transformer.h.0.attn.c_attn.bias"] = torch.ones(24)
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}  # dropped: it is no weight
    theirs["model"] = {prefix + name: tensor for name, tensor in (expected["model"] | mask).items()}
    torch.save(theirs, tmp_path / "ckpt.pt")
    expected |= {"best_val_loss": 1.25, "nanofuse": {}, "model": dict(expected["model"])}
    assert_same(checkpoint.load(tmp_path / "ckpt.pt"), expected)


def test_nanogpt_loads_ours(tmp_path):
    """With the same statements as in its train.py and sample.py."""
    model = make_model()
    optimizer = make_adamw(model, fused=True)
    train(model, optimizer, 3)
    # a run with CUDA graphs has its rate in a tensor and a capturable AdamW
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"lr": torch.tensor(1e-3), "capturable": True}
    ours = make_checkpoint(model=model.state_dict(), optimizer=checkpoint.portable(state))
    checkpoint.save(tmp_path, ours, keep=2)

    loaded = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    assert_same(loaded["model_args"], MODEL_ARGS)
    assert [(type(group["lr"]), group["capturable"]) for group in loaded["optimizer"]["param_groups"]] == [
        (float, False)
    ] * 2
    twin = make_model(seed=9)
    twin.load_state_dict(loaded["model"])
    theirs = make_adamw(twin)
    theirs.load_state_dict(loaded["optimizer"])
    train(model, optimizer, 2, seed=5)
    train(twin, theirs, 2, seed=5)
    assert_same(dict(twin.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(("source", "target"), [(True, False), (None, True), (False, None)])
def test_optimizer_goes_on_where_it_was(source, target):
    """For every pair of AdamW implementations: moments and count are loaded, flags are not."""
    model = make_model()
    before = make_adamw(model, fused=source)
    train(model, before, 3)
    after = make_adamw(make_model(seed=9), fused=target, lr=2e-3, betas=(0.8, 0.9))
    after.param_groups[0]["weight_decay"] = 0.3
    settings = after.state_dict()["param_groups"]
    state, expected = before.state_dict(), copy.deepcopy(before.state_dict()["state"])
    for entry in state["state"].values() if source else ():  # a number, as an older torch has it
        entry["step"] = 3
    load_optimizer(after, state)
    assert_same(after.state_dict(), {"state": expected, "param_groups": settings})


def test_an_optimizer_of_another_kind_or_model_is_refused():
    def trained(width: int = 8) -> dict:
        model = make_model(width=width)
        optimizer = make_adamw(model)
        train(model, optimizer, 1)
        return optimizer.state_dict()

    def changed(**values) -> dict:
        state = trained()
        state["state"][0] |= values
        return state

    zeros = torch.zeros(32, 8)
    moments = (None, 0, [0.0] * 1000, zeros.long(), zeros.to_sparse(), zeros.to("meta"), torch.zeros(33, 8))
    narrow, missing, sgds = make_adamw(make_model()), trained(), trained()
    del missing["state"][1], sgds["state"][0]["exp_avg"]
    for state, message in (
        (trained(width=16), r"tensor 0 no count of steps, .* of the shape \[32, 8\]: it is not this model's AdamW"),
        (torch.optim.AdamW(make_model().parameters()).state_dict(), "groups of 3 tensors, this model's 1 and 2"),
        (missing, "tensor 1 no count"),
        (sgds, "tensor 0 no count"),
        *((changed(step=step), "tensor 0 no count") for step in ("three", None, -1, 1e300, math.nan, torch.ones(2))),
        *((changed(exp_avg=moment), "tensor 0 no count") for moment in moments),
    ):
        with pytest.raises(UserError, match=message):
            load_optimizer(narrow, state)
        assert not narrow.state
