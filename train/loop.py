"""The loop: when to evaluate, save, log and stop, and the learning rate. `step.py` computes the steps.

Iterations are counted from 0. If n is a multiple of eval_interval, the model is evaluated before iteration n, after n
updates, and saved if the settings say so. After max_iters updates the run ends with a last evaluation.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from types import FrameType, TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from model.flops import mfu
from train.config import TrainConfig
from train.data import Loader, Split
from train.errors import RunError, UserError
from train.graph import GraphedEvaluation, GraphedStep
from train.hardware import synchronize
from train.log import RunLog
from train.profile import ProfiledStep
from train.state import TrainState
from train.step import Evaluation, StepResult, TrainStep

MOST_UNREAD = 1024  # iterations after which the host reads the losses, however large log_interval is
GO_ON, OUT_OF_TIME, INTERRUPTED = range(3)  # each rank sends one of these after a step; the largest wins


class Losses(NamedTuple):
    train: float
    val: float


class Signals:
    """In this context SIGINT, SIGTERM and SIGHUP only set `caught`, so that a step can finish. A second SIGINT
    interrupts. SIGHUP, which a closed terminal sends, stays ignored where nohup has it ignored."""

    def __init__(self) -> None:
        self.caught = 0

    def __enter__(self) -> Self:
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        self._before = {number: signal.signal(number, self._catch) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number


def learning_rate(iter_num: int, config: TrainConfig) -> float:
    """The rate of iteration `iter_num`: linear warmup, then a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    if not config.decay_lr:
        return config.learning_rate
    # 1. warmup: never 0, not even in the first iteration
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / (config.warmup_iters + 1)
    # 2. after the decay (also where the warmup leaves no room for one)
    if iter_num > config.lr_decay_iters or config.lr_decay_iters == config.warmup_iters:
        return config.min_lr
    # 3. between the two: half a period of a cosine
    done = (iter_num - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)


class StepTimer:
    """The mean time of an iteration since the last lap. Time between `pause` and `start` does not count.

    It sees the host's time: wait for the device before `lap` and `pause`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = 0.0  # when the timer was started, or the last lap ended
        self._seconds, self._steps = 0.0, 0  # of this lap, up to the last pause

    def start(self) -> None:
        """Begin, or go on after a pause."""
        self._since = self._clock()

    def pause(self) -> None:
        """Stop until `start`."""
        self._seconds += self._clock() - self._since

    def step(self) -> None:
        """Count one iteration."""
        self._steps += 1

    def lap(self) -> float:
        """Mean seconds of an iteration since the last lap, at least one. The timer must run."""
        now = self._clock()
        mean = (self._seconds + now - self._since) / self._steps
        self._since, self._seconds, self._steps = now, 0.0, 0
        return mean


@dataclass
class Loop:
    """A run, from its current state to its end.

    step: trains the state's model. evaluation: takes batches, returns that model's loss for each. log: None on all
    ranks but the master. flops: FLOPs of an iteration, all ranks together. peak_flops: FLOP/s, all devices together.
    """

    state: TrainState
    _: KW_ONLY
    step: TrainStep | GraphedStep | ProfiledStep
    evaluation: Evaluation | GraphedEvaluation
    loader: Loader
    log: RunLog | None
    flops: float
    peak_flops: float
    timer: StepTimer = field(default_factory=StepTimer)
    losses: Losses | None = None  # of the last evaluation
    ended: str = ""  # why the run ended, a message
    _results: Tensor | None = None  # (rows, 2), on the device: losses and gradient norms, of which the first are unread
    _unread: int = 0  # iterations since the host last waited for the device

    def __post_init__(self) -> None:
        plan = self.state.plan
        self.config, self.world, self.device, self.progress = plan.config, plan.world, plan.device, self.state.progress

    def run(self) -> int:
        """Train. Returns 0, or the number of the signal that ended the run. RunError for a loss that is not finite."""
        config, progress = self.config, self.progress
        deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else float("inf")
        last = progress.iter_num >= config.max_iters
        self.timer.start()
        with Signals() as signals:
            while True:
                if last or config.eval_only or progress.iter_num % config.eval_interval == 0:
                    losses = self._evaluate()
                    if progress.judged_at != progress.iter_num and not config.eval_only:
                        worth_saving = self._judge(losses)
                        if worth_saving and progress.iter_num > 0:
                            self._save()
                    self.timer.start()
                    if last or config.eval_only or 0 < config.patience <= progress.stale_evals:
                        self.ended = self.ended or self._reason_to_end()
                        return 0
                self._iterate()
                mine = (
                    INTERRUPTED
                    if signals.caught or self.world.orphaned
                    else OUT_OF_TIME
                    if time.monotonic() > deadline
                    else GO_ON
                )
                stop = self.world.agree(mine)  # the strongest reason of any rank
                if stop == INTERRUPTED:
                    self._read_results()
                    self._save()
                    why = "torchrun has gone: " if self.world.orphaned and not signals.caught else ""
                    self.ended = f"{why}interrupted after {progress.iter_num} iterations"
                    return signals.caught or signal.SIGTERM
                if stop == OUT_OF_TIME:
                    self.ended = f"max_minutes={config.max_minutes:g} have passed"
                last = stop == OUT_OF_TIME or progress.iter_num >= config.max_iters

    def _reason_to_end(self) -> str:
        if self.config.eval_only:
            return "eval_only: one evaluation, no training"
        if self.progress.iter_num >= self.config.max_iters:
            return f"{self.progress.iter_num} iterations done"
        return f"no better validation loss in {self.progress.stale_evals} evaluations"

    def _iterate(self) -> None:
        config, iter_num = self.config, self.progress.iter_num
        lr = learning_rate(iter_num, config)
        with self._saving_if_data_fails():
            batch = self.loader.train(iter_num)
        self._keep(self.step(batch, lr))
        self.timer.step()
        self.progress.iter_num += 1
        if iter_num % config.log_interval == 0:
            loss, grad_norm = self._read_results()
            seconds = self.timer.lap()
            tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
            if self.log is not None:
                self.log.iteration(
                    iter_num,
                    loss=loss,
                    seconds=seconds,
                    mfu=mfu(self.flops, seconds, self.peak_flops),
                    lr=lr,
                    grad_norm=grad_norm,
                    tokens_per_second=tokens / seconds,
                )

    def _keep(self, result: StepResult) -> None:
        """Copy a result into one buffer. Kept as they are, small tensors would pin the heap, which then grows."""
        if self._results is None:
            self._results = result.loss.new_empty(min(self.config.log_interval, MOST_UNREAD), 2)
        if self._unread == len(self._results):
            self._read_results()
        torch.stack(result, out=self._results[self._unread])
        self._unread += 1

    @contextmanager
    def _saving_if_data_fails(self) -> Iterator[None]:
        """A dataset that fails inside, cut short for example, ends the run; what was trained is saved first. Not with
        several ranks, of which the others may not have failed."""
        try:
            yield
        except UserError:
            if self.world.size == 1 and self.progress.iter_num > max(self.state.saved_iter, 0):
                self._read_results()
                self._save()
            raise

    def _read_results(self) -> tuple[float, float]:
        """Wait for the device. Returns (loss, gradient norm) of the last iteration. RunError if any is not finite."""
        synchronize(self.device)
        if not self._unread:
            return float("nan"), float("nan")
        first = self.progress.iter_num - self._unread
        table = self._results[: self._unread].clone().cpu()  # the sum below must not change what is kept
        self._unread = 0
        self.world.sum(table).div_(self.world.size)
        # float16's scaler skips an update whose gradients overflowed: an infinite norm is no failure
        checked = table[:, :1] if self.step.scaler.enabled else table
        for row, values in enumerate(checked.tolist()):
            self._check_finite(first + row, dict(zip(("loss", "gradient norm"), values, strict=False)))
        loss, grad_norm = table[-1].tolist()
        return loss, grad_norm

    def _check_finite(self, iter_num: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not abs(value) < float("inf"):
                raise RunError(
                    f"{name}: got {value} at iteration {iter_num}, expected a finite number; nothing was saved "
                    f"since, so a checkpoint in {self.config.out_dir} is good; a lower learning_rate may help"
                )

    def _evaluate(self) -> Losses:
        """Log the mean loss of eval_iters batches of each split. The timer is paused afterwards."""
        self._read_results()
        self.timer.pause()
        begin, config, progress = time.perf_counter(), self.config, self.progress
        with self._saving_if_data_fails():
            sums = torch.stack([self._sum_of_losses("train"), self._sum_of_losses("val")])
        self.losses = losses = Losses(*(self.world.sum(sums) / config.eval_iters).tolist())
        lr, seconds = learning_rate(progress.iter_num, config), time.perf_counter() - begin
        if self.log is not None:
            self.log.evaluation(progress.iter_num, losses.train, losses.val, lr=lr, seconds=seconds)
        self._check_finite(progress.iter_num, {"train loss": losses.train, "val loss": losses.val})
        return losses

    def _judge(self, losses: Losses) -> bool:
        """Update the best loss and the counters. Returns whether to save the evaluated state."""
        progress = self.progress
        better = losses.val < progress.best_val_loss
        if better:
            progress.best_val_loss, progress.best_iter = losses.val, progress.iter_num
        progress.stale_evals = 0 if better else progress.stale_evals + 1
        progress.judged_at = progress.iter_num
        return better or self.config.always_save_checkpoint

    def _sum_of_losses(self, split: Split) -> Tensor:
        """Sum over this rank's share of the split's evaluation batches, in float64, so that the order hardly matters.

        All ranks evaluate equally many batches: a sharded model needs every rank. Extra batches are not counted.
        """
        count = self.config.eval_iters
        mine = range(self.world.rank, self.world.rank + count, self.world.size)
        losses = self.evaluation(self.loader.evaluation(split, min(k, count - 1)) for k in mine).cpu().double()
        return losses[: len([k for k in mine if k < count])].sum()

    def _save(self) -> None:
        begin = time.perf_counter()
        if self.log is not None:
            self.log.message(f"saving checkpoint to {self.config.out_dir}")
        self.state.save()
        if self.log is not None:
            self.log.saved(self.progress.iter_num, seconds=time.perf_counter() - begin)
        self.world.barrier()
