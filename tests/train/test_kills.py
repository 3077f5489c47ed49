"""Kills of the whole command, at random instants and inside saves. Nothing is lost; all bits are as without kills."""

import functools
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.train.jobs import ROOT
from tests.train.runs import KILLED_JOB, iterations, records, run
from train import checkpoint

REFERENCE = 80  # iterations of the run without kills
ENDS = {  # how a run is ended: by which signal, whether inside a save, and the exit statuses that it may have
    "killed": (signal.SIGKILL, False, {-signal.SIGKILL}),
    "killed in a save": (signal.SIGKILL, True, {-signal.SIGKILL}),
    "terminated": (signal.SIGTERM, False, {143, -signal.SIGTERM}),  # before the loop begins, the system ends it
}


@pytest.mark.slow
def test_kills_at_random_instants_and_inside_saves(tmp_path, request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    digests = [""]
    with mock.patch("train.checkpoint.save", lambda out_dir, state, keep, again: digests.append(digest(state))):
        run(tmp_path / "reference", eval_interval=1, max_iters=REFERENCE)
    losses, rng = logged_losses(tmp_path / "reference"), random.Random(1)
    inside = apart = 0
    for keep, always in ((1, True), (2, False), (3, True)):
        out_dir, saved = tmp_path / f"out-{keep}", 0
        for end in rng.choices(list(ENDS), k=6):
            stale = set(out_dir.glob(".staging-*"))
            status, said = run_until(end, out_dir, stale, rng, keep_checkpoints=keep, always_save_checkpoint=always)
            assert status in ENDS[end][2], said
            inside += bool(set(out_dir.glob(".staging-*")) - stale)
            before, saved = saved, whole(out_dir, digests, losses)
            assert saved >= max(before, *iterations(out_dir, "save"), 0)
            assert ("interrupted after" in said) == (f"interrupted after {saved} " in said)
            apart += (out_dir / "ckpt-best.pt").exists()
    assert inside
    assert apart


def run_until(end: str, out_dir: Path, stale: set[Path], rng: random.Random, **settings) -> tuple[int, str]:
    """Train, and end it at a random instant or inside a save. Returns its exit status and what it said."""
    named = KILLED_JOB | {"out_dir": out_dir, "dataset": out_dir.parent / "data", "max_iters": 10**6} | settings
    if (out_dir / "ckpt.pt").exists():
        named["init_from"] = "resume"
    argv = [sys.executable, "-m", "train", *(f"--{name}={value}" for name, value in named.items())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = out_dir.with_suffix(".txt")
    with output.open("w") as file:
        process = subprocess.Popen(argv, cwd=out_dir.parent, env=environment, stdout=file, stderr=file)
    lines = len(records(out_dir))
    while process.poll() is None and len(records(out_dir)) < lines + 3:
        time.sleep(1e-3)
    time.sleep(rng.expovariate(20))
    number, in_a_save, _ = ENDS[end]
    patience = time.monotonic() + 10  # if only the best is saved, there may be no other save
    while in_a_save and process.poll() is None and time.monotonic() < patience:
        with suppress(FileNotFoundError):  # a folder in which nothing was saved goes with its run
            if set(out_dir.glob(".staging-*")) - stale:
                break
    process.send_signal(number)
    return process.wait(), output.read_text()


def logged_losses(out_dir: Path) -> dict[tuple[str, int], float]:
    """(kind, iteration) -> loss or validation loss. What several runs logged must be equal."""
    found: dict[tuple[str, int], float] = {}
    for record in records(out_dir):
        loss = record.get("val_loss", record.get("loss"))
        if loss is not None:
            assert found.setdefault((record["kind"], record["iter"]), loss) == loss
    return found


def whole(out_dir: Path, digests: list[str], losses: dict[tuple[str, int], float]) -> int:
    """The iteration of ckpt.pt, 0 if there is none. All checkpoints and losses are those expected, where they are known
    of an iteration; the best checkpoint is the best of those evaluated."""
    for key, loss in logged_losses(out_dir).items():
        assert losses.get(key, loss) == loss
    if not (out_dir / "ckpt.pt").exists():
        return 0
    for path in out_dir.glob("ckpt*.pt"):
        found = checkpoint.load(path)
        assert found["iter_num"] > REFERENCE or digests[found["iter_num"]] == digest(found), path
    latest = checkpoint.load(out_dir / "ckpt.pt")
    if latest["iter_num"] <= REFERENCE:
        judged = range(0, latest["nanofuse"]["judged_at"] + 1, KILLED_JOB["eval_interval"])
        best = min(judged, key=lambda iteration: losses["eval", iteration])
        assert latest["best_val_loss"] == losses["eval", best]
        assert best == 0 or checkpoint.held(checkpoint.best_of(out_dir)) == (best, losses["eval", best])
    return latest["iter_num"]


def digest(state: dict) -> str:
    """Of all weights and moments."""
    leaves = tree_leaves([state["model"], state["optimizer"]["state"]])
    content = [x.numpy().tobytes() if isinstance(x, torch.Tensor) else repr(x).encode() for x in leaves]
    return hashlib.sha256(b"".join(content)).hexdigest()
