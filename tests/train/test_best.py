"""The best state survives whatever comes after it. `resume` takes the latest one, who reads weights the best one."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.train.runs import iterations, last, logged, resume, run, send
from train.checkpoint import best_of, held, load
from train.errors import UserError
from train.export import main as export
from train.sample import main as sample

SAMPLE = ["--device=cpu", "--num_samples=1", "--max_new_tokens=2", "--start=a"]
ONLY_BEST = dict(always_save_checkpoint=False, eval_interval=2)
WORSE = dict(learning_rate=0.5, decay_lr=False, max_iters=100)  # every evaluation is worse than the best one


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a run whose best state is that of iteration 4, when it was saved, and when it got worse up to iteration 7."""
    best = tmp_path_factory.mktemp("runs") / "best"
    run(best, max_iters=4, learning_rate=0.01, warmup_iters=0, lr_decay_iters=3, min_lr=0.0, **ONLY_BEST)
    assert held(best_of(best)).iter_num == last(best)["iter_num"] == 4
    worse = shutil.copytree(best, best.parent / "worse")
    assert resume(worse, at={2: send(signal.SIGINT)}, **WORSE) == 130
    return best, worse


@pytest.fixture
def out(tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the worse one, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(folders[1], tmp_path / "out")


def test_the_best_survives_interruptions_and_is_read(tmp_path, out, capsys):
    best = held(out / "ckpt.pt").best_val_loss
    for iteration in (7, 8, 9):
        assert held(out / "ckpt.pt") == (iteration, best)
        assert resume(out, at={0: send(signal.SIGTERM)}) == 143
        said = capsys.readouterr().out
        assert f"iteration {iteration}; best validation loss {best:.4f}, of iteration 4\n" in said
    assert last(out)["iter_num"] == 10
    assert load(out / "ckpt-best.pt")["iter_num"] == 4

    sample(SAMPLE)
    assert "out/ckpt-best.pt, iteration 4: " in capsys.readouterr().err
    export(["--to=hf"])
    assert "hf: iteration 4 of out/ckpt-best.pt, written" in capsys.readouterr().out
    run(tmp_path / "new", init_from=out, eval_only=True)
    assert f"weights of {out / 'ckpt-best.pt'}, iteration 4\n" in capsys.readouterr().out
    assert resume(out, max_iters=10) == 0
    said = capsys.readouterr().out
    assert f"checkpoint: {out / 'ckpt.pt'}, iteration 10\n" in said
    assert f"best:       {out / 'ckpt-best.pt'}, iteration 4\n" in said


def test_a_better_one_replaces_it(tmp_path):
    run(tmp_path / "out", at={3: send(signal.SIGINT)}, max_iters=100, **ONLY_BEST)
    assert held(best_of(tmp_path / "out")).iter_num == 2
    assert last(tmp_path / "out")["iter_num"] == 4
    resume(tmp_path / "out", max_iters=6, learning_rate=0.05, decay_lr=False)
    evaluations = {n: record["val_loss"] for n, record in logged(tmp_path / "out", "eval").items()}
    best = min(evaluations, key=evaluations.get)
    assert best > 2
    assert held(best_of(tmp_path / "out")) == (best, evaluations[best])


@pytest.mark.parametrize("nanogpt", [False, True])
def test_a_checkpoint_alone_is_the_best_if_it_says_so(tmp_path, folders, nanogpt):
    """Copied alone, or made by nanoGPT, which saves only the best if so set."""
    best = last(folders[0])
    (tmp_path / "out").mkdir()
    shutil.copy(folders[0] / "ckpt.pt", tmp_path / "out")
    if nanogpt:
        torch.save({k: v for k, v in best.items() if k != "nanofuse"}, tmp_path / "out" / "ckpt.pt")
    assert resume(tmp_path / "out", at={1: send(signal.SIGINT)}, **WORSE) == 130
    assert last(tmp_path / "out")["iter_num"] == 6
    assert held(tmp_path / "out" / "ckpt-best.pt") == (4, best["best_val_loss"])


def test_a_best_loss_that_no_file_holds_is_forgotten(out, capsys):
    (out / "ckpt-best.pt").unlink()
    assert resume(out, max_iters=9) == 0
    assert "starts again: no file holds the best state" in capsys.readouterr().out
    assert iterations(out, "eval")[-3:] == [6, 8, 9]
    since = {n: logged(out, "eval")[n]["val_loss"] for n in (8, 9)}  # ckpt.pt was of iteration 7
    best = min(since, key=since.get)
    assert held(best_of(out)) == (best, since[best])


def test_a_damaged_best_is_not_read_and_the_advice_works(out, capsys):
    path = out / "ckpt-best.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # within a tensor
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"; ckpt\.pt, of iteration 7, is whole: `mv") as refused:
        sample(SAMPLE)
    subprocess.run(str(refused.value).split("`")[1], shell=True, check=True)
    sample(SAMPLE)
    assert "ckpt.pt, iteration 7: " in capsys.readouterr().err
