"""Loads: a short, damaged or foreign file is refused with its name, and the message offers the previous checkpoint."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from tests.train.checkpoints import MODEL_ARGS, assert_same, make_checkpoint, make_model, make_nanogpt, refusal
from train import checkpoint
from train.errors import UserError

# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint.save(folder, make_checkpoint(3), keep=1)
    return (folder / "ckpt.pt").read_bytes()


def test_truncated_at_many_lengths(tmp_path, whole):
    path = tmp_path / "ckpt.pt"
    for length in {*range(8), *range(0, len(whole), 101), *range(len(whole) - 30, len(whole))}:
        path.write_bytes(whole[:length])
        assert str(path) in refusal(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "is cut short" in refusal(path)


def test_a_flipped_bit_is_refused_or_harmless(tmp_path, whole):
    """Harmless are the padding and the zip fields that are not used here (a date, a permission)."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        member = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    entry = whole.index(member.filename.encode(), directory) - 46
    attributes = range(entry + 36, entry + 42)  # with these torch takes the member for a folder and reads nothing
    tensor = whole.index(torch.full((256,), 3.0).numpy().tobytes())
    assert member.file_size == 1024
    within = (tensor, tensor + 511, tensor + 1023)
    locators = range(whole.rindex(b"PK\x06\x06"), len(whole))
    saved, refused = make_checkpoint(3), {}
    flips = [(position, bit) for position in attributes for bit in range(8)]
    flips += [(position, position % 8) for position in (*within, *locators, *range(0, len(whole), 83))]
    for position, bit in flips:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            refused[position, bit] = str(error)
            assert str(path) in refused[position, bit]
        else:
            assert_same(loaded, saved)
    assert refused.keys() >= {(position, bit) for position in attributes for bit in range(8)}
    for position in within:
        assert f"is damaged: its member {member.filename} does not have its CRC" in refused[position, position % 8]


def test_what_torch_reads_is_compared_with_what_was_verified(tmp_path, whole, monkeypatch):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(whole)
    monkeypatch.setattr(torch, "load", lambda *args, **options: make_checkpoint(4))
    assert "torch does not read the bytes" in refusal(path)


# Files of other kinds


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


TUPLES_IN_TUPLES = b"\x80\x02}N" + b"\x85" * 100_000 + b"K\x01s."
FILES = {  # how a file is made, and what the refusal says
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "legacy": (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "not the zip archive"),
    "another zip": (lambda path: zipped(path, {"document.xml": b""}), "not a checkpoint that torch can read"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "it holds a Tensor"),
    "an object": (lambda path: torch.save({"x": Path("x")}, path), "more than tensors and plain values (pathlib"),
    "a state_dict": (lambda path: torch.save(make_model().state_dict(), path), "it has no model, optimizer"),
    "a pipe": (os.mkfifo, "cannot be read (not a regular file)"),
    "packed": (lambda path: rewritten(path, compression=zipfile.ZIP_DEFLATED), "is packed"),
    "a deep pickle": (lambda path: rewritten(path, TUPLES_IN_TUPLES), "tuples"),
}
VALUES = [  # what a nanoGPT's checkpoint holds instead of its own, and what the refusal says
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
    ({"model_args": MODEL_ARGS | {"bias": 1}}, "its bias is 1"),
    ({"model_args": MODEL_ARGS | {"dropout": 1.5}}, "its dropout is 1.5"),
    ({"nanofuse": []}, "its nanofuse is [], not a dict"),
    ({"nanofuse": {"gelu": 3}}, "its gelu is 3, not a str"),
    ({"nanofuse": {"tokenizer": "char"}}, "its tokenizer is 'char', not a dict"),
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
    path, good = tmp_path / "ckpt.pt", make_nanogpt()
    for changes, says in VALUES:
        torch.save(good | changes, path)
        assert_refused(path, says)
    for key in good:
        torch.save({name: value for name, value in good.items() if name != key}, path)
        assert_refused(path, f"it has no {key}")


# What the refusal offers


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_the_newest_whole_one_is_offered_and_the_offer_works(tmp_path, damage):
    out_dir = tmp_path / "my out"
    for iteration in (1, 2, 3):
        checkpoint.save(out_dir, make_checkpoint(iteration), keep=3)
    path, previous, oldest = (out_dir / f"ckpt{name}.pt" for name in ("", "-previous-1", "-previous-2"))
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:-100])
    assert "iteration 2, is whole" in refusal(path)
    previous.write_bytes(previous.read_bytes()[:-100])
    message = refusal(path)
    assert "iteration 1, is whole" in message
    subprocess.run(message.split("`")[1], shell=True, check=True)
    assert checkpoint.load(path)["iter_num"] == 1
    path.write_bytes(b"")
    assert not oldest.exists()
    assert "is whole" not in refusal(path)
