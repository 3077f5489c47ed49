"""How a run ends: done, out of time, interrupted, or with a loss that is not finite. Its folder is its own."""

import errno
import itertools
import os
import pickle
import runpy
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.train.jobs import CHARS, make_data
from tests.train.runs import iterations, last, poison, refusal, resume, run, send
from train import files
from train.errors import UserError
from train.files import owned
from train.sample import main as sample
from train.step import TrainStep


def test_eval_only_evaluates_once_and_changes_nothing(tmp_path, capsys):
    out_dir = tmp_path / "out"
    run(out_dir, max_iters=2)
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    capsys.readouterr()
    assert resume(out_dir, eval_only=True, max_iters=100) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("step 2: ")]) == 1
    assert not [line for line in lines if line.startswith(("iter", "saving"))]
    assert run(out_dir, eval_only=True, profile=True) == 0  # of a new model: the earlier run stays all the same
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before
    assert run(tmp_path / "new", eval_only=True) == 0
    assert not (tmp_path / "new").exists()


def test_max_minutes_evaluates_and_saves(tmp_path, monkeypatch, capsys):
    """On a clock that moves by 25 s from one look to the next."""
    monkeypatch.setattr("train.loop.time", mock.Mock(wraps=time, monotonic=itertools.count(step=25).__next__))
    assert run(tmp_path / "out", max_iters=100, max_minutes=1.0, eval_interval=50) == 0
    assert iterations(tmp_path / "out", "iter") == [0, 1, 2]
    assert iterations(tmp_path / "out", "eval") == [0, 3]
    assert last(tmp_path / "out")["iter_num"] == 3
    assert "max_minutes=1 have passed" in capsys.readouterr().out
    assert resume(tmp_path / "out", max_iters=5) == 0  # max_minutes is for each run, not in total
    assert iterations(tmp_path / "out", "iter") == [0, 1, 2, 3, 4]


def test_a_second_interrupt_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", at={3: send(signal.SIGINT, signal.SIGINT)}, eval_interval=2)
    assert iterations(tmp_path / "out", "iter") == [0, 1, 2]
    assert last(tmp_path / "out")["iter_num"] == 2


@pytest.mark.parametrize(
    ("end", "log_interval"),
    [("logged", 1), ("evaluated", 100), ("signal", 100), ("in float16", 1), ("by the last update", 1)],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path, monkeypatch, log_interval, end):
    """The message names the iteration of this loss, even if losses are read much later."""
    at = {4: poison} | ({5: send(signal.SIGTERM)} if end == "signal" else {})
    late = end == "by the last update"  # all losses of steps are finite, those of the last evaluation are not
    if late:
        at = {4: lambda step: step.optimizer.flat.exp_avg.fill_(float("nan"))}
    settings = dict(eval_interval=3, max_iters=5 if late or end == "evaluated" else 100, log_interval=log_interval)
    if end == "in float16":  # where gradients may be infinite
        monkeypatch.setattr("train.plan.resolve_dtype", lambda name, device: torch.float16)
    message = refusal(run, tmp_path / "out", at, status=1, **settings)
    assert f"loss: got nan at iteration {4 + late}" in message
    assert last(tmp_path / "out")["iter_num"] == 3
    assert all(tensor.isfinite().all() for tensor in last(tmp_path / "out")["model"].values())
    assert iterations(tmp_path / "out", "save") == [3]
    assert iterations(tmp_path / "out", "eval") == [0, 3] + [5] * late


def test_a_device_without_memory_ends_the_run_with_one_line(tmp_path):
    def takes_all(step: TrainStep) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    said = refusal(run, tmp_path / "out", {1: takes_all}, status=1)
    assert said.startswith("memory: CUDA out of memory. Tried to allocate 2.00 GiB.; a smaller --batch_size, ")


def test_data_that_fails_costs_no_iteration(tmp_path):
    def cut(step) -> None:
        os.truncate(tmp_path / "data" / "train.bin", 100)

    message = refusal(run, tmp_path / "out", {5: cut}, max_iters=1000, eval_interval=1000)
    assert "train.bin: 100 bytes, expected 6,000: it was cut short under the run" in message
    assert last(tmp_path / "out")["iter_num"] > 5
    assert iterations(tmp_path / "out", "iter")[-1] == last(tmp_path / "out")["iter_num"] - 1


def test_tokens_that_are_not_understood_cost_the_sample_alone(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    (data / "meta.json").unlink()
    words = [f"word{i}" for i in range(len(CHARS))]
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(words), "itos": words}))
    assert run(tmp_path / "out", max_iters=2) == 0
    said = capsys.readouterr().out
    assert "no sample of text: tokenizer: the dataset's is not known (no table of characters in" in said
    assert resume(tmp_path / "out", max_iters=4) == 0
    with pytest.raises(UserError, match="tokenizer: the dataset's is not known"):
        sample([f"--out_dir={tmp_path / 'out'}", "--device=cpu"])


# The folder


def test_an_earlier_run_is_moved_aside_whole_and_nothing_else(tmp_path, capsys):
    run(tmp_path / "out", max_iters=4)
    for name in ("loss.png", "loss.svg", "trace.json", "notes.txt", "train_loss.png"):
        (tmp_path / "out" / name).write_text(name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name in ("tensorboard", "notes"):
        (tmp_path / "out" / name).mkdir()
    theirs = {name: files.pop(name) for name in ("notes.txt", "train_loss.png")}
    run(tmp_path / "out", max_iters=2, seed=2)
    (aside,) = (tmp_path / "out").glob("earlier-*")
    assert (aside / "tensorboard").is_dir()
    assert {path.name: path.read_bytes() for path in aside.iterdir() if path.is_file()} == files
    assert {name: (tmp_path / "out" / name).read_bytes() for name in theirs} == theirs
    assert (tmp_path / "out" / "notes").is_dir()
    assert f"the earlier run in {tmp_path / 'out'} was moved to {aside}" in capsys.readouterr().out
    assert last(tmp_path / "out")["iter_num"] == 2
    assert iterations(tmp_path / "out", "iter") == [0, 1]


def test_an_earlier_run_is_named_where_the_new_one_saved_nothing(tmp_path):
    run(tmp_path / "out", max_iters=4)
    run(tmp_path / "out", max_iters=0)
    (aside,) = (tmp_path / "out").glob("earlier-*")
    assert f"; an earlier run, of iteration 4, is there: --out_dir={aside}" in refusal(resume, tmp_path / "out")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    out_dir = tmp_path / "out"
    run(out_dir, max_iters=4)

    def second(step) -> None:
        before = {path: path.read_bytes() for path in out_dir.iterdir()}
        for again in (run, resume):
            message = refusal(again, out_dir)
            assert f"out_dir: {out_dir} belongs to a run that has not ended" in message
            assert again(out_dir, eval_only=True) == 0  # it only reads
        assert {path: path.read_bytes() for path in out_dir.iterdir()} == before

    resume(out_dir, at={1: second}, max_iters=6)
    assert iterations(out_dir, "iter") == list(range(6))
    assert not list(out_dir.glob("earlier-*"))
    assert resume(out_dir, max_iters=7) == 0  # the first one has let go


@pytest.mark.parametrize("windows", [True, False])
def test_without_locks_nothing_is_held(windows, tmp_path, monkeypatch):
    if windows:  # it has neither, and opens no folder
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.delattr(os, "O_NONBLOCK")
        monkeypatch.setattr("train.files._opened", None)
        monkeypatch.setattr("train.files.fcntl", runpy.run_path(files.__file__)["fcntl"])
    else:
        monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with owned(tmp_path / "out"):
        assert run(tmp_path / "out", max_iters=2) == 0


def test_without_locks_a_curve_that_is_drawn_leaves_a_save_alone(tmp_path, monkeypatch):
    """`train.plot` writes into the folder that a run saves to. What a kill left is deleted a day later."""
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    (tmp_path / "loss.png").write_bytes(b"")
    with files.staging_folder(tmp_path) as saving:
        (saving / "ckpt.pt").write_bytes(b"half")
        for hours, there in ((12, True), (48, False)):
            for path in (saving / "ckpt.pt", saving):
                os.utime(path, (0, time.time() - 3600 * hours))
            with files.replacing(tmp_path / "loss.png") as file:
                file.write(b"drawn")
            assert saving.exists() == there


@pytest.mark.parametrize("held", [True, False])
def test_a_folder_that_another_process_takes_for_an_old_one_is_made_again(tmp_path, monkeypatch, held):
    """Two programs write into one folder. The first one cleans up just when the second has made its own."""
    make, made = files.tempfile.mkdtemp, []

    def taken(*args, **kwargs):
        made.append(make(*args, **kwargs))
        if len(made) == 1 and held:
            other.enter_context(files._locked(Path(made[0])))
        elif len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(files.tempfile, "mkdtemp", taken)
    with ExitStack() as other, files.replacing(tmp_path / "loss.png") as file:
        file.write(b"drawn")
    assert len(made) == 2
    assert os.listdir(tmp_path) == ["loss.png"]
