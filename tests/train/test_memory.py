"""A run that does not fit into its device's memory is refused before it takes any, with settings that would fit."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import train.__main__ as command
from kernels import FUSED, REFERENCE
from model import GPTConfig
from model.recompute import MODES
from tests.train.runs import refusal, resume, run
from train.config import TrainConfig
from train.dryrun import Job, dry_run
from train.errors import UserError
from train.memory import advice, check_memory, free_memory
from train.settings import settings_of

GPT2 = Job(GPTConfig(vocab_size=50304, bias=False, dropout=0.0), 48, FUSED, accumulation=5, several=True)
JOB = dict(batch_size=8, block_size=64, n_embd=64)


def needed(job: Job, **changes) -> int:
    return dry_run(dataclasses.replace(job, **changes)).total


def with_room(monkeypatch: pytest.MonkeyPatch, room: int | None) -> None:
    monkeypatch.setattr(command, "free_memory", lambda device: room)


def test_what_is_free(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        8000000 kB\nMemFree:          100000 kB\nMemAvailable:    4000000 kB\n")
    assert free_memory(torch.device("cpu"), meminfo) == 4_096_000_000
    meminfo.write_text("MemTotal:        8000000 kB\n")
    assert free_memory(torch.device("cpu"), meminfo) is None
    assert free_memory(torch.device("cpu"), tmp_path / "none") is None
    assert free_memory(torch.device("mps"), meminfo) is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(loss_chunk=4096), "--loss_chunk=4096 fits"),
        (dict(recompute="mlp"), "--recompute=mlp fits"),
        (dict(recompute="block"), "--recompute=block fits"),
        (dict(loss_chunk=4096, recompute="block"), "--loss_chunk=4096 --recompute=block fits"),
        (dict(batch_size=8, accumulation=30), "--batch_size=8 --gradient_accumulation_steps=30 fits"),
        (dict(batch_size=1, accumulation=240), "--batch_size=1 --gradient_accumulation_steps=240 fits"),
    ],
)
def test_the_cheapest_change_that_fits(changes: dict, text: str) -> None:
    assert advice(GPT2, needed(GPT2, **changes), ranks=1) == text


def test_no_change_that_fits() -> None:
    held = dry_run(GPT2).memory
    state = sum(held[name] for name in ("weights", "copies", "moments", "gradients"))
    assert advice(GPT2, state, ranks=1) == "not even --batch_size=1 --recompute=block fits"


def test_accumulation_is_of_all_ranks() -> None:
    step = dataclasses.replace(GPT2, ops=REFERENCE)
    text = advice(step, needed(step, batch_size=6, accumulation=40), ranks=4)
    assert text == "--batch_size=6 --gradient_accumulation_steps=160 fits"


def test_state_that_outgrows_a_device_wants_several() -> None:
    large = Job(GPTConfig(vocab_size=50304, n_layer=48, n_head=25, n_embd=1600, dropout=0.0), 1, FUSED)
    assert advice(large, int(24e9), ranks=8) == "--shard=True fits"
    assert advice(large, int(24e9), ranks=1) == "not even --batch_size=1 --recompute=block fits"
    assert advice(large, int(1e9), ranks=8).endswith("fits, nor with --shard on 8 ranks")
    several = dataclasses.replace(large, batch_size=8)
    assert advice(several, int(24e9), ranks=8) == "--shard=True --recompute=mlp fits"
    assert advice(GPT2, needed(GPT2, recompute="mlp"), ranks=8) == "--recompute=mlp fits"  # the state is not the matter


def test_a_run_says_what_it_will_hold(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path / "out", max_iters=0)
    line = r"^memory: \d+\.\d (MB|GB) estimated: \w+ \d+\.\d(?:, \w+ \d+\.\d)+; cpu has \d+\.\d GB free$"
    assert len(re.findall(line, capsys.readouterr().out, re.MULTILINE)) == 1


def test_a_run_that_does_not_fit_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, 2_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(command, "place", None)
        message = refusal(run, tmp_path / "out", **JOB)
    found = re.fullmatch(
        r"memory: got a step of (\S+) MB \(weights .*\), expected at most (\S+) MB, what cpu has free; (--.*) fits",
        message,
    )
    assert found, message
    assert float(found[1]) > float(found[2])
    assert not (tmp_path / "out").exists()
    changed = dict(setting[2:].split("=") for setting in found[3].split())
    assert changed
    assert run(tmp_path / "out", **JOB | changed) == 0


def test_on_a_cpu_the_weights_of_a_checkpoint_are_there_already() -> None:
    job = Job(GPTConfig(vocab_size=50, block_size=64, n_layer=1, n_head=2, n_embd=64), 8, REFERENCE, on="cpu")
    total, weights = needed(job), dry_run(job).memory["weights"]
    for resumed, least in ((False, total), (True, total - weights)):
        step = dataclasses.replace(job, resumed=resumed)
        assert check_memory(step, "cpu", least, ranks=1)
        with pytest.raises(UserError, match="memory: got a step of"):
            check_memory(step, "cpu", least - 1, ranks=1)


def test_where_nobody_says_what_is_free_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with_room(monkeypatch, None)
    run(tmp_path / "out", max_iters=0)
    assert re.search(r"^memory: \S+ MB estimated: [^;]*$", capsys.readouterr().out, re.MULTILINE)


def test_the_setting_offers_every_mode() -> None:
    assert settings_of(TrainConfig)["recompute"].metadata["choices"] == MODES


def test_resumed_with_another_mode(tmp_path: Path) -> None:
    """Memory is no part of what was trained: a run that came to need more room goes on in less."""
    modes = []
    run(tmp_path / "out", at={0: lambda step: modes.append(step.model.recompute)}, recompute="mlp", max_iters=4)
    resume(tmp_path / "out", at={0: lambda step: modes.append(step.model.recompute)}, max_iters=6)
    resume(tmp_path / "out", at={0: lambda step: modes.append(step.model.recompute)}, recompute="block", max_iters=8)
    assert modes == ["mlp", "mlp", "block"]


def test_an_evaluation_alone_needs_no_room_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with_room(monkeypatch, 0)
    monkeypatch.setattr(torch, "compile", None)
    assert run(tmp_path / "out", eval_only=True, compile=True) == 0
    out = capsys.readouterr().out
    assert "memory:" not in out
    assert "compiling" not in out
    assert "step 0: train loss" in out
