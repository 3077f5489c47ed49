"""Saves: complete after a kill at any time and on a full disk; earlier checkpoints are kept."""

import errno
import math
import os
import subprocess
import sys
import textwrap

import pytest

from tests.train.checkpoints import assert_same, make_checkpoint, saved_iterations
from tests.train.jobs import ROOT
from train import checkpoint
from train.errors import UserError

# One save


def test_round_trip(tmp_path):
    saved = make_checkpoint(7)
    checkpoint.save(tmp_path / "new" / "out", saved, keep=2)
    loaded = checkpoint.load(tmp_path / "new" / "out" / "ckpt.pt")
    assert_same(loaded, saved)
    model = loaded["model"]
    assert model["lm_head.weight"].data_ptr() == model["transformer.wte.weight"].data_ptr()  # still tied
    assert os.listdir(tmp_path / "new" / "out") == ["ckpt.pt"]


@pytest.mark.parametrize("keep", [1, 3, 10**12])
def test_keeps_that_many_the_newest(tmp_path, keep):
    for iteration in range(6):
        checkpoint.save(tmp_path, make_checkpoint(iteration), keep)
    names = ["ckpt.pt", *(f"ckpt-previous-{i}.pt" for i in range(1, min(keep, 6)))]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert saved_iterations(tmp_path) == [5, 4, 3, 2, 1, 0][:keep]
    checkpoint.save(tmp_path, make_checkpoint(6), keep=1)
    assert saved_iterations(tmp_path) == [6]


def test_removes_its_own_stale_files_and_no_others(tmp_path):
    (tmp_path / ".staging-0123").mkdir()
    (tmp_path / ".staging-0123" / "ckpt.pt").write_bytes(b"half")
    theirs = ["ckpt.pt.bak", "ckpt-previous-best.pt", "notes.tmp"]
    for name in theirs:
        (tmp_path / name).write_bytes(b"the user's")
    checkpoint.save(tmp_path, make_checkpoint(), keep=1)
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "ckpt.pt"])


# Kills


class Killed(BaseException):
    """Not an Exception, so that no handler catches it: a kill cannot be caught."""


@pytest.mark.parametrize(("links", "keep", "best"), [(True, 1, 5), (True, 2, 4), (True, 4, 5), (False, 4, 4)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_every_system_call_leaves_old_or_new(tmp_path, monkeypatch, after, links, keep, best):
    """Die just before or just after the k-th call that changes the disk, for every k. Then save once more."""
    calls = {name: getattr(os, name) for name in ("fsync", "replace", "link", "unlink")}
    countdown = math.inf

    def dying(name):
        def call(*args, **kwargs):
            nonlocal countdown
            countdown -= 1
            if countdown < 0 or (countdown == 0 and not after):
                raise Killed  # later clean-ups raise too, because a dead process cleans up nothing
            if name == "link" and not links:
                raise OSError(errno.ENOTSUP, "no links here")
            result = calls[name](*args, **kwargs)
            if countdown == 0:
                raise Killed
            return result

        return call

    for name in calls:
        monkeypatch.setattr(os, name, dying(name))
    for k in range(1, 100):
        out_dir = tmp_path / str(k)
        for iteration in (1, 2, 3, 4):  # 2 is the best one of the first three
            loss = {1: 3.0}.get(iteration, 2.0) if iteration < best else 1.0
            better = iteration in (1, 2, best)
            made = make_checkpoint(iteration, best_val_loss=loss)
            checkpoint.save(out_dir, made, keep, best=better, keep_best=iteration == 3)
        countdown = k
        try:
            made = make_checkpoint(5, best_val_loss=1.0)
            checkpoint.save(out_dir, made, keep, best=best == 5, keep_best=best == 4)
        except Killed:
            killed = True
        else:
            killed = False
        countdown = math.inf
        assert (out_dir / "ckpt.pt").is_file()
        kept = saved_iterations(out_dir)  # loads every one of them
        survivor = kept[0]
        assert survivor in (4, 5)
        best_now = best if survivor == 5 or best == 4 else 2
        assert checkpoint.load(checkpoint.best_of(out_dir))["iter_num"] == best_now
        assert len(set(kept)) >= keep  # also in between
        made = make_checkpoint(6, best_val_loss=checkpoint.held(out_dir / "ckpt.pt").best_val_loss)
        checkpoint.save(out_dir, made, keep, keep_best=survivor == best)
        assert checkpoint.load(checkpoint.best_of(out_dir))["iter_num"] == best_now
        assert not list(out_dir.glob(".staging-*"))
        kept = saved_iterations(out_dir)
        if links:
            assert kept == ([6, 5, 4, 3] if survivor == 5 else [6, 4, 3, 2])[:keep]
        else:  # a copy is not recognised as one, so the oldest may be lost
            assert kept in ([6, 5, 4, 3][:keep], [6, 4, 3, 2][:keep], [6, 4, 4, 3][:keep])
        if not killed:
            break
    # fsync, perhaps link and replace for the previous one, replace, fsync, unlinks: a kill in each of them
    assert k > 4 + 2 * (keep > 1)


def test_an_interrupt_anywhere_in_torchs_writer_leaves_the_old_one(tmp_path):
    """A second Ctrl-C, at every call of it. In another process: an error when torch frees its writer aborts that."""
    script = """
        import sys
        from pathlib import Path
        import torch
        from tests.train.checkpoints import make_checkpoint, saved_iterations
        from train import checkpoint

        folder, left = Path(sys.argv[1]), 0  # calls until the interrupt

        def interrupting(kind, *names):
            def method(name):
                def call(self, *args):
                    global left
                    left -= 1
                    if left == 0:
                        raise KeyboardInterrupt
                    return getattr(kind, name)(self, *args)

                return call

            return type(kind.__name__, (kind,), {name: method(name) for name in names})

        checkpoint.save(folder, make_checkpoint(1), keep=2)
        torch._C.PyTorchFileWriter = interrupting(torch._C.PyTorchFileWriter, "write_record", "write_end_of_file")
        checkpoint._Writer = interrupting(checkpoint._Writer, "write", "flush")
        for at in range(1, 1000):
            left = at
            try:
                checkpoint.save(folder, make_checkpoint(2), keep=2)
            except KeyboardInterrupt:
                assert saved_iterations(folder) == [1], at
                assert len(list(folder.iterdir())) == 1
            else:
                break
        assert 30 < at < 1000
        assert saved_iterations(folder) == [2, 1]
        """
    argv, env = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# A full disk


def test_full_disk(tmp_path):
    """Simulated by a limit on file sizes, in a separate process."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from train import checkpoint
        from train.errors import UserError

        folder = Path(sys.argv[1])
        args = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False, vocab_size=8, dropout=0.0)
        adamw = {"state": {}, "param_groups": [{"params": [0]}]}
        make = lambda i, n: checkpoint.pack({"w": torch.full((n,), float(i))}, adamw, args, i, 1.0, {}, {})
        checkpoint.save(folder / "second", make(1, 1000), keep=2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write returns EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        for name in ("first", "second"):
            for size in (26_000, 1_000_000):  # fails in the closing flush; fails in the middle of a tensor
                try:
                    checkpoint.save(folder / name, make(2, size), keep=2)
                except UserError as error:
                    print(error)
                else:
                    sys.exit("no error")
        """
    argv = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [(name, size) for name in ("first", "second") for size in ("0.10", "4.00")]
    for line, (name, size) in zip(done.stdout.splitlines(), cases, strict=True):
        assert f"out_dir={tmp_path / name}: no room for the checkpoint: it needs {size} MB" in line
        assert "MB are free (File too large)" in line
    assert os.listdir(tmp_path / "first") == []
    assert os.listdir(tmp_path / "second") == ["ckpt.pt"]
    assert checkpoint.load(tmp_path / "second" / "ckpt.pt")["iter_num"] == 1


def test_no_space_for_the_copy_of_the_previous_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make_checkpoint(1), keep=2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(UserError, match=r"no room for the checkpoint: .*No space left"):
        checkpoint.save(tmp_path, make_checkpoint(2), keep=2)
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert saved_iterations(tmp_path) == [1]


# An out_dir that is not empty


def test_set_aside_moves_what_a_run_wrote_and_nothing_else(tmp_path):
    assert checkpoint.set_aside(tmp_path) is None
    assert checkpoint.set_aside(tmp_path / "not there") is None
    for iteration in (1, 2):
        checkpoint.save(tmp_path, make_checkpoint(iteration), keep=2)
    for name in ("metrics.jsonl", "loss.png", "loss.svg", "notes.txt", "train_loss.png"):
        (tmp_path / name).write_text(name)
    folder = checkpoint.set_aside(tmp_path)
    assert folder.parent == tmp_path
    assert sorted(os.listdir(tmp_path)) == [folder.name, "notes.txt", "train_loss.png"]
    assert sorted(os.listdir(folder)) == ["ckpt-previous-1.pt", "ckpt.pt", "loss.png", "loss.svg", "metrics.jsonl"]
    assert saved_iterations(folder) == [2, 1]
    for text in ("second", "third"):  # of the same second
        (tmp_path / "metrics.jsonl").write_text(text)
        assert (checkpoint.set_aside(tmp_path) / "metrics.jsonl").read_text() == text
    assert len(list(tmp_path.glob("earlier-*"))) == 3
