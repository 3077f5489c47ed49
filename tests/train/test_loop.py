"""The loop: the learning rate, and what it logs, evaluates, saves and times."""

import dataclasses
import functools
import math
import re
import signal
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train.__main__ as command
from model import GPTConfig
from model.pretrained import from_checkpoint
from model.work import flops_per_token
from tests.train.runs import CONSTANT, iterations, last, logged, records, run
from tests.train.tape import tape
from train.config import TrainConfig
from train.data import Dataset, Loader
from train.graph import GraphedStep, Task, Work
from train.loop import Loop, learning_rate
from train.state import TrainState
from train.step import TrainStep


def nanogpts_rate(n: int, warmup: int, decay: int, high: float, low: float) -> float:
    """Up to `high` in warmup + 1 equal steps, then down by the half-angle form of the cosine."""
    if n < warmup:
        return high - high * (warmup - n) / (warmup + 1)
    if n > decay or warmup == decay:
        return low
    return low + (high - low) * math.cos(math.pi / 2 * (n - warmup) / (decay - warmup)) ** 2


rates = st.floats(0, 1)


@given(warmup=st.integers(0, 3000), length=st.integers(-4000, 10**6), high=rates, low=rates, part=st.floats(0, 1))
def test_the_learning_rate_is_nanogpts_formula_at_every_corner(warmup, length, high, low, part):
    """Also where the warmup is longer than the decay, as in nanoGPT's recipe for a CPU. It comes first."""
    decay = max(warmup + length, 0)
    config = TrainConfig(warmup_iters=warmup, lr_decay_iters=decay, learning_rate=high, min_lr=low)
    constant = dataclasses.replace(config, decay_lr=False)
    corners = {0, 1, warmup // 2, warmup, (warmup + decay) // 2, decay, 2 * decay, warmup + int(part * length)}
    for n in sorted({max(c + d, 0) for c in corners for d in (-1, 0, 1)}):
        rate = learning_rate(n, config)
        assert rate == pytest.approx(nanogpts_rate(n, warmup, decay, high, low), rel=1e-9, abs=1e-12)
        assert 0 <= rate <= max(high, low) * (1 + 1e-12)
        assert learning_rate(n, constant) == high


def test_an_evaluation_is_the_mean_of_its_batches_without_dropout(tmp_path):
    run(tmp_path / "out", max_iters=2, dropout=0.5, eval_iters=3, **CONSTANT)
    evaluations = logged(tmp_path / "out", "eval")
    assert evaluations[0] == evaluations[2] | {"iter": 0}  # the same weights and batches, no dropout masks
    model = from_checkpoint(last(tmp_path / "out")).eval()
    with Loader(Dataset(tmp_path / "data"), batch_size=2, block_size=16) as loader:
        for split in ("train", "val"):
            batches = [loader.evaluation(split, k) for k in range(3)]
            losses = [model(batch.x[0], batch.y[0])[1].item() for batch in batches]
            assert evaluations[2][f"{split}_loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)


@pytest.mark.parametrize(("max_iters", "log_interval"), [(0, 1), (12, 1), (11, 3)])
def test_what_is_logged_saved_and_timed(tmp_path, clock, monkeypatch, capsys, max_iters, log_interval):
    """Times leave out evaluations and saves: a step takes 1 s, evaluating a split 100 s, a save 10,000 s."""
    clock.now = 1000.0  # it may start anywhere

    def takes(seconds: float, owner: type, name: str) -> None:
        does = getattr(owner, name)

        def method(*given: object) -> object:
            clock.let_pass(seconds)
            return does(*given)

        monkeypatch.setattr(owner, name, method)

    takes(1, TrainStep, "__call__")
    takes(100, Loop, "_sum_of_losses")
    takes(10_000, TrainState, "save")
    settings = dict(eval_interval=4, eval_iters=3, warmup_iters=11, learning_rate=0.12, peak_flops=1e8)
    assert run(tmp_path / "out", max_iters=max_iters, log_interval=log_interval, **settings) == 0
    lines, evaluations = list(range(0, max_iters, log_interval)), [*range(0, max_iters, 4), max_iters]
    assert iterations(tmp_path / "out", "iter") == lines
    assert iterations(tmp_path / "out", "eval") == evaluations
    assert iterations(tmp_path / "out", "save") == evaluations[1:]
    assert clock() - 1000 == max_iters * 1 + len(evaluations) * 2 * 100 + len(evaluations[1:]) * 10_000
    printed = capsys.readouterr().out
    kinds = [record["kind"].replace("eval", "step") for record in records(tmp_path / "out")]
    assert re.findall(r"^(iter|step) \d", printed, re.MULTILINE) == [kind for kind in kinds if kind in ("iter", "step")]
    assert f"{max_iters} iterations done" in printed
    shape = GPTConfig(vocab_size=32, block_size=16, n_layer=1, n_head=2, n_embd=32, bias=False)
    share = flops_per_token(shape) * 2 * 2 * 16 / 1e8
    times = re.findall(r"^iter.*time (.*)ms, mfu (.*)%$", printed, re.MULTILINE)
    assert times == [("1000.00", f"{share:.2%}"[:-1])] * len(lines)
    rates = {n: record["lr"] for n, record in logged(tmp_path / "out").items()}
    assert rates == {n: pytest.approx(0.01 * (n + 1)) for n in lines}


def script(monkeypatch: pytest.MonkeyPatch, *losses: float, then: Callable[[], object] = lambda: None) -> None:
    """Evaluations show these validation losses, one after the other."""
    shown = iter(x for loss in losses for x in (0.0, loss))  # the training split comes first

    def sum_of_losses(loop: Loop, split: str) -> Tensor:
        then()
        return torch.tensor(next(shown) * loop.config.eval_iters)

    monkeypatch.setattr(Loop, "_sum_of_losses", sum_of_losses)


@pytest.mark.parametrize("always", [True, False])
def test_what_is_saved_of_losses_that_rise_and_fall_and_when_patience_ends(tmp_path, monkeypatch, always):
    seen, save = [], TrainState.save
    monkeypatch.setattr(
        TrainState, "save", lambda state: seen.append(dataclasses.replace(state.progress)) or save(state)
    )
    script(monkeypatch, 3.0, 2.0, 2.0, 1.0, 1.5, 1.0)
    run(tmp_path / "out", max_iters=100, eval_interval=1, patience=2, always_save_checkpoint=always)
    saved = [(1, 2.0, 0), (2, 2.0, 1), (3, 1.0, 0), (4, 1.0, 1), (5, 1.0, 2)]
    assert [(p.iter_num, p.best_val_loss, p.stale_evals) for p in seen] == (saved if always else [saved[0], saved[2]])
    assert iterations(tmp_path / "out", "eval") == [0, 1, 2, 3, 4, 5]


def test_a_signal_in_an_evaluation_lets_it_finish_and_saves_after_the_next_step(tmp_path, monkeypatch):
    script(monkeypatch, 3.0, then=lambda: signal.raise_signal(signal.SIGTERM))
    assert run(tmp_path / "out", max_iters=100, eval_interval=1) == 128 + signal.SIGTERM
    assert logged(tmp_path / "out", "eval")[0]["val_loss"] == 3.0
    assert iterations(tmp_path / "out", "save") == [1]


def test_a_run_captures_its_step_and_its_evaluation(tmp_path, monkeypatch):
    """The loop cannot tell them from what they hold. The host launches little beside the graphs, in order: the learning
    rate, the loss cleared, the batches put where graphs read them, a copy of the results, the loop's own copy. On a GPU
    the loader's copy of a batch is one more."""
    run(tmp_path / "eager")
    launched, of_iterations, iterate = [], [], Loop._iterate

    class Host(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view and func is not torch.ops.aten.detach.default:
                launched.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def graph(name: str, replay: Work) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            replay()
        launched.append(name)

    def capture(tasks: list[Task]) -> list[Work]:  # a tape in the place of CUDA's graphs
        names = ("micro-step", "update", "evaluation")
        return [functools.partial(graph, name, replay) for name, replay in zip(names, tape(tasks), strict=True)]

    def watched(loop: Loop) -> None:
        before = len(launched)
        with Host():
            iterate(loop)
        of_iterations.append(launched[before:])

    monkeypatch.setattr(Loop, "_iterate", watched)
    monkeypatch.setattr(command, "choose_graphs", lambda *args, **options: (True, ""))
    monkeypatch.setattr(command, "GraphedStep", functools.partial(GraphedStep, capture=capture))
    monkeypatch.setattr("train.loop.MOST_UNREAD", 1)  # the host reads losses between two lines of the log
    run(tmp_path / "captured", log_interval=5)
    assert [launched.count(name) for name in ("micro-step", "update", "evaluation")] == [6 * 2, 6, 4 * 2 * 2]
    micro_steps = ["_foreach_copy_", "micro-step"] * 2
    assert of_iterations[1] == ["fill_", "zero_", *micro_steps, "update", "clone", "stack"]
    eager = logged(tmp_path / "eager")
    assert logged(tmp_path / "captured") == {n: eager[n] for n in (0, 5)}
    assert logged(tmp_path / "captured", "eval") == logged(tmp_path / "eager", "eval")
