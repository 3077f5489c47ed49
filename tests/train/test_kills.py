"""Kills of the whole command, at random instants and inside saves. Nothing is lost, and all bits are as without kills.

NANOFUSE_KILLS=50 makes 50 kills of each kind of run instead of 4. NANOFUSE_SEED=n makes other kills.
"""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.train.jobs import ROOT
from tests.train.runs import KILLED_JOB, iterations, records, run
from train import checkpoint

REFERENCE = 80  # iterations of the run without kills
KEEP, ALWAYS_SAVE = (1, 2, 3), (True, False)
ENDS = {  # how a run is ended: by which signal, whether inside a save, and the exit statuses that it may have
    "killed": (signal.SIGKILL, False, {-signal.SIGKILL}),
    "killed in a save": (signal.SIGKILL, True, {-signal.SIGKILL}),
    "terminated": (signal.SIGTERM, False, {143, -signal.SIGTERM}),  # before the loop begins, the system ends it
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
def test_kills_at_random_instants_and_inside_saves(tmp_path):
    numbers = [os.environ.get(f"NANOFUSE_{name}", default) for name, default in (("KILLS", "4"), ("SEED", "1"))]
    # A separate process. It imports torch once and forks a child for every run, so it must have no threads yet.
    driver = subprocess.run(
        [sys.executable, __file__, str(tmp_path), *numbers],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(driver.stdout)
    assert driver.returncode == 0, driver.stdout + driver.stderr


# The driver


def drive(folder: Path, kills: int, seed: int) -> None:
    print(f"seed {seed}, {kills} kills of each run")
    import torch._dynamo  # noqa: F401  AdamW's first step imports it: once here, not in every child

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    rng = random.Random(seed)
    expected, losses = reference(folder / "reference")
    inside = apart = 0
    for keep, always in itertools.product(KEEP, ALWAYS_SAVE):
        out_dir, saved = folder / f"out-{keep}-{always}", 0
        for end in rng.choices(list(ENDS), k=kills):
            stale = set(out_dir.glob(".staging-*"))
            settings = {"keep_checkpoints": keep, "always_save_checkpoint": always}
            if (out_dir / "ckpt.pt").exists():
                settings["init_from"] = "resume"
            child = start(out_dir, max_iters=10**6, **settings)
            status = end_it(child, out_dir, end, stale, rng)
            print(f"run of {keep}, {always}: {end}, status {status}; ckpt.pt had {saved}")
            assert status in ENDS[end][2], output(out_dir)
            inside += bool(set(out_dir.glob(".staging-*")) - stale)
            before, saved = saved, whole(out_dir, expected, losses)
            assert saved >= max(before, *iterations(out_dir, "save"), 0)
            assert ("interrupted after" in output(out_dir)) == (f"interrupted after {saved} " in output(out_dir))
            apart += (out_dir / "ckpt-best.pt").exists()
    print(f"{inside} inside a save; {apart} times the best one was another")
    assert inside
    assert apart


def reference(out_dir: Path) -> tuple[dict[int, str], dict[tuple[str, int], float]]:
    """Of a run without kills: iteration -> digest of its state, and its losses."""
    with mock.patch("train.checkpoint.save", lambda out_dir, state, *_, **__: print("state", digest(state))):
        child = start(out_dir, eval_interval=1, max_iters=REFERENCE)
    assert os.waitpid(child, 0)[1] == 0, output(out_dir)
    digests = [line.removeprefix("state ") for line in output(out_dir).splitlines() if line.startswith("state ")]
    return dict(enumerate(digests, start=1)), logged_losses(out_dir)


def logged_losses(out_dir: Path) -> dict[tuple[str, int], float]:
    """(kind, iteration) -> loss or validation loss. What several runs logged must be equal."""
    found: dict[tuple[str, int], float] = {}
    for record in records(out_dir):
        loss = record.get("val_loss", record.get("loss"))
        if loss is not None:
            assert found.setdefault((record["kind"], record["iter"]), loss) == loss
    return found


def whole(out_dir: Path, expected: dict[int, str], losses: dict[tuple[str, int], float]) -> int:
    """The iteration of ckpt.pt, 0 if there is none. All checkpoints and losses are those expected, where they are known
    of an iteration; the best checkpoint is the best of those evaluated."""
    for key, loss in logged_losses(out_dir).items():
        assert losses.get(key, loss) == loss
    if not (out_dir / "ckpt.pt").exists():
        return 0
    for path in out_dir.glob("ckpt*.pt"):
        found = checkpoint.load(path)
        assert expected.get(found["iter_num"], digest(found)) == digest(found), path
    latest = checkpoint.load(out_dir / "ckpt.pt")
    if latest["iter_num"] <= REFERENCE:
        judged = range(0, latest["nanofuse"]["judged_at"] + 1, KILLED_JOB["eval_interval"])
        best = min(judged, key=lambda iteration: losses["eval", iteration])
        assert latest["best_val_loss"] == losses["eval", best]
        assert best == 0 or checkpoint.held(checkpoint.best_of(out_dir)) == (best, losses["eval", best])
    return latest["iter_num"]


def digest(state: dict) -> str:
    """Of all weights and moments."""
    tensors = checkpoint.leaves([state["model"], state["optimizer"]["state"]])
    content = [x.numpy().tobytes() if isinstance(x, torch.Tensor) else repr(x).encode() for _, x in tensors]
    return hashlib.sha256(b"".join(content)).hexdigest()


def start(out_dir: Path, **settings) -> int:
    """Fork a child that trains and exits with the command's status. Returns its process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 99
    try:
        descriptor = os.open(f"{out_dir}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = run(out_dir, **settings)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end_it(child: int, out_dir: Path, end: str, stale: set[Path], rng: random.Random) -> int:
    """End a run, at a random instant or inside a save. Returns its exit status, or minus the signal that ended it."""

    def lives() -> bool:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    lines = len(records(out_dir))
    if rng.random() < 0.8:  # else while it starts
        while lives() and len(records(out_dir)) < lines + 3:
            time.sleep(1e-3)
    time.sleep(rng.expovariate(20))
    number, in_a_save, _ = ENDS[end]
    patience = time.monotonic() + 10  # if only the best is saved, there may be no other save
    while in_a_save and lives() and time.monotonic() < patience:
        with suppress(FileNotFoundError):  # a folder in which nothing was saved goes with its run
            if set(out_dir.glob(".staging-*")) - stale:
                break
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def output(out_dir: Path) -> str:
    return Path(f"{out_dir}.txt").read_text()


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
