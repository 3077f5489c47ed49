"""What a checkpoint holds: nanoGPT's layout, to load and to save, and the optimizer's whole state."""

import numpy
import pytest
import torch

from tests.train.checkpoints import MODEL_ARGS, assert_same, make_adamw, make_model, make_nanogpt, train
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
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    packed = checkpoint.pack(compiled, state, MODEL_ARGS, 3, torch.tensor(1.5), {"dataset": "docs"}, {"chars": ["a"]})
    checkpoint.save(tmp_path, packed, keep=2)

    loaded = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    assert_same(loaded["model_args"], MODEL_ARGS)
    assert_same(loaded["best_val_loss"], 1.5)
    assert [group["capturable"] for group in loaded["optimizer"]["param_groups"]] == [False, False]
    twin = make_model(seed=9)
    twin.load_state_dict(loaded["model"])
    theirs = make_adamw(twin)
    theirs.load_state_dict(loaded["optimizer"])
    train(model, optimizer, 2, seed=5)
    train(twin, theirs, 2, seed=5)
    assert_same(dict(twin.state_dict()), dict(model.state_dict()))


def test_pack_refuses_what_load_would():
    state = make_nanogpt()
    with pytest.raises(ValueError, match=r"\['lr'\]\[0\] is a float32"):
        checkpoint.pack(state["model"], state["optimizer"], MODEL_ARGS, 1, 1.0, {}, {"lr": [numpy.float32(1)]})


# The optimizer


@pytest.mark.parametrize(("source", "target"), [(True, False), (None, True), (False, None)])
def test_optimizer_goes_on_where_it_was(tmp_path, source, target):
    """For every pair of AdamW implementations: moments and count are loaded, flags are not."""
    model, twin = make_model(), make_model(seed=9)
    before = make_adamw(model, fused=source)
    train(model, before, 3)
    torch.save(make_nanogpt(model=model.state_dict(), optimizer=before.state_dict()), tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")

    after = make_adamw(twin, fused=target, lr=2e-3, betas=(0.8, 0.9))
    after.param_groups[0]["weight_decay"] = 0.3
    settings = [{name: value for name, value in group.items() if name != "params"} for group in after.param_groups]
    twin.load_state_dict(loaded["model"])
    load_optimizer(after, loaded["optimizer"])
    for group, expected in zip(after.param_groups, settings, strict=True):
        assert {name: value for name, value in group.items() if name != "params"} == expected
    assert_same(after.state_dict()["state"], before.state_dict()["state"])


def trained_state(width: int = 8) -> dict:
    """The state of an AdamW after a step."""
    model = make_model(width=width)
    optimizer = make_adamw(model)
    train(model, optimizer, 1)
    return optimizer.state_dict()


def test_counts_that_are_numbers_and_halved_moments_are_taken():
    state = trained_state()
    for entry in state["state"].values():
        entry |= {"step": 3} | {key: entry[key].half() for key in ("exp_avg", "exp_avg_sq")}
    for fused in (True, False):
        model = make_model()
        after = make_adamw(model, fused=fused)
        load_optimizer(after, state)
        assert [(s["step"].item(), s["step"].dtype) for s in after.state.values()] == [(3.0, torch.float32)] * 3
        assert {entry["exp_avg"].dtype for entry in after.state.values()} == {torch.float32}
        train(model, after, 1)


def test_an_optimizer_of_another_kind_or_model_is_refused():
    narrow, missing, sgds = make_adamw(make_model()), trained_state(), trained_state()
    del missing["state"][1], sgds["state"][0]["exp_avg"]
    for state, message in (
        (trained_state(width=16), r"tensor 0 the shape \[32, 16\], this model \[32, 8\]"),
        (torch.optim.AdamW(make_model().parameters()).state_dict(), "groups of 3 tensors, this model's 1 and 2"),
        (missing, "tensor 1 no step"),
        (sgds, "tensor 0 no step, exp_avg and exp_avg_sq: it is not an AdamW's"),
    ):
        with pytest.raises(UserError, match=message):
            load_optimizer(narrow, state)
        assert not narrow.state
    for key, value in (
        ("step", "three"),
        ("step", -1),
        ("step", float("nan")),
        ("step", torch.ones(2)),
        ("exp_avg", [0.0] * 1000),
        ("exp_avg_sq", torch.zeros(32, 8, dtype=torch.int64)),
        ("exp_avg_sq", torch.zeros(32, 8).to_sparse()),
        ("exp_avg_sq", torch.zeros(32, 8, device="meta")),
    ):
        state = trained_state()
        state["state"][0][key] = value
        with pytest.raises(UserError, match="the checkpoint has for its tensor 0 ") as caught:
            load_optimizer(narrow, state)
        assert len(str(caught.value)) < 300
