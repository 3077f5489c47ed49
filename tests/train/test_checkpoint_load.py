"""What a checkpoint holds, and loads: nanoGPT's layout, both ways, and the optimizer's whole state. A short, damaged or
foreign file is refused with its name, and the message offers the previous checkpoint."""

import copy
import itertools
import math
import os
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from tests.train import runs
from tests.train.checkpoints import (
    MODEL_ARGS,
    assert_same,
    make_adamw,
    make_checkpoint,
    make_model,
    make_nanogpt,
    refusal,
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


def test_weights_and_their_shape_are_enough_but_not_to_resume(tmp_path):
    """As in files that people share, whose oldest have no "bias"."""
    args = {name: value for name, value in MODEL_ARGS.items() if name not in ("bias", "dropout")}
    model = dict(make_model().state_dict())
    shared = {"model": model, "model_args": args}
    another = make_nanogpt()  # a fork's, which counts under another name: resumed, it would begin at iteration 0 again
    another["step"] = another.pop("iter_num")
    for held, missing in ((another, "iter_num"), (shared, "optimizer")):
        torch.save(held, tmp_path / "ckpt.pt")
        assert checkpoint.load(tmp_path / "ckpt.pt")["iter_num"] == 0
        assert f"missing required field `{missing}`" in runs.refusal(runs.resume, tmp_path)
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert_same(loaded["model"], model)
    assert (loaded["model_args"], loaded["config"]) == (args, {})


def test_nanogpt_loads_ours(tmp_path):
    """With the same statements as in its train.py and sample.py."""
    model = make_model()
    optimizer = make_adamw(model, fused=True, lr=2**-10)
    train(model, optimizer, 3)
    checkpoint.save(tmp_path, make_checkpoint(model=model.state_dict(), optimizer=optimizer.state_dict()), keep=2)

    loaded = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    assert_same(loaded["model_args"], MODEL_ARGS)
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
    def changed(**values) -> dict:
        state = make_nanogpt()["optimizer"]
        state["state"][0] |= values
        return state

    zeros, ours, missing = torch.zeros(32, 8), make_adamw(make_model()), changed()
    del missing["state"][1]
    moments = (None, 0, [0.0] * 1000, zeros.long(), zeros.to_sparse(), zeros.to("meta"), torch.zeros(33, 8))
    for state, message in (
        (torch.optim.AdamW(make_model().parameters()).state_dict(), "groups of 3 tensors, this model's 1 and 2"),
        (missing, "tensor 1 no count"),
        *((changed(step=step), "tensor 0 no count") for step in ("three", None, -1, 1e300, math.nan, torch.ones(2))),
        *(
            (changed(exp_avg=moment), r"tensor 0 .* of the shape \[32, 8\]: it is not this model's AdamW")
            for moment in (*moments, torch.zeros(32, 16))
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_optimizer(ours, state)
        assert not ours.state


# Refusals


@pytest.fixture
def path(tmp_path) -> Path:
    """A whole checkpoint."""
    checkpoint.save(tmp_path, make_checkpoint(3), keep=1)
    return tmp_path / "ckpt.pt"


def test_damage_is_refused_or_harmless(path):
    """The file is cut at many lengths, and bits of it are flipped. Harmless are the padding and the zip fields that are
    not used here (a date, a permission)."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        member = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    for length in {*range(8), *range(0, len(whole), 101), *range(len(whole) - 30, len(whole))}:
        path.write_bytes(whole[:length])
        refusal(path)
        assert checkpoint.held(path) is None
    entry = whole.index(member.filename.encode(), directory) - 46
    attributes = range(entry + 36, entry + 42)  # with these torch takes the member for a folder and reads nothing
    tensor = whole.index(torch.full((256,), 3.0).numpy().tobytes())
    within = (tensor, tensor + 511, tensor + 1023)
    locators = range(whole.rindex(b"PK\x06\x06"), len(whole))
    others = (*within, *locators, *range(directory, len(whole), 3), *range(0, len(whole), 83))
    said = {}
    for position, bit in [*itertools.product(attributes, range(8)), *((position, position % 8) for position in others)]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            said[position] = str(error)
        else:
            assert_same(loaded, make_checkpoint(3))
    for position in within:
        assert f"{path} is no checkpoint, or a damaged one: its member {member.filename} does not" in said[position]


def test_what_torch_reads_is_compared_with_what_was_verified(path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **options: make_checkpoint(4))
    assert "torch does not read the bytes" in refusal(path)


def follow(advice: str) -> str:
    """Run the command that a message suggests."""
    subprocess.run(advice.split("`")[1], shell=True, check=True)
    return advice


def rewritten(path: Path, pickled: bytes = b"", compression: int = zipfile.ZIP_STORED, **attributes) -> None:
    """A checkpoint in an archive with good CRCs, perhaps with another pickle."""
    torch.save(make_nanogpt(), path)
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, pickled if pickled and name.endswith("data.pkl") else data)
        for info in archive.infolist():
            info.external_attr = 0  # as in torch's
            for name, value in attributes.items():
                setattr(info, name, value)


def test_the_extra_field_of_files_over_4_gb_is_read(path):
    """torch writes it beside the members that begin beyond 4 GB: those of gpt2-medium's moments."""
    rewritten(path, extra=struct.pack("<HHQ", 1, 8, 0))
    assert checkpoint.load(path)["iter_num"] == make_nanogpt()["iter_num"]
    assert checkpoint.held(path)


PROTO, TUPLE1, SET_ITEM, STOP = b"\x80\x02", b"\x85", b"K\x01s", b"."
TUPLES_IN_TUPLES = PROTO + b"}N" + TUPLE1 * 100_000 + SET_ITEM + STOP  # hashing them overflows the stack
DOUBLED = PROTO + b"]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 60 + STOP  # lists of 2**60 items, if each is visited
FILES = [  # how a file is made, and what the refusal says
    (lambda path: path.write_bytes(b""), "not a zip file"),
    (lambda path: path.mkdir(), "Is a directory"),
    (os.mkfifo, "cannot be read (not a regular file)"),
    (lambda path: rewritten(path, compression=zipfile.ZIP_DEFLATED), "is packed"),
    (lambda path: rewritten(path, bytes(10**8), zipfile.ZIP_DEFLATED), "is packed"),
    (lambda path: rewritten(path, external_attr=16), "marked"),
    (lambda path: rewritten(path, internal_attr=1), "marked"),
    (lambda path: rewritten(path, extra=b"up\0\0"), "marked"),
    (lambda path: rewritten(path, TUPLES_IN_TUPLES), "50,000 tuples"),
    (lambda path: rewritten(path, PROTO + b"]" * 10**5 + b"a" * (10**5 - 1) + STOP), "not a dict"),
    (lambda path: rewritten(path, DOUBLED), "more than 2,000,000 values"),
    (lambda path: torch.save(torch.zeros(3), path), "it holds a Tensor"),
    (lambda path: torch.save({"x": Path("x")}, path), "it holds pathlib"),
    (lambda path: torch.save(make_model().state_dict(), path), "missing required field `model`"),
]
VALUES = [  # what a nanoGPT's checkpoint holds instead of its own, and of which place the refusal tells
    ({"model": {"w": 1.0}}, "$.model"),
    ({"model": {}}, "$.model"),
    ({"model": {"w": torch.zeros(2).to_sparse()}}, "no checkpoint"),
    ({"model": {"w": torch.zeros(2, device="meta")}}, "no checkpoint"),
    ({"optimizer": {"state": {}}}, "`param_groups` - at `$.optimizer"),
    ({"iter_num": "5"}, "Expected `int`, got `str` - at `$.iter_num"),
    ({"best_val_loss": torch.zeros(2)}, "Expected `float`, got `Tensor` - at `$.best_val_loss"),
    ({"config": torch.zeros(3)}, "not a GPT's checkpoint"),
    ({"model_args": {"n_layer": 1}}, "missing required field `n_head` - at `$.model_args"),
    ({"model_args": MODEL_ARGS | {"rope": True}}, "unknown field `rope`"),
    ({"model_args": MODEL_ARGS | {"n_layer": 0}}, "Expected `int` >= 1 - at `$.model_args.n_layer"),
    ({"nanofuse": {"best_iter": "3"}}, "$.nanofuse.best_iter"),
]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # torch's, of a tensor that is taken for a dict
def test_files_and_values_of_other_kinds(tmp_path):
    for number, (made, says) in enumerate(FILES + VALUES):
        path = tmp_path / f"{number}.pt"
        if callable(made):
            made(path)
        else:
            torch.save(make_nanogpt(**made), path)
        message = refusal(path)
        assert str(path) in message
        assert says in message
        assert not callable(made) or checkpoint.held(path) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_the_newest_whole_one_is_offered_and_the_offer_works(tmp_path, damage):
    out_dir = tmp_path / "my out"
    for iteration in (1, 2, 3):
        checkpoint.save(out_dir, make_checkpoint(iteration, best_iter=1), keep=3)
    path = out_dir / "ckpt.pt"
    damage(path)
    assert checkpoint.best_of(out_dir) == path  # whose refusal offers the others
    assert "ckpt-previous-1.pt, of iteration 2, is whole" in refusal(path)
    cut(out_dir / "ckpt-previous-1.pt")
    assert "iteration 1, is whole" in follow(refusal(path))
    assert checkpoint.load(path)["iter_num"] == 1
    assert (out_dir / "ckpt.pt.damaged").exists() == (damage == cut)  # it may be another program's


def test_a_damaged_best_is_not_read_and_the_offer_works(tmp_path):
    for iteration in (1, 2):
        checkpoint.save(tmp_path, make_checkpoint(iteration, best_iter=1), keep=1)
    best = checkpoint.best_of(tmp_path)
    content = best.read_bytes()
    best.write_bytes(content.replace(torch.ones(256).numpy().tobytes(), bytes(1024)))  # a tensor; all else is whole
    assert "; ckpt.pt, of iteration 2, is whole: `mv" in follow(refusal(best))
    assert checkpoint.load(checkpoint.best_of(tmp_path))["iter_num"] == 2


def test_a_best_that_a_run_deletes_before_it_is_read(tmp_path):
    """Its latest one has just become the best. There is nothing to move then."""
    checkpoint.save(tmp_path, make_checkpoint(2, best_iter=2), keep=1)
    assert refusal(tmp_path / "ckpt-best.pt").endswith("; ckpt.pt, of iteration 2, is whole: try again")
