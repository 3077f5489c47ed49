"""The loop: when to evaluate, save, log and stop, and the learning rate. `step.py` computes the steps.

Iterations are counted from 0. If n is a multiple of eval_interval, the model is evaluated before iteration n, after n
updates, and saved if the settings say so. After max_iters updates the run ends with a last evaluation.
"""

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from model.work import mfu
from train.config import TrainConfig
from train.data import Loader, Split
from train.errors import RunError, UserError, complain
from train.hardware import synchronize
from train.log import RunLog, say
from train.profile import ProfiledStep
from train.state import TrainState
from train.step import TrainStep

MOST_UNREAD = 1024  # iterations after which the host reads the losses, however large log_interval is
GO_ON, OUT_OF_TIME, INTERRUPTED = range(3)  # each rank sends one of these after a step; the largest wins


class Losses(NamedTuple):
    train: float
    val: float


@contextmanager
def signals_caught(*, tells: bool) -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP are only appended to a list, so that a step can finish. A second SIGINT
    interrupts. SIGHUP, which a closed terminal sends, stays ignored where nohup has it ignored.

    tells: whether the first SIGINT says this on stderr, because an evaluation may take minutes."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        if number == signal.SIGINT and tells:
            complain("interrupted: it ends, saved, after this step or evaluation; a second Ctrl-C ends it now, unsaved")

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


class Loop:
    """A run, from its current state to its end.

    step: trains and evaluates the state's model. log: None on all ranks but the master.
    """

    def __init__(self, state: TrainState, step: TrainStep | ProfiledStep, loader: Loader, log: RunLog | None) -> None:
        self.state, self.step, self.loader, self.log = state, step, loader, log
        self.plan, self.progress = state.plan, state.progress
        self.config, self.world = self.plan.config, self.plan.world
        self.losses: Losses | None = None  # of the last evaluation
        self.ended = ""  # why the run ended, a message
        # Losses and gradient norms of the iterations since the host last waited for the device: of these the first rows
        # are unread. Kept as they are, small tensors would pin the heap, which then grows.
        self._results = torch.empty(min(self.config.log_interval, MOST_UNREAD), 2, device=self.plan.device)
        self._unread = 0
        # Evaluations and saves move `_since` forward: the time of an iteration leaves them out.
        self._since, self._timed = time.perf_counter(), self.progress.iter_num  # the last lap: when, at which iteration

    def run(self) -> int:
        """Train. Returns 0, or the number of the signal that ended the run. RunError for a loss that is not finite."""
        config, progress = self.config, self.progress
        deadline = time.monotonic() + 60 * config.max_minutes if config.max_minutes else float("inf")
        last = progress.iter_num >= config.max_iters
        # an evaluation alone has nothing to save: a signal ends it at once
        with nullcontext([]) if config.eval_only else signals_caught(tells=self.world.master) as caught:
            while True:
                if last or config.eval_only or progress.iter_num % config.eval_interval == 0:
                    self._read_results()
                    self.losses = self._evaluate()
                    worth_saving = not config.eval_only and self._judge(self.losses)
                    if worth_saving and progress.iter_num > 0:
                        self._save()
                    if last or config.eval_only or 0 < config.patience <= progress.stale_evals:
                        self.ended = self.ended or self._reason_to_end()
                        return 0
                self._iterate()
                mine = OUT_OF_TIME if time.monotonic() > deadline else GO_ON
                if caught or self.world.orphaned:
                    mine = INTERRUPTED
                stop = self.world.agree(mine)  # the strongest reason of any rank
                if stop == INTERRUPTED:
                    self._read_results()
                    self._save()
                    why = "torchrun has gone: " if self.world.orphaned and not caught else ""
                    self.ended = f"{why}interrupted after {progress.iter_num} iterations"
                    return caught[-1] if caught else signal.SIGTERM
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
        """One iteration: the rate, the batch, the step; every log_interval iterations a line of the log."""
        iter_num = self.progress.iter_num
        lr = learning_rate(iter_num, self.config)
        with self._saving_if_data_fails():
            batch = self.loader.train(iter_num)
        result = self.step(batch, lr)
        if self._unread == len(self._results):
            self._read_results()
        torch.stack(result, out=self._results[self._unread])
        self._unread += 1
        self.progress.iter_num += 1
        if iter_num % self.config.log_interval == 0:
            loss, grad_norm = self._read_results()
            now = time.perf_counter()
            seconds = (now - self._since) / (self.progress.iter_num - self._timed)  # the mean of an iteration
            self._since, self._timed = now, self.progress.iter_num
            if self.log is not None:
                utilisation = mfu(self.plan.flops, seconds, self.world.size * self.plan.peak.flops)
                more = {"lr": lr, "grad_norm": grad_norm, "tokens_per_second": self.plan.tokens / seconds}
                self.log.iteration(iter_num, loss, seconds, utilisation, **more)

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
        synchronize(self.plan.device)
        if not self._unread:
            return float("nan"), float("nan")
        first = self.progress.iter_num - self._unread
        table = self._results[: self._unread].clone().cpu()  # the sum below must not change what is kept
        self._unread = 0
        self.world.sum(table).div_(self.world.size)
        # float16's scaler skips an update whose gradients overflowed: an infinite norm is no failure
        names = ("loss",) if self.step.scaler.enabled else ("loss", "gradient norm")
        for row, values in enumerate(table.tolist()):
            self._check_finite(first + row, names, values)
        return tuple(values)

    def _check_finite(self, iter_num: int, names: Iterable[str], values: Iterable[float]) -> None:
        for name, value in zip(names, values, strict=False):
            if not math.isfinite(value):
                raise RunError(
                    f"{name}: got {value} at iteration {iter_num}, expected a finite number; nothing was saved "
                    f"since, so a checkpoint in {self.config.out_dir} is good; a lower learning_rate may help"
                )

    def _evaluate(self) -> Losses:
        """Log the mean loss of eval_iters batches of each split."""
        begin, config, iter_num = time.perf_counter(), self.config, self.progress.iter_num
        with self._saving_if_data_fails():
            sums = torch.stack([self._sum_of_losses("train"), self._sum_of_losses("val")])
        losses = Losses(*(self.world.sum(sums) / config.eval_iters).tolist())
        if self.log is not None:
            lr, seconds = learning_rate(iter_num, config), time.perf_counter() - begin
            self.log.evaluation(iter_num, *losses, lr=lr, seconds=seconds)
        self._check_finite(iter_num, ("train loss", "val loss"), losses)
        self._since += time.perf_counter() - begin
        return losses

    def _judge(self, losses: Losses) -> bool:
        """Update the best loss and the counters, unless they know of this evaluation. Returns whether to save."""
        progress = self.progress
        if progress.judged_at == progress.iter_num:
            return False
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
        batches = (self.loader.evaluation(split, min(k, count - 1)) for k in mine)
        losses = torch.stack([self.step.evaluate(batch.x[0], batch.y[0]) for batch in batches]).cpu().double()
        return losses[: len([k for k in mine if k < count])].sum()

    def _save(self) -> None:
        begin = time.perf_counter()
        if self.log is not None:
            say(f"saving checkpoint to {self.config.out_dir}")
        self.state.save()
        if self.log is not None:
            self.log.saved(self.progress.iter_num, seconds=time.perf_counter() - begin)
        self.world.barrier()
        self._since += time.perf_counter() - begin
