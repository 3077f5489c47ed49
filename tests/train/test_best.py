"""The best state survives whatever comes after it. `resume` takes the latest one, who reads weights the best one."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.train.checkpoints import assert_same
from tests.train.runs import iterations, last, logged, resume, run, send
from train.checkpoint import best_of, held, load
from train.export import main as export
from train.sample import main as sample

SAMPLE = ["--device=cpu", "--num_samples=1", "--max_new_tokens=2", "--start=a"]
ONLY_BEST = dict(always_save_checkpoint=False, eval_interval=2)
WORSE = dict(learning_rate=0.5, decay_lr=False, max_iters=100)  # every evaluation is worse than the best one


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The out_dir of a run whose best state is that of iteration 4, after it got worse up to iteration 7. Its name is
    not UTF-8, where the system takes such names: torch cannot map files there."""
    out_dir = tmp_path_factory.mktemp("runs") / ("café" if sys.platform == "darwin" else os.fsdecode(b"caf\xe9"))
    run(out_dir, max_iters=4, learning_rate=0.01, warmup_iters=0, lr_decay_iters=3, min_lr=0.0, **ONLY_BEST)
    assert resume(out_dir, at={2: send(signal.SIGINT)}, **WORSE) == 130
    assert held(best_of(out_dir)).iter_num == 4
    return out_dir


@pytest.fixture
def out(tmp_path: Path, worse: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(worse, tmp_path / "out")


def test_the_best_survives_interruptions_and_is_read(tmp_path, out, capsys):
    best = held(out / "ckpt.pt").best_val_loss
    for iteration in (7, 8):
        assert held(out / "ckpt.pt") == (iteration, best)
        assert resume(out, at={0: send(signal.SIGTERM)}) == 143
        said = capsys.readouterr().out
        assert f"iteration {iteration}; best validation loss {best:.4f}, of iteration 4\n" in said
    assert load(out / "ckpt-best.pt")["iter_num"] == 4

    sample(SAMPLE)
    assert "out/ckpt-best.pt, iteration 4: " in capsys.readouterr().err
    export(["--to=hf"])
    assert "hf: iteration 4 of out/ckpt-best.pt, written" in capsys.readouterr().out
    run(tmp_path / "new", init_from=out, eval_only=True)
    assert f"weights of {out / 'ckpt-best.pt'}, iteration 4\n" in capsys.readouterr().out
    assert resume(out, max_iters=9) == 0
    said = capsys.readouterr().out
    assert f"checkpoint: {out / 'ckpt.pt'}, iteration 9\n" in said
    assert f"best:       {out / 'ckpt-best.pt'}, iteration 4\n" in said


def test_nanogpts_checkpoint_is_the_best_if_it_says_so(out):
    """nanoGPT saves only the best if so set."""
    theirs = load(out / "ckpt-best.pt")
    torch.save({k: v for k, v in theirs.items() if k != "nanofuse"}, out / "ckpt.pt")
    # what a kill between moves 5 and 6 leaves
    torch.save(theirs | {"iter_num": 2, "best_val_loss": 9.0}, out / "ckpt-best.pt")
    assert resume(out, at={1: send(signal.SIGINT)}, **WORSE) == 130
    assert last(out)["iter_num"] == 6
    assert held(out / "ckpt-best.pt") == (4, theirs["best_val_loss"])


def test_a_best_loss_that_no_file_holds_is_forgotten(out, capsys):
    (out / "ckpt-best.pt").unlink()
    assert resume(out, max_iters=9) == 0
    assert "starts again: no file holds the best state" in capsys.readouterr().out
    assert iterations(out, "eval")[-3:] == [6, 8, 9]
    since = {n: logged(out, "eval")[n]["val_loss"] for n in (8, 9)}  # ckpt.pt was of iteration 7
    best = min(since, key=since.get)
    assert held(best_of(out)) == (best, since[best])


def test_the_best_survives_a_return_to_an_earlier_checkpoint(tmp_path):
    """What comes of it is worse, also at the iteration that was the best."""
    out, settings = tmp_path / "out", dict(eval_interval=2, keep_checkpoints=4)
    run(out, max_iters=6, decay_lr=False, **settings)
    resume(out, learning_rate=0.5, max_iters=8)
    best = held(out / "ckpt-best.pt")
    assert best.iter_num == 6
    weights = load(out / "ckpt-best.pt")["model"]
    shutil.copy(out / "ckpt-previous-2.pt", out / "ckpt.pt")
    for end in (6, 8):  # the first one ends with a checkpoint of the same iteration as the best one
        resume(out, learning_rate=0.5, max_iters=end)
        assert iterations(out, "save")[-1] == end
        assert held(best_of(out)) == best
    assert_same(load(best_of(out))["model"], weights)
