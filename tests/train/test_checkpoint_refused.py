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
        assert f"its member {member.filename} does not have its CRC" in refused[position, position % 8]


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
        for info in archive.infolist():
            info.external_attr = 0  # as in torch's


def rewritten(path: Path, **options) -> None:
    """A checkpoint in an archive with good CRCs."""
    torch.save(make_nanogpt(), path)
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    zipped(path, members, **options)


FILES = {  # how a file is made, and what the refusal says
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "legacy": (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "not a zip file"),
    "another zip": (lambda path: zipped(path, {"document.xml": b""}), "is not loaded"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "it holds a Tensor"),
    "an object": (lambda path: torch.save({"x": Path("x")}, path), "it holds pathlib"),
    "a state_dict": (lambda path: torch.save(make_model().state_dict(), path), "missing required field `model`"),
    "a pipe": (os.mkfifo, "cannot be read (not a regular file)"),
    "packed": (lambda path: rewritten(path, compression=zipfile.ZIP_DEFLATED), "is packed"),
}
VALUES = [  # what a nanoGPT's checkpoint holds instead of its own, and of which place the refusal tells
    ({"model": {"w": 1.0}}, "$.model"),
    ({"model": {}}, "$.model"),
    ({"optimizer": {"state": {}}}, "`param_groups` - at `$.optimizer"),
    ({"optimizer": {"state": [], "param_groups": []}}, "$.optimizer.state"),
    ({"optimizer": {"state": {}, "param_groups": [{"params": [[0]]}]}}, "$.optimizer.param_groups[0].params[0]"),
    ({"iter_num": "5"}, "Expected `int`, got `str` - at `$.iter_num"),
    ({"iter_num": -1}, "$.iter_num"),
    ({"iter_num": True}, "$.iter_num"),
    ({"best_val_loss": torch.zeros(2)}, "Expected `float`, got `Tensor` - at `$.best_val_loss"),
    ({"config": None}, "$.config"),
    ({"model_args": [1]}, "$.model_args"),
    *(({key: torch.zeros(3)}, "not a GPT's checkpoint") for key in make_nanogpt() | {"nanofuse": {}}),
    ({"model_args": {"n_layer": 1}}, "missing required field `n_head` - at `$.model_args"),
    ({"model_args": MODEL_ARGS | {"rope": True}}, "unknown field `rope`"),
    ({"model_args": MODEL_ARGS | {"n_layer": 0}}, "Expected `int` >= 1 - at `$.model_args.n_layer"),
    ({"model_args": MODEL_ARGS | {"vocab_size": 10**30}}, "$.model_args.vocab_size"),
    ({"model_args": MODEL_ARGS | {"bias": 1}}, "$.model_args.bias"),
    ({"model_args": MODEL_ARGS | {"dropout": 1.5}}, "$.model_args.dropout"),
    ({"nanofuse": []}, "$.nanofuse"),
    ({"nanofuse": {"gelu": 3}}, "$.nanofuse.gelu"),
    ({"nanofuse": {"tokenizer": "char"}}, "$.nanofuse.tokenizer"),
    ({"nanofuse": {"scaler": {"scale": "1"}}}, "$.nanofuse.scaler"),
    ({"nanofuse": {"best_iter": "3"}}, "$.nanofuse.best_iter"),
    ({"nanofuse": {"judged_at": 1.5}}, "$.nanofuse.judged_at"),
]


def assert_refused(path: Path, says: str) -> None:
    message = refusal(path)
    assert str(path) in message
    assert says in message
    assert checkpoint.held(path) is None  # a glance at it is as careful


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # torch's, of a tensor that is taken for a dict
def test_files_and_values_of_other_kinds(tmp_path):
    for kind, (make, says) in FILES.items():
        make(tmp_path / kind)
        assert_refused(tmp_path / kind, says)
    path, good = tmp_path / "ckpt.pt", make_nanogpt()
    for changes, says in VALUES:
        torch.save(good | changes, path)
        assert_refused(path, says)
    for key in good:
        torch.save({name: value for name, value in good.items() if name != key}, path)
        assert_refused(path, f"missing required field `{key}`")
    for tensor, kind in (
        (torch.zeros(2).to_sparse(), "sparse_coo tensor on cpu"),
        (torch.zeros(2, device="meta"), "meta"),
    ):
        torch.save(good | {"model": {"w": tensor}}, path)
        assert kind in refusal(path)


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
    assert "ckpt-previous-1.pt, of iteration 2, is whole" in refusal(path)
    previous.write_bytes(previous.read_bytes()[:-100])
    message = refusal(path)
    assert "iteration 1, is whole" in message
    subprocess.run(message.split("`")[1], shell=True, check=True)
    assert checkpoint.load(path)["iter_num"] == 1
    path.write_bytes(b"")
    assert not oldest.exists()
    assert "is whole" not in refusal(path)
