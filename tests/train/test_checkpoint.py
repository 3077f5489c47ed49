"""Saves: complete after a kill at any time and on a full disk; earlier checkpoints are kept."""

import errno
import itertools
import math
import os
import resource
import shutil
from contextlib import suppress
from unittest import mock

import pytest
import torch

from tests.train.checkpoints import assert_same, make_checkpoint, saved_iterations
from train import checkpoint
from train.errors import UserError

FILES = ["ckpt.pt", "ckpt-previous-1.pt", "ckpt-previous-2.pt"]


def test_a_save_keeps_that_many_the_newest_and_files_of_others(tmp_path):
    (tmp_path / ".staging-0123").mkdir()  # what a killed save left
    (tmp_path / ".staging-0123" / "ckpt.pt").write_bytes(b"half")
    theirs = ["ckpt.pt.bak", "ckpt-previous-best.pt", "notes.tmp"]
    for name in theirs:
        (tmp_path / name).write_bytes(b"the user's")
    for iteration, keep, kept in ((1, 2, [1]), (2, 2, [2, 1]), (3, 2, [3, 2]), (4, 10**12, [4, 3, 2]), (5, 1, [5])):
        saved = make_checkpoint(iteration)
        checkpoint.save(tmp_path, saved, keep)
        assert sorted(os.listdir(tmp_path)) == sorted([*theirs, *FILES[: len(kept)]])
        assert [checkpoint.load(tmp_path / name)["iter_num"] for name in FILES[: len(kept)]] == kept
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert_same(loaded, saved)
    model = loaded["model"]
    assert model["lm_head.weight"].data_ptr() == model["transformer.wte.weight"].data_ptr()  # still tied


class Killed(BaseException):
    """Not an Exception, so that no handler catches it: a kill cannot be caught."""


@pytest.mark.parametrize(
    ("links", "keep", "best", "moves"),  # moves: the calls of a save, the 5th, if nobody kills it
    [
        (True, 1, 4, "fsync link replace replace fsync"),
        (True, 4, 5, "fsync replace replace replace link replace replace fsync unlink unlink"),
        (False, 4, 4, "fsync replace replace replace link fsync replace link fsync replace replace fsync unlink"),
    ],
    ids=["keep 1", "keep 4", "no links"],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_every_system_call_leaves_old_or_new(tmp_path, monkeypatch, after, links, keep, best, moves):
    """Die just before or just after the k-th call that changes the disk, for every k. Then save once more.

    The best state is that of iteration 2, until 4 or 5 is better.
    """
    countdown, called = math.inf, []

    def dying(name, function):
        def call(*args, **kwargs):
            nonlocal countdown
            countdown -= 1
            called.append(name)
            if countdown < 0 or (countdown == 0 and not after):
                raise Killed  # later clean-ups raise too, because a dead process cleans up nothing
            if name == "link" and not links:
                raise OSError(errno.ENOTSUP, "no links here")
            result = function(*args, **kwargs)
            if countdown == 0:
                raise Killed
            return result

        return call

    for name in ("fsync", "replace", "link", "unlink"):
        monkeypatch.setattr(os, name, dying(name, getattr(os, name)))
    losses = {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.0, 5: 1.0} | {best: 1.0}
    for iteration, best_iter in ((1, 1), (2, 2), (3, 2), (4, best if best == 4 else 2)):
        checkpoint.save(tmp_path / "four", make_checkpoint(iteration, best_iter, best_val_loss=losses[iteration]), keep)
    for k in itertools.count(1):
        out_dir = shutil.copytree(tmp_path / "four", tmp_path / str(k))
        countdown = k
        called.clear()
        with suppress(Killed):
            checkpoint.save(out_dir, make_checkpoint(5, best, best_val_loss=losses[5]), keep)
        killed, countdown = countdown <= 0, math.inf
        kept = saved_iterations(out_dir)  # loads every one of them
        survivor = kept[0]
        assert survivor in (4, 5)
        assert len(set(kept)) >= keep  # also in between
        best_now = best if survivor == 5 or best == 4 else 2
        assert checkpoint.load(checkpoint.best_of(out_dir))["iter_num"] == best_now
        if not killed:
            break
        checkpoint.save(out_dir, make_checkpoint(6, best_now, best_val_loss=losses[survivor]), keep)
        assert checkpoint.load(checkpoint.best_of(out_dir))["iter_num"] == best_now
        assert not list(out_dir.glob(".staging-*"))
        wanted = [[6, 5, 4, 3] if survivor == 5 else [6, 4, 3, 2]]
        if not links:  # a copy is not recognised as one, so the oldest may be lost
            wanted.append([6, 4, 4, 3])
        assert saved_iterations(out_dir) in [iterations[:keep] for iterations in wanted]
    assert kept == [5, 4, 3, 2][:keep]
    assert called == moves.split()


def test_an_interrupt_anywhere_in_torchs_writer_leaves_the_old_one(tmp_path, monkeypatch):
    """A second Ctrl-C, at every call of it. Without care, torch then aborts the process when it frees its writer."""
    countdown = math.inf

    def interrupting(function):
        def call(*args):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise KeyboardInterrupt
            return function(*args)

        return call

    torchs, ours = torch._C.PyTorchFileWriter, checkpoint._Writer
    for kind, name in ((torchs, "write_record"), (torchs, "write_end_of_file"), (ours, "write"), (ours, "flush")):
        monkeypatch.setattr(kind, name, interrupting(getattr(kind, name)))
    checkpoint.save(tmp_path, make_checkpoint(1), keep=2)
    for k in itertools.count(1):
        countdown = k
        try:
            checkpoint.save(tmp_path, make_checkpoint(2), keep=2)
        except KeyboardInterrupt:
            assert os.listdir(tmp_path) == ["ckpt.pt"]
        else:
            break
        assert saved_iterations(tmp_path) == [1]
    assert k > 30
    assert saved_iterations(tmp_path) == [2, 1]


def test_what_a_load_would_refuse_is_not_saved(tmp_path):
    checkpoint.save(tmp_path, make_checkpoint(1), keep=1)
    with pytest.raises(ValueError, match=r"nanofuse\.scaler"):
        checkpoint.save(tmp_path, make_checkpoint(2, nanofuse={"scaler": {"scale": "1"}}), keep=1)
    assert saved_iterations(tmp_path) == [1]


def test_full_disk(tmp_path):
    """Simulated by a limit on the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for floats in (26_000, 1_000_000):  # fails in the closing flush; within a tensor
        checkpoint.save(tmp_path / "second", make_checkpoint(1), keep=2)
        large = make_checkpoint(2, model={"w": torch.ones(floats)})
        for name, left in (("first", "there is none"), ("second", "is still whole")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            try:
                with pytest.raises(UserError, match=rf"out_dir=.*could not be written .*File too large.*{left}"):
                    checkpoint.save(tmp_path / name, large, keep=2)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.listdir(tmp_path / "first") == []
        assert saved_iterations(tmp_path / "second")[0] == 1


def test_runs_that_are_set_aside_in_the_same_second_keep_apart(tmp_path):
    for text in ("first", "second", "third"):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert (checkpoint.set_aside(tmp_path) / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_run_that_was_being_set_aside_can_be_resumed(tmp_path, monkeypatch, moved):
    """Not from an older checkpoint, which is still there: the newest one goes last."""
    for iteration in (1, 2, 3):
        checkpoint.save(tmp_path, make_checkpoint(iteration), 3)
    results = [*[mock.DEFAULT] * moved, Killed]
    monkeypatch.setattr(os, "rename", mock.Mock(wraps=os.rename, side_effect=results))
    with suppress(Killed):
        checkpoint.set_aside(tmp_path)
    assert checkpoint.load(tmp_path / "ckpt.pt")["iter_num"] == 3


@pytest.mark.parametrize("aside", [checkpoint.set_aside, checkpoint.set_best_aside])
def test_a_run_that_cannot_be_set_aside_is_told_in_one_line(tmp_path, monkeypatch, aside):
    checkpoint.save(tmp_path, make_checkpoint(1), keep=1)
    for name in ("mkdir", "replace", "link"):
        monkeypatch.setattr(os, name, mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match=f"out_dir={tmp_path}: .* could not be set aside .*Permission denied"):
        aside(tmp_path)
    assert saved_iterations(tmp_path) == [1]
