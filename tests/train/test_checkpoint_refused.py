"""Loads: a short, damaged or foreign file is refused with its name, and the message offers the previous checkpoint."""

import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train.checkpoints import (
    MODEL_ARGS,
    assert_same,
    make_checkpoint,
    make_model,
    make_nanogpt,
    refusal,
)
from train import checkpoint
from train.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint.save(folder, make_checkpoint(3), keep=1)
    return (folder / "ckpt.pt").read_bytes()


def test_truncated_at_many_lengths(tmp_path, whole):
    path = tmp_path / "ckpt.pt"
    for length in {*range(8), *range(0, len(whole), 37), *range(len(whole) - 30, len(whole))}:
        path.write_bytes(whole[:length])
        assert str(path) in refusal(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "is cut short" in refusal(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_harmless(tmp_path, whole, data):
    """Harmless are the padding and the zip fields that are not used here (a date, a permission)."""
    position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << bit
    path = tmp_path / "ckpt.pt"
    path.write_bytes(flipped)
    try:
        loaded = checkpoint.load(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert_same(loaded, make_checkpoint(3))


def test_every_flip_within_a_tensor_is_refused_though_torch_takes_it(tmp_path, whole):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if "/data/" in info.filename]
        member = next(info for info in members if info.file_size == 1024)
    header = 30 + int.from_bytes(whole[member.header_offset + 26 :][:2], "little")
    header += int.from_bytes(whole[member.header_offset + 28 :][:2], "little")
    for offset in (0, 511, member.file_size - 1):
        flipped = bytearray(whole)
        flipped[member.header_offset + header + offset] ^= 0x40
        path.write_bytes(flipped)
        torch.load(path, weights_only=True)  # torch does not check CRCs, so load must
        assert f"is damaged: its member {member.filename}" in refusal(path)


def test_every_flip_that_hides_a_member_from_torch_is_refused_or_harmless(tmp_path, whole):
    """Attributes in the archive's directory make torch take a member for a folder. The locators are at the end."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        entry = whole.index(b"PK\x01\x02", archive.start_dir)
        member = whole.index(b"archive/data/0", entry) - 46
    attributes = range(member + 36, member + 42)
    locators = range(whole.rindex(b"PK\x06\x06"), len(whole))
    refused = 0
    for position in (*attributes, *locators):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                loaded = checkpoint.load(path)
            except UserError:
                refused += 1
            else:
                assert position not in attributes
                assert_same(loaded, make_checkpoint(3))
    assert refused > 8 * len(attributes)


def test_what_torch_reads_is_compared_with_what_was_verified(tmp_path, whole, monkeypatch):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(whole)
    monkeypatch.setattr(torch, "load", lambda *args, **options: make_checkpoint(4))
    assert "torch does not read the bytes" in refusal(path)


def foreign_files() -> dict:
    def of(value):
        return lambda path: torch.save(value, path)

    def other(**changes):
        return of(make_nanogpt(**changes))

    def without(key):
        return of({k: v for k, v in make_nanogpt().items() if k != key})

    def safetensors(path):
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(3)}, path)

    def archive(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("word/document.xml", "<xml/>")

    def rewritten(change, compression=zipfile.ZIP_STORED):
        """A checkpoint whose pickle is changed, in an archive with good CRCs."""

        def make(path):
            torch.save(make_nanogpt(), path)
            with zipfile.ZipFile(path) as old:
                members = {info.filename: old.read(info) for info in old.infolist()}
            with zipfile.ZipFile(path, "w", compression) as new:
                for name, data in members.items():
                    new.writestr(name, change(data) if name.endswith("data.pkl") else data)

        return make

    bad_args = [{"n_layer": 0}, {"bias": 1}, {"dropout": "no"}]
    deep = b"\x80\x02}N" + b"\x85" * 1_000_000 + b"K\x01s."
    return {
        "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
        "folder": (lambda path: path.mkdir(), "Is a directory"),
        "pickle": (lambda path: path.write_bytes(pickle.dumps({"model": {}})), "not the zip archive"),
        "legacy torch": (
            lambda path: torch.save(make_nanogpt(), path, _use_new_zipfile_serialization=False),
            "not the zip archive",
        ),
        "safetensors": (safetensors, "not the zip archive"),
        "another zip": (archive, "not a checkpoint that torch can read"),
        "a tensor": (of(torch.zeros(3)), "it holds a Tensor"),
        "an object": (of({"model": Path("x")}), "more than tensors and plain values (pathlib"),
        "a state_dict": (of(make_model().state_dict()), "it has no model, optimizer"),
        **{f"no {key}": (without(key), f"it has no {key}") for key in make_nanogpt()},
        "model a list": (other(model=[torch.zeros(1)]), "its model is [tensor([0.])], not a dict"),
        "model of numbers": (other(model={"w": 1.0}), "its model is {'w': 1.0}, not a dict of named tensors"),
        "optimizer without groups": (other(optimizer={"state": {}}), "its optimizer is {'state': {}}, not the state"),
        "optimizer of unnamed tensors": (
            other(optimizer={"state": {}, "param_groups": [{"params": [[0]]}]}),
            "its optimizer is {",
        ),
        "iter_num a string": (other(iter_num="5"), "its iter_num is '5'"),
        "iter_num negative": (other(iter_num=-1), "its iter_num is -1"),
        "best_val_loss a vector": (
            other(best_val_loss=torch.zeros(2)),
            "its best_val_loss is tensor([0., 0.]), not a number",
        ),
        "nanofuse a list": (other(nanofuse=[]), "its nanofuse is [], not a dict"),
        "model_args a list": (other(model_args=[1]), "its model_args is [1], not a dict"),
        "model_args short": (other(model_args={"n_layer": 1}), "differ in bias, block_size, dropout"),
        **{f"model_args {bad}": (other(model_args=MODEL_ARGS | bad), f"its {next(iter(bad))} is") for bad in bad_args},
        "gelu a number": (other(nanofuse={"gelu": 3}), "its gelu is 3, not a str"),
        "tokenizer a string": (other(nanofuse={"tokenizer": "char"}), "its tokenizer is 'char', not a dict"),
        "scaler a list": (other(nanofuse={"scaler": [1]}), "its scaler is [1], not a dict"),
        "judged_at a float": (other(nanofuse={"judged_at": 1.5}), "its judged_at is 1.5, not a whole number"),
        "a pipe": (os.mkfifo, "cannot be read (not a regular file)"),
        "a device": (lambda path: path.symlink_to("/dev/zero"), "cannot be read (not a regular file)"),
        "a packed archive": (rewritten(lambda data: data, zipfile.ZIP_DEFLATED), "is packed"),
        "a deep pickle": (rewritten(lambda data: deep), "tuples"),
        "model_args of another model": (other(model_args=MODEL_ARGS | {"rope": True}), "differ in rope"),
    }


FOREIGN = foreign_files()


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(tmp_path, kind):
    make, says = FOREIGN[kind]
    path = tmp_path / "ckpt.pt"
    make(path)
    message = refusal(path)
    assert str(path) in message
    assert says in message
    assert checkpoint.held(path) is None  # a glance at it is as careful


def test_missing_names_out_dir_and_init_from(tmp_path):
    message = refusal(tmp_path / "ckpt.pt")
    assert f"out_dir={tmp_path}" in message
    assert "init_from=resume" in message


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_the_previous_one_is_offered_and_the_offer_works(tmp_path, damage):
    out_dir = tmp_path / "my out"
    for iteration in (1, 2, 3):
        checkpoint.save(out_dir, make_checkpoint(iteration), keep=3)
    path = out_dir / "ckpt.pt"
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:-100])
    message = refusal(path)
    assert "iteration 2, is whole" in message
    subprocess.run(message.split("`")[1], shell=True, check=True)
    assert checkpoint.load(path)["iter_num"] == 2


def test_a_previous_one_that_is_damaged_is_not_offered(tmp_path):
    for iteration in (1, 2, 3):
        checkpoint.save(tmp_path, make_checkpoint(iteration), keep=3)
    for name in ("ckpt.pt", "ckpt-previous-1.pt"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-100])
    assert "iteration 1, is whole" in refusal(tmp_path / "ckpt.pt")
    (tmp_path / "ckpt-previous-2.pt").write_bytes(b"")
    assert "is whole" not in refusal(tmp_path / "ckpt.pt")
