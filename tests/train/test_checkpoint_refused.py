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
from safetensors.torch import save_file

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
        for bit in range(0, 8, 1 if position in attributes else 3):
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


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def rewritten(path: Path, pickled: bytes = b"", **options) -> None:
    """A checkpoint in an archive with good CRCs, perhaps with another pickle."""
    torch.save(make_nanogpt(), path)
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    zipped(path, members | {name: pickled or members[name]}, **options)


MASSES = b"\x80\x02}N" + b"\x85" * 1_000_000 + b"K\x01s."  # tuples in tuples
FILES = {  # how a file is made, and what the refusal says
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"model": {}})), "not the zip archive"),
    "legacy": (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "not the zip archive"),
    "safetensors": (lambda path: save_file({"w": torch.zeros(3)}, path), "not the zip archive"),
    "another zip": (lambda path: zipped(path, {"document.xml": b""}), "not a checkpoint that torch can read"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "it holds a Tensor"),
    "an object": (lambda path: torch.save({"x": Path("x")}, path), "more than tensors and plain values (pathlib"),
    "a state_dict": (lambda path: torch.save(make_model().state_dict(), path), "it has no model, optimizer"),
    "a pipe": (os.mkfifo, "cannot be read (not a regular file)"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "cannot be read (not a regular file)"),
    "packed": (lambda path: rewritten(path, compression=zipfile.ZIP_DEFLATED), "is packed"),
    "a deep pickle": (lambda path: rewritten(path, MASSES), "tuples"),
}
VALUES = [  # what a nanoGPT's checkpoint holds instead of its own, and what the refusal says
    ({"model": [torch.zeros(1)]}, "its model is [tensor([0.])], not a dict"),
    ({"model": {"w": 1.0}}, "its model is {'w': 1.0}, not a dict of named tensors"),
    ({"model": {}}, "its model is {}, not a dict of named tensors"),
    ({"optimizer": {"state": {}}}, "its optimizer is {'state': {}}, not the state"),
    ({"optimizer": {"state": [], "param_groups": []}}, "its optimizer is {"),
    ({"optimizer": {"state": {}, "param_groups": [{"params": [[0]]}]}}, "its optimizer is {"),
    ({"iter_num": "5"}, "its iter_num is '5'"),
    ({"iter_num": -1}, "its iter_num is -1"),
    ({"iter_num": True}, "its iter_num is True"),
    ({"best_val_loss": torch.zeros(2)}, "its best_val_loss is tensor([0., 0.]), not a number"),
    ({"config": None}, "its config is None, not a dict"),
    ({"model_args": [1]}, "its model_args is [1], not a dict"),
    ({"model_args": {"n_layer": 1}}, "differ in bias, block_size, dropout"),
    ({"model_args": MODEL_ARGS | {"rope": True}}, "differ in rope"),
    ({"model_args": MODEL_ARGS | {"n_layer": 0}}, "its n_layer is 0"),
    ({"model_args": MODEL_ARGS | {"vocab_size": 1e9}}, "its vocab_size is 1000000000.0"),
    ({"model_args": MODEL_ARGS | {"bias": 1}}, "its bias is 1"),
    ({"model_args": MODEL_ARGS | {"dropout": "no"}}, "its dropout is 'no'"),
    ({"nanofuse": []}, "its nanofuse is [], not a dict"),
    ({"nanofuse": {"gelu": 3}}, "its gelu is 3, not a str"),
    ({"nanofuse": {"tokenizer": "char"}}, "its tokenizer is 'char', not a dict"),
    ({"nanofuse": {"scaler": [1]}}, "its scaler is [1], not the state of a loss scale"),
    ({"nanofuse": {"scaler": {"scale": "1", "_growth_tracker": 0}}}, "its scaler is {'scale': '1'"),
    ({"nanofuse": {"best_iter": "3"}}, "its best_iter is '3', not a whole number"),
    ({"nanofuse": {"judged_at": 1.5}}, "its judged_at is 1.5, not a whole number"),
]


def assert_refused(path: Path, says: str) -> None:
    message = refusal(path)
    assert str(path) in message
    assert says in message
    assert checkpoint.held(path) is None  # a glance at it is as careful


@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_kinds(tmp_path, kind):
    make, says = FILES[kind]
    make(tmp_path / "ckpt.pt")
    assert_refused(tmp_path / "ckpt.pt", says)


def test_values_of_other_kinds(tmp_path):
    path = tmp_path / "ckpt.pt"
    for changes, says in VALUES:
        torch.save(make_nanogpt(**changes), path)
        assert_refused(path, says)
    for key in make_nanogpt():
        torch.save({name: value for name, value in make_nanogpt().items() if name != key}, path)
        assert_refused(path, f"it has no {key}")


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
