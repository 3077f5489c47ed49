"""A run that does not fit into memory is refused before it takes any. The message names settings that fit."""

import dataclasses
import functools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

import train.__main__ as command
from kernels import FUSED, REFERENCE
from model import GPTConfig
from tests.train.runs import refusal, run
from train import memory, plan
from train.dryrun import Job, dry_run
from train.errors import UserError
from train.memory import advice, check_memory, free_memory

WIDE = Job(GPTConfig(1024, 320, n_layer=2, n_head=2, n_embd=128), 6, FUSED, accumulation=5, several=True)
ALONE = dataclasses.replace(WIDE, accumulation=1, several=False)
HALVED = dict(batch_size=3, accumulation=2, several=True)
LARGE = Job(GPTConfig(64, 320, n_layer=2, n_head=8, n_embd=512), 4, FUSED, several=True)  # a large state

kept = functools.cache(dry_run)  # on shapes, the same job gives the same numbers; each takes half a second


def test_what_is_free(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        8000000 kB\nMemFree:          100000 kB\nMemAvailable:    4000000 kB\n")
    cpu, none = torch.device("cpu"), tmp_path / "none"
    assert free_memory(cpu, meminfo, none) == 4_096_000_000
    (tmp_path / "memory.stat").write_text("anon 1000000000\nfile 900000000\nkernel 5000\n")
    for limit, free in (("3000000000\n", 2_000_000_000), ("max\n", 4_096_000_000)):  # a container's
        (tmp_path / "memory.max").write_text(limit)
        assert free_memory(cpu, meminfo, tmp_path) == free
    meminfo.write_text("MemTotal:        8000000 kB\n")
    assert free_memory(cpu, meminfo) is None
    assert free_memory(cpu, none) is None
    assert free_memory(torch.device("mps"), meminfo) is None


@pytest.mark.parametrize(
    ("job", "changes", "ranks", "text"),
    [
        (WIDE, dict(loss_chunk=4096), 1, "--loss_chunk=4096 fits"),
        (WIDE, dict(recompute="mlp"), 8, "--recompute=mlp fits"),  # the state is not the problem
        (WIDE, dict(batch_size=1, accumulation=30), 2, "--batch_size=1 --gradient_accumulation_steps=60 fits"),
        (ALONE, HALVED, 1, "--batch_size=3 --gradient_accumulation_steps=2 fits"),
        (LARGE, dict(shards=8), 8, "--shard=True fits"),
        (LARGE, dict(shards=8, recompute="mlp"), 8, "--shard=True --recompute=mlp fits"),
        (LARGE, dict(shards=8), 1, "not even --batch_size=1 --recompute=block fits"),
    ],
)
def test_the_cheapest_change_that_fits(job, changes, ranks, text, monkeypatch) -> None:
    """The room is what the step takes with these changes. The message gives the accumulation of all ranks."""
    monkeypatch.setattr(memory, "dry_run", kept)
    assert advice(job, kept(dataclasses.replace(job, **changes)).total, ranks) == text


def test_advice_for_a_huge_batch_tries_few_steps(monkeypatch) -> None:
    """2,520 has 48 divisors. Nor is a step of many chunks tried that would not fit with any."""
    tried = mock.Mock(side_effect=kept)
    monkeypatch.setattr(memory, "dry_run", tried)
    job = dataclasses.replace(WIDE, batch_size=2520)
    fitting = dataclasses.replace(job, batch_size=840, accumulation=15)
    assert advice(job, kept(fitting).total, 1) == "--batch_size=840 --gradient_accumulation_steps=15 fits"
    assert tried.call_count < 16
    tried.reset_mock()
    assert advice(job, 10**6, 8).endswith("nor with --shard on 8 ranks")
    assert tried.call_count < 16
    assert not any(call.args[0].loss_chunk for call in tried.call_args_list)


def test_a_run_that_does_not_fit_takes_nothing(tmp_path, monkeypatch, capsys) -> None:
    settings = dict(batch_size=8, block_size=64, n_embd=64)
    monkeypatch.setattr(plan, "free_memory", lambda device: 2_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(command, "make_state", None)  # nothing is built
        message = refusal(run, tmp_path / "out", **settings)
    found = re.fullmatch(
        r"memory: got a step of (\S+) MB \(weights .*\), expected at most (\S+) MB, what cpu has free; (--.*) fits",
        message,
    )
    assert found, message
    assert float(found[1]) > float(found[2])
    assert not (tmp_path / "out").exists()
    changed = dict(setting[2:].split("=") for setting in found[3].split())
    assert run(tmp_path / "out", **settings | changed, max_iters=0) == 0
    line = r"^memory: \d+\.\d MB estimated: \w+ \d+\.\d(?:, \w+ \d+\.\d)+; cpu has \d+\.\d MB free$"
    assert len(re.findall(line, capsys.readouterr().out, re.MULTILINE)) == 1
    # an evaluation alone needs no room to train
    monkeypatch.setattr(plan, "free_memory", lambda device: 0)
    monkeypatch.setattr(torch, "compile", None)
    assert run(tmp_path / "out", eval_only=True, compile=True) == 0
    out = capsys.readouterr().out
    assert "memory:" not in out
    assert "compiling" not in out


def test_on_a_cpu_the_weights_of_a_checkpoint_are_there_already() -> None:
    job = Job(GPTConfig(vocab_size=50, block_size=64, n_layer=1, n_head=2, n_embd=64), 8, REFERENCE, on="cpu")
    run = kept(job)
    for resumed, least in ((False, run.total), (True, run.total - run.memory["weights"])):
        step = dataclasses.replace(job, resumed=resumed)
        assert check_memory(step, "cpu", least, ranks=1)
        with pytest.raises(UserError, match="memory: got a step of"):
            check_memory(step, "cpu", least - 1, ranks=1)
