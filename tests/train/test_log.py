"""The two console lines, metrics.jsonl after kills and resumes, and the optional sinks, replaced by fakes."""

import dataclasses
import json
import os
import re
import resource
import sys
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest

from train.config import TrainConfig
from train.errors import UserError
from train.log import METRICS, RunLog, read_metrics, say


@pytest.fixture
def start(tmp_path):
    """Start a RunLog in tmp_path/out."""

    def start(resume_iter=None, **settings):
        config = TrainConfig(out_dir=str(tmp_path / "out"), **settings)
        return RunLog(config, resume_iter=resume_iter, device="AMD EPYC", parameters=123)

    start.path = tmp_path / "out" / METRICS
    return start


def log_iteration(log, iter_num, loss=1.0, mfu=0.5):
    log.iteration(iter_num, loss=loss, seconds=0.1, mfu=mfu, lr=1e-3, grad_norm=0.7, tokens_per_second=7680.0)


def losses(records):
    return {record["iter"]: record["loss"] for record in records if record["kind"] == "iter"}


def test_the_lines_and_the_records(start, capsys):
    log = start()
    log.iteration(5000, loss=0.82361, seconds=0.033219, mfu=0.11071, lr=1e-4, grad_norm=1.0, tokens_per_second=4.9e5)
    log.evaluation(5000, train_loss=0.62238, val_loss=1.70441, lr=1e-4, seconds=4.4)
    say("a\x1b[31m\nb")
    log.saved(5000, seconds=0.3)
    log_iteration(log, 5001, loss=float("nan"), mfu=float("inf"))
    assert capsys.readouterr().out.splitlines() == [
        "iter 5000: loss 0.8236, time 33.22ms, mfu 11.07%",
        "step 5000: train loss 0.6224, val loss 1.7044",
        "a\\x1b[31m",
        "b",
        "iter 5001: loss nan, time 100.00ms, mfu inf%",
    ]
    # all of it is on the disk at once, and strict JSON
    run, *records = (json.loads(line, parse_constant=pytest.fail) for line in start.path.read_text().splitlines())
    facts = {"kind": "run", "iter": 0, "resumed": False, "device": "AMD EPYC", "parameters": 123}
    settings = dataclasses.asdict(TrainConfig(out_dir=str(start.path.parent)))
    assert run == facts | {"settings": settings} | {key: run[key] for key in ("time", "torch", "triton")}
    assert run["torch"].startswith("2.")
    numbers = dict(loss=0.82361, seconds=0.033219, mfu=0.11071, lr=1e-4, grad_norm=1.0, tokens_per_second=4.9e5)
    assert records[:3] == [
        {"kind": "iter", "iter": 5000} | numbers,
        {"kind": "eval", "iter": 5000, "train_loss": 0.62238, "val_loss": 1.70441, "lr": 1e-4, "seconds": 4.4},
        {"kind": "save", "iter": 5000, "seconds": 0.3},
    ]
    assert (records[3]["loss"], records[3]["mfu"], records[3]["seconds"]) == (None, None, 0.1)


def test_resuming_forgets_what_was_past_the_checkpoint_and_counts_once_what_is_done_again(start):
    log = start()
    for i in range(6):
        log_iteration(log, i, loss=float(i))
    log.evaluation(3, train_loss=1.0, val_loss=2.0, lr=0.0, seconds=1.0)
    log = start(resume_iter=3)  # killed after 5, checkpoint at 3; now every second iteration is logged
    log.evaluation(3, train_loss=1.0, val_loss=2.5, lr=0.0, seconds=1.0)
    for i in (4, 6):
        log_iteration(log, i, loss=10.0 + i)
    records = read_metrics(start.path)
    assert losses(records) == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 14.0, 6: 16.0}
    assert [record["val_loss"] for record in records if record["kind"] == "eval"] == [2.5]
    assert [record["kind"] for record in records] == ["run", *["iter"] * 4, "run", "eval", "iter", "iter"]


@pytest.mark.parametrize(("cut", "left"), [(1, 3), (2, 2), (120, 2), (350, 0)])  # bytes; a line has 120
def test_a_kill_inside_a_line_costs_that_line_alone(start, cut, left):
    log = start()
    for i in range(3):
        log_iteration(log, i, loss=float(i))
    start.path.write_bytes(start.path.read_bytes()[:-cut])
    log_iteration(start(resume_iter=2), 3, loss=3.0)
    with start.path.open("ab") as file:  # nor does what is no record
        file.write(b'[]\n3\nnull\n\xff\n{"kind": "iter"}\n{"kind": "iter", "iter": 1e999}\n' + b"[" * 10**5)
    assert losses(read_metrics(start.path)) == {i: float(i) for i in (*range(left), 3)}


@contextmanager
def room(size):
    """Inside, no file may grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "put",
    [
        lambda path: path.parent.touch(),
        lambda path: path.mkdir(parents=True),
        lambda path: path.parent.mkdir() or os.mkfifo(path),
        lambda path: room(100),
    ],
)
def test_what_cannot_be_written(start, put):
    said = pytest.raises(UserError, match=r"^out_dir: cannot write .*metrics.jsonl: [A-Za-z ]+$")
    with put(start.path) or nullcontext(), said:
        start(resume_iter=0)


def test_outputs_that_fail_under_the_run_do_not_end_it(start, monkeypatch, capsys):
    broken = mock.Mock()
    for package in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, broken)
    log = start(wandb_log=True, tensorboard_log=True)
    broken.log.side_effect = broken.finish.side_effect = OSError
    broken.SummaryWriter().add_scalar.side_effect = broken.SummaryWriter().close.side_effect = OSError
    with room(start.path.stat().st_size + 3):  # what a disk that is nearly full takes of a line
        log_iteration(log, 0)
        log_iteration(log, 1)
    log_iteration(log, 2)
    log.close()
    said = re.findall(r"(\S+): cannot be written", capsys.readouterr().out)
    assert said == [str(start.path), "wandb", "TensorBoard"]  # once each
    assert list(losses(read_metrics(start.path))) == [0, 1, 2]


def test_wandb_gets_nanogpts_keys_and_tensorboard_the_same_curves(start, monkeypatch):
    wandb, tensorboard = mock.Mock(), mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    settings = dict(wandb_log=True, wandb_project="owt", wandb_run_name="mine", tensorboard_log=True)
    log = start(resume_iter=20, **settings)
    config = dataclasses.asdict(TrainConfig(out_dir=str(start.path.parent), **settings))
    wandb.init.assert_called_once_with(project="owt", name="mine", config=config)
    tensorboard.SummaryWriter.assert_called_once_with(str(start.path.parent / "tensorboard"), purge_step=20)
    log.evaluation(20, train_loss=4.2, val_loss=4.3, lr=0.0, seconds=1.0)
    log_iteration(log, 30, loss=3.0, mfu=0.25)
    log.evaluation(40, train_loss=2.2, val_loss=2.3, lr=1e-3, seconds=1.0)
    log.close()
    first, iteration, second = (call.args[0] for call in wandb.log.call_args_list)
    assert first == {"iter": 20, "train/loss": 4.2, "val/loss": 4.3, "lr": 0.0}
    assert second == {"iter": 40, "train/loss": 2.2, "val/loss": 2.3, "lr": 1e-3, "mfu": 25.0}
    assert (iteration["iter"], iteration["loss"], iteration["mfu"]) == (30, 3.0, 25.0)
    curves = [call.args for call in tensorboard.SummaryWriter().add_scalar.call_args_list]
    sent = (first, iteration, second)
    assert curves == [(name, values[name], values["iter"]) for values in sent for name in values if name != "iter"]
    wandb.finish.assert_called_once_with()
    tensorboard.SummaryWriter().close.assert_called_once_with()
