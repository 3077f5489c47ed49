"""The loop: what it logs, evaluates, saves and times."""

import dataclasses
import functools
import re
import signal
import types
import weakref
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
from tests.train.runs import CONSTANT, iterations, last, logged, run
from tests.train.tape import tape
from tests.train.test_schedule import Clock
from train.config import TrainConfig
from train.data import Dataset, Loader
from train.distributed import World
from train.graph import Capture, GraphedEvaluation, GraphedStep, Task, Work
from train.log import RunLog
from train.loop import Loop, StepTimer
from train.optim import FlatAdamW
from train.state import Progress, TrainState
from train.step import Evaluation, TrainStep

# What is logged


def test_the_exact_lines(tmp_path, capsys):
    run(tmp_path / "out", max_iters=4, eval_interval=2, log_interval=3)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    iters = [line for line in lines if line.startswith("iter")]
    for line, n in zip(steps, (0, 2, 4), strict=True):
        assert re.fullmatch(rf"step {n}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}", line)
        record = logged(tmp_path / "out", "eval")[n]
        assert line == f"step {n}: train loss {record['train_loss']:.4f}, val loss {record['val_loss']:.4f}"
    for line, n in zip(iters, (0, 3), strict=True):
        assert re.fullmatch(rf"iter {n}: loss \d\.\d{{4}}, time \d+\.\d\dms, mfu \d+\.\d\d%", line)
        assert f"loss {logged(tmp_path / 'out')[n]['loss']:.4f}," in line
    assert lines.index(steps[1]) < lines.index(iters[1]) < lines.index(steps[2])
    assert "4 iterations done" in lines


@pytest.mark.parametrize(("max_iters", "eval_interval", "log_interval"), [(0, 3, 1), (7, 3, 3), (5, 100, 4)])
def test_what_is_logged_evaluated_and_saved(tmp_path, max_iters, eval_interval, log_interval):
    settings = dict(max_iters=max_iters, eval_interval=eval_interval, log_interval=log_interval)
    assert run(tmp_path / "out", **settings) == 0
    evaluations = [*range(0, max_iters, eval_interval), max_iters]  # the last one does not depend on the interval
    assert iterations(tmp_path / "out", "iter") == list(range(0, max_iters, log_interval))
    assert iterations(tmp_path / "out", "eval") == evaluations
    assert iterations(tmp_path / "out", "save") == evaluations[1:]


def test_the_rate_logged_is_the_iterations_own(tmp_path):
    run(tmp_path / "out", max_iters=4, warmup_iters=3, learning_rate=0.04)
    assert [record["lr"] for record in logged(tmp_path / "out").values()] == pytest.approx([0.01, 0.02, 0.03, 0.04])


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
    clock: Clock = dataclasses.field(default_factory=Clock)
    saved: list[Progress] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)

    def run(self, evaluated: nn.Module | None = None, *, graphed: Capture | None = None) -> int:
        shape = dict(batch_size=2, block_size=16, n_layer=1, n_head=2, n_embd=32, dropout=0.5)
        config = TrainConfig(**shape | dict(out_dir=str(self.folder), eval_iters=1) | self.settings)
        torch.manual_seed(0)
        model = GPT(GPTConfig(16, len(CHARS), 1, 2, 32, dropout=0.5))
        make_data(self.folder / "data")
        clock = self.clock

        class Step(TrainStep):
            def begin(self, lr: float) -> None:
                clock.now += 1
                assert model.training
                super().begin(lr)

        class State(TrainState):
            def save(state) -> None:
                clock.now += 10_000
                self.saved.append(dataclasses.replace(state.progress))

        optimizer = FlatAdamW(model, REFERENCE, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        step = Step(model, optimizer, grad_clip=1.0)
        evaluation = Evaluation(evaluated or Evaluated(model, clock))
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
                timer=StepTimer(clock),
            )
            status = self.loop.run()
        log.close()
        return status


class Evaluated(nn.Module):
    """Checks how it is evaluated, and moves the clock."""

    def __init__(self, model: GPT, clock: Clock) -> None:
        super().__init__()
        self.model, self.clock, self.calls = model, clock, 0

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        self.clock.now += 100
        self.calls += 1
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
    parts = Parts(tmp_path, dict(max_iters=12, eval_interval=4, log_interval=log_interval))
    assert parts.run() == 0
    assert [progress.iter_num for progress in parts.saved] == [4, 8, 12]
    assert parts.clock.now - Clock().now == 12 * 1 + 4 * 2 * 100 + 3 * 10_000
    iters = [line for line in parts.lines if line.startswith("iter")]
    assert len(iters) == len(range(0, 12, log_interval))
    assert all(line.endswith("time 1000.00ms, mfu 25.00%") for line in iters)


def test_an_evaluation_is_without_dropout_and_gradients_and_training_goes_on_with_them(tmp_path):
    parts = Parts(tmp_path, dict(max_iters=4, eval_interval=2, eval_iters=3))
    parts.run()
    evaluated = parts.loop.evaluation.model
    assert evaluated.calls == 3 * 2 * 3
    assert evaluated.model.training
    assert all(parameter.grad is None for parameter in evaluated.parameters())


def test_the_loop_cannot_tell_graphs_from_what_they_hold(tmp_path):
    settings = dict(max_iters=5, eval_interval=2, eval_iters=3, learning_rate=0.1)
    eager, graphed = (Parts(tmp_path / name, settings) for name in ("eager", "graphed"))
    assert (eager.run(), graphed.run(graphed=tape)) == (0, 0)
    for kind in ("iter", "eval"):
        ours, theirs = (logged(parts.folder, kind) for parts in (graphed, eager))
        assert [ours[i].keys() for i in ours] == [theirs[i].keys() for i in theirs]
        for name in ("loss", "grad_norm") if kind == "iter" else ("train_loss", "val_loss"):
            assert [record[name] for record in ours.values()] == [record[name] for record in theirs.values()]


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


def test_only_improvements_are_saved_if_so_set(tmp_path):
    parts = Parts(tmp_path, dict(max_iters=6, eval_interval=1, always_save_checkpoint=False))
    parts.run(Scripted(3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.5))
    assert [(p.iter_num, p.best_val_loss, p.stale_evals) for p in parts.saved] == [
        (1, 2.0, 0),
        (3, 1.0, 0),
        (6, 0.5, 0),
    ]


def test_every_evaluation_is_saved_with_the_best_loss_so_far(tmp_path):
    parts = Parts(tmp_path, dict(max_iters=3, eval_interval=1))
    parts.run(Scripted(3.0, 2.0, 2.5, 1.0))
    assert [(p.iter_num, p.best_val_loss, p.stale_evals) for p in parts.saved] == [
        (1, 2.0, 0),
        (2, 2.0, 1),
        (3, 1.0, 0),
    ]


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


def test_patience_starts_again_with_every_improvement(tmp_path):
    parts = Parts(tmp_path, dict(max_iters=100, eval_interval=1, patience=2))
    parts.run(Scripted(3.0, 3.5, 2.0, 2.5, 1.0, 1.5, 1.0))
    assert parts.loop.progress.iter_num == 6
    assert parts.loop.losses.val == 1.0


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
    """The tape in the place of CUDA's graphs."""
    used = {}

    class Watched(Loop):
        def __init__(self, *args, **parts) -> None:
            used.update(parts)
            super().__init__(*args, **parts)

    monkeypatch.setattr(command, "Loop", Watched)
    run(tmp_path / "eager")
    monkeypatch.setattr(command, "choose_graphs", lambda *args, **options: (True, ""))
    monkeypatch.setattr(command, "GraphedStep", functools.partial(GraphedStep, capture=tape))
    run(tmp_path / "captured")
    assert isinstance(used["step"], GraphedStep)
    assert isinstance(used["evaluation"], GraphedEvaluation)
    for kind in ("iter", "eval"):
        assert logged(tmp_path / "captured", kind) == logged(tmp_path / "eager", kind)
