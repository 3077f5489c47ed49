"""The loop: what it logs, evaluates, saves and times."""

import dataclasses
import functools
import re
import signal
import types
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import train.__main__ as command
from kernels import REFERENCE
from model import GPT, GPTConfig
from model.pretrained import from_checkpoint
from tests.train.jobs import CHARS, make_data
from tests.train.runs import CONSTANT, iterations, last, logged, records, run
from tests.train.tape import tape
from train.config import TrainConfig
from train.data import Dataset, Loader
from train.distributed import World
from train.graph import Capture, GraphedStep, Task, Work
from train.log import RunLog
from train.loop import Loop, StepTimer
from train.optim import FlatAdamW
from train.state import Progress, TrainState
from train.step import Evaluation, TrainStep


@pytest.mark.parametrize(("max_iters", "eval_interval", "log_interval"), [(0, 3, 1), (7, 3, 3)])
def test_what_is_logged_evaluated_and_saved(tmp_path, capsys, max_iters, eval_interval, log_interval):
    settings = dict(max_iters=max_iters, eval_interval=eval_interval, log_interval=log_interval)
    assert run(tmp_path / "out", **settings) == 0
    evaluations = [*range(0, max_iters, eval_interval), max_iters]  # the last one does not depend on the interval
    assert iterations(tmp_path / "out", "iter") == list(range(0, max_iters, log_interval))
    assert iterations(tmp_path / "out", "eval") == evaluations
    assert iterations(tmp_path / "out", "save") == evaluations[1:]
    printed = capsys.readouterr().out
    kinds = [record["kind"].replace("eval", "step") for record in records(tmp_path / "out")]
    assert re.findall(r"^(iter|step) \d", printed, re.MULTILINE) == [kind for kind in kinds if kind in ("iter", "step")]
    assert f"{max_iters} iterations done" in printed


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


# The loop alone, with a clock that moves only by command


@dataclasses.dataclass
class Parts:
    """A Loop on a small GPT. On the clock a step takes 1 s, an evaluation batch 100 s, a save 10,000 s."""

    folder: Path
    settings: dict
    now: float = 1000.0  # a clock may start anywhere
    saved: list[Progress] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)

    def run(self, evaluated: nn.Module | None = None, *, graphed: Capture | None = None) -> int:
        shape = dict(batch_size=2, block_size=16, n_layer=1, n_head=2, n_embd=32, dropout=0.5)
        config = TrainConfig(**shape | dict(out_dir=str(self.folder), eval_iters=1) | self.settings)
        torch.manual_seed(0)
        model = GPT(GPTConfig(16, len(CHARS), 1, 2, 32, dropout=0.5))
        make_data(self.folder / "data")
        parts = self

        class Step(TrainStep):
            def begin(self, lr: float) -> None:
                parts.now += 1
                assert model.training
                super().begin(lr)

        class State(TrainState):
            def save(state) -> None:
                parts.now += 10_000
                parts.saved.append(dataclasses.replace(state.progress))

        optimizer = FlatAdamW(model, REFERENCE, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        step = Step(model, optimizer, grad_clip=1.0)
        evaluation = Evaluation(evaluated or Evaluated(model, parts))
        if graphed is not None:
            step = GraphedStep(step, (1, 2, 16), evaluation, capture=graphed)
            evaluation = step.evaluation
        plan = types.SimpleNamespace(config=config, world=World(), device=torch.device("cpu"))
        log = RunLog(config, device="cpu", parameters=0, console=self.lines.append)
        with Loader(Dataset(self.folder / "data"), batch_size=2, block_size=16) as loader:
            self.loop = Loop(
                State(plan, model, optimizer, step.scaler, Progress()),
                evaluation=evaluation,
                step=step,
                loader=loader,
                log=log,
                flops=5e9,
                peak_flops=2e10,
                timer=StepTimer(lambda: self.now),
            )
            status = self.loop.run()
        log.close()
        return status


class Evaluated(nn.Module):
    """Checks how it is evaluated, and moves the clock."""

    def __init__(self, model: GPT, parts: Parts) -> None:
        super().__init__()
        self.model, self.parts = model, parts

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        self.parts.now += 100
        return self.model(idx, targets)


class Scripted(nn.Module):
    """Returns these validation losses, one for each evaluation."""

    def __init__(self, *losses: float) -> None:
        super().__init__()
        self.losses = iter(x for loss in losses for x in (0.0, loss))  # the training split comes first

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        return None, torch.tensor(next(self.losses))


@pytest.mark.parametrize("log_interval", [1, 3])
def test_the_time_of_an_iteration_leaves_out_evaluations_and_saves(tmp_path, log_interval):
    settings = dict(eval_interval=4, eval_iters=3, log_interval=log_interval, warmup_iters=11, learning_rate=0.12)
    parts = Parts(tmp_path, dict(max_iters=12) | settings)
    assert parts.run() == 0
    assert [progress.iter_num for progress in parts.saved] == [4, 8, 12]
    assert parts.now - 1000 == 12 * 1 + 4 * 2 * 3 * 100 + 3 * 10_000
    iters = [line for line in parts.lines if line.startswith("iter")]
    assert len(iters) == len(range(0, 12, log_interval))
    assert all(line.endswith("time 1000.00ms, mfu 25.00%") for line in iters)
    rates = {n: record["lr"] for n, record in logged(tmp_path).items()}
    assert rates == {n: pytest.approx(0.01 * (n + 1)) for n in range(0, 12, log_interval)}


def test_unread_losses_are_not_kept_one_by_one(tmp_path, monkeypatch):
    """Small tensors between the large ones of a step would pin the heap. However rarely a line is logged."""
    monkeypatch.setattr("train.loop.MOST_UNREAD", 3)
    kept, most, losses, result = [], [], [], TrainStep.result

    def watched(step: TrainStep):
        found = result(step)
        losses.append(found.loss.item())
        kept.append(weakref.ref(found.loss))
        most.append(sum(loss() is not None for loss in kept))
        return found

    monkeypatch.setattr(TrainStep, "result", watched)
    Parts(tmp_path, dict(max_iters=9, eval_interval=100, log_interval=8)).run()
    assert max(most) <= 2
    assert {n: record["loss"] for n, record in logged(tmp_path).items()} == {0: losses[0], 8: losses[8]}


@pytest.mark.parametrize("always", [True, False])
def test_what_is_saved_of_losses_that_rise_and_fall_and_when_patience_ends(tmp_path, always):
    parts = Parts(tmp_path, dict(max_iters=100, eval_interval=1, patience=2, always_save_checkpoint=always))
    parts.run(Scripted(3.0, 2.0, 2.0, 1.0, 1.5, 1.0))
    saved = [(1, 2.0, 0), (2, 2.0, 1), (3, 1.0, 0), (4, 1.0, 1), (5, 1.0, 2)]
    expected = saved if always else [saved[0], saved[2]]
    assert [(p.iter_num, p.best_val_loss, p.stale_evals) for p in parts.saved] == expected
    assert parts.loop.progress.iter_num == 5
    assert parts.loop.losses.val == 1.0


def test_the_host_launches_little_beside_the_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's two graphs, here tapes, and beside them, in order: the learning rate, the loss cleared, the batch put
    where graphs read it, a copy of the results, the loop's own copy. On a GPU the loader's copy of a batch is one more.
    """
    launches: list[str] = []
    seen: list[list[str]] = []

    class Host(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view and func is not torch.ops.aten.detach.default:
                launches.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def capture(tasks: list[Task]) -> list[Work]:
        def graph(replay: Work) -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                replay()
            launches.append("graph")

        return [functools.partial(graph, replay) for replay in tape(tasks)]

    iterate = Loop._iterate

    def watched(loop: Loop) -> None:
        launches.clear()
        with Host():
            iterate(loop)
        seen.append(launches.copy())

    monkeypatch.setattr(Loop, "_iterate", watched)
    Parts(tmp_path, dict(max_iters=3, eval_interval=100, log_interval=10)).run(graphed=capture)
    assert seen[-1] == ["fill_", "zero_", "_foreach_copy_", "graph", "graph", "clone", "stack"]


def test_a_signal_in_an_evaluation_lets_it_finish_and_saves_after_the_next_step(tmp_path):
    class Interrupted(Scripted):
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
            signal.raise_signal(signal.SIGTERM)
            return super().forward(idx, targets)

    parts = Parts(tmp_path, dict(max_iters=100, eval_interval=1))
    assert parts.run(Interrupted(3.0)) == signal.SIGTERM
    assert parts.loop.losses.val == 3.0
    assert [progress.iter_num for progress in parts.saved] == [1]


def test_a_run_captures_its_step_and_its_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tape in the place of CUDA's graphs. The loop cannot tell them from what they hold."""
    replayed = Counter()

    def capture(tasks: list[Task]) -> list[Work]:
        def counted(name: str, replay: Work) -> None:
            replayed[name] += 1
            replay()

        return [
            functools.partial(counted, name, replay)
            for name, replay in zip(("micro-step", "update", "evaluation"), tape(tasks), strict=True)
        ]

    run(tmp_path / "eager")
    monkeypatch.setattr(command, "choose_graphs", lambda *args, **options: (True, ""))
    monkeypatch.setattr(command, "GraphedStep", functools.partial(GraphedStep, capture=capture))
    run(tmp_path / "captured")
    assert replayed == {"micro-step": 6 * 2, "update": 6, "evaluation": 4 * 2 * 2}
    for kind in ("iter", "eval"):
        assert logged(tmp_path / "captured", kind) == logged(tmp_path / "eager", kind)
