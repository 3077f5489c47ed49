"""Kills of the whole command: SIGKILL ends `python -m train` many times, and the result is the same as without.

NANOFUSE_KILLS=50 makes 50 kills instead of 12. NANOFUSE_SEED=n makes other kills.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from tests.train.jobs import JOB, ROOT, make_data
from train import checkpoint
from train.__main__ import main
from train.log import read_metrics

# With dropout and accumulation, so that random state must survive too. A save every other iteration.
KILLED_JOB = JOB | dict(
    dropout=0.1,
    gradient_accumulation_steps=2,
    lr_decay_iters=1000,
    eval_interval=2,
    eval_iters=2,
    log_interval=1,
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
def test_kills_at_random_instants_and_inside_saves(tmp_path):
    kills = int(os.environ.get("NANOFUSE_KILLS", "12"))
    seed = int(os.environ.get("NANOFUSE_SEED", "1"))
    # A separate process. It imports torch once and forks a child for every run, so it must have no threads yet.
    driver = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(kills), str(seed)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(driver.stdout)
    assert driver.returncode == 0, driver.stdout + driver.stderr

    interrupted, reference = tmp_path / "interrupted", tmp_path / "reference"
    ends = [checkpoint.load(folder / "ckpt.pt") for folder in (interrupted, reference)]
    for name, tensor in ends[1]["model"].items():
        assert torch.equal(ends[0]["model"][name], tensor), name
    for index, moments in ends[1]["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(ends[0]["optimizer"]["state"][index][name], tensor), (index, name)
    for key in ("iter_num", "best_val_loss"):
        assert ends[0][key] == ends[1][key]

    # All records of all runs, to the bit, also those that a later run repeated.
    expected = losses(records(reference))
    written = records(interrupted)
    for key, values in losses(written).items():
        assert values <= expected[key], key
    assert len([r for r in written if r["kind"] == "run"]) > kills / 2  # most runs got far enough to start
    assert losses(read_metrics(interrupted / "metrics.jsonl")) == expected


def losses(lines: list[dict]) -> dict[tuple[str, int], set]:
    """(kind, iteration) -> the different losses written for it."""
    found: dict[tuple[str, int], set] = {}
    for line in lines:
        values = tuple(line[key] for key in ("loss", "grad_norm", "train_loss", "val_loss") if key in line)
        if values:
            found.setdefault((line["kind"], line["iter"]), set()).add(values)
    return found


def records(out_dir: Path) -> list[dict]:
    """Every whole line of metrics.jsonl. A kill may cut the last line of a run."""
    found = []
    path = out_dir / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


# The driver


def drive(folder: Path, kills: int, seed: int) -> None:
    print(f"seed {seed}, {kills} kills")
    import torch._dynamo  # noqa: F401  AdamW's first step imports it: once here, not in every child

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    rng = random.Random(seed)
    make_data(folder / "data")
    out_dir = folder / "interrupted"
    completed = inside = resumed = 0
    life = 0.0  # seconds that a run needed to make some saves on this machine
    for kill in range(kills):
        resume, stale = (out_dir / "ckpt.pt").exists(), set(out_dir.glob(".staging-*"))
        child, begin = start(out_dir, resume, max_iters=10**6), time.monotonic()
        aimed = kill % 2 == 0
        if aimed:
            await_saves(child, out_dir, completed, rng.randint(1, 5))
            life = time.monotonic() - begin
            kill_inside_a_save(child, out_dir)
        else:  # while it starts, loads, trains, evaluates or saves
            time.sleep(rng.uniform(0, 1.5 * life))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"run {kill} ended by itself:\n" + output(out_dir)
        inside += bool(set(out_dir.glob(".staging-*")) - stale)
        resumed += resume
        completed = last_save(out_dir)
        reached = checkpoint.load(out_dir / "ckpt.pt")["iter_num"] if completed else 0
        print(f"kill {kill}: {'aimed' if aimed else 'random'}, saved {completed}, checkpoint of {reached}")
        assert reached >= completed
        for path in out_dir.glob("ckpt-previous-*.pt"):
            checkpoint.load(path)
    assert inside >= kills // 2
    assert resumed >= kills // 2
    # Four more iterations without a kill; then the same job in one run.
    last = completed + 4
    finish(start(out_dir, True, last), out_dir)
    finish(start(folder / "reference", False, last), folder / "reference")
    print(f"{kills} kills, {inside} of them inside a save, {resumed} resumes; {last} iterations")


def start(out_dir: Path, resume: bool, max_iters: int) -> int:
    """Fork a child that runs `python -m train`. Returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        descriptor = os.open(f"{out_dir}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        init_from = "resume" if resume else "scratch"
        this = dict(out_dir=out_dir, dataset=out_dir.parent / "data", init_from=init_from, max_iters=max_iters)
        sys.argv = ["train", *(f"--{key}={value}" for key, value in (KILLED_JOB | this).items())]
        status = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def last_save(out_dir: Path) -> int:
    return max((r["iter"] for r in records(out_dir) if r["kind"] == "save"), default=0)


def assert_alive(child: int, out_dir: Path) -> None:
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    assert ended is None, "a run ended by itself:\n" + output(out_dir)


def await_saves(child: int, out_dir: Path, completed: int, count: int) -> None:
    while last_save(out_dir) < completed + count * KILLED_JOB["eval_interval"]:
        assert_alive(child, out_dir)
        time.sleep(5e-3)


def kill_inside_a_save(child: int, out_dir: Path) -> None:
    """Stop the child when a save begins. Kill it, unless the save ended in between."""
    while True:
        if not any(out_dir.glob(".staging-*")):
            assert_alive(child, out_dir)
            time.sleep(2e-4)
            continue
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        if any(out_dir.glob(".staging-*")):
            os.kill(child, signal.SIGKILL)
            return
        os.kill(child, signal.SIGCONT)


def finish(child: int, out_dir: Path) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, output(out_dir)


def output(out_dir: Path) -> str:
    return Path(f"{out_dir}.txt").read_text()


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
