"""Whole training steps, timed by turns. First each variant's losses are checked against the first variant's.

All variants of a workload live in one process, start from the same weights and train on the same batches. Loading a
batch is timed too. A turn is a few iterations of one variant. A round is a turn of each.

A variant that does not fit into memory beside the others waits for the next group, which begins with the references
alone. Rounds are counted over all groups.
"""

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from msgspec import structs

from bench import results
from bench.results import WRONG
from bench.rules import NO_TIME, RECOMPILED, TimeBudget, compilations, compiling
from bench.variants import Setting, StepFunction, Variant, Workload
from model import GPT
from train.data import Dataset, Loader
from train.errors import first_line
from train.hardware import synchronize

CHECKED = 5  # steps whose losses must agree before the clock runs
AGREE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative tolerance of losses, by dtype
TURN = 0.25  # seconds of a turn, about
LEAST = 3  # least turns of each variant
SPARE = 0.1  # of a GPU's memory: allocators leave gaps, kernels have code

Turn = tuple[list[float], list[float]]  # for each iteration: seconds, and the host's seconds in the call


@dataclass
class Timed:
    """A variant under measurement. row: its results so far. step: None before it is built and after it is given up."""

    variant: Variant
    row: results.Step
    step: StepFunction | None = None
    pace: float = 0.0  # seconds of an iteration, about
    beside: int = 0  # bytes that a step takes beside what is held between steps

    def set(self, **found: object) -> None:
        self.row = structs.replace(self.row, **found)

    def give_up(self, reason: str) -> None:
        self.step = None
        self.set(seconds=[], host_seconds=[], skipped=reason)

    @property
    def lead(self) -> int:
        """Iterations that start a turn and do not count: caches hold another variant's data, a GPU's queue is empty."""
        return int(self.row.turn > 1)

    @property
    def turn_seconds(self) -> float:
        return (self.lead + self.row.turn) * self.pace


@compiling()
def measure(
    workload: Workload,
    variants: list[Variant],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float,
    budget: TimeBudget | None = None,
    tell: Callable[[str], None] = lambda text: None,
    into: list[results.Step] | None = None,
) -> list[results.Step]:
    """Rows of all variants, in order; about `seconds` of samples, after building and checking.

    budget: for everything, with building, compiling and checking. Variants that do not fit are left out, rungs first.
    None: no limit, and LEAST turns of each even if `seconds` is too short for them.

    The rows are also appended to `into`, even if an exception or an interruption ends the measurement.
    """
    torch.compiler.reset()  # else each call would first check the code compiled for other shapes
    torch.manual_seed(0)
    setting = Setting(workload, GPT(workload.config).state_dict(), device, dtype)
    timed = [
        Timed(v, workload.row(v.name, compares=v.compares, dtype=torch.float32 if v.float32 else dtype))
        for v in variants
    ]
    budget, rows = budget or TimeBudget(), [] if into is None else into
    waiting = sorted(timed, key=lambda each: not each.variant.compares)
    with _loader(workload, device) as loader:
        race = Race(setting, loader, budget)
        try:
            while waiting:
                ready, later = [each for each in timed if each.step], []
                for each in waiting:
                    tell(f"{workload.name}: {each.variant.name}")
                    if not race.prepare(each, ready):
                        later.append(each)
                    elif each.step:
                        ready.append(each)
                share = len(ready) / (len(ready) + len(later)) * min(seconds, budget.left) if ready else 0.0
                race.run(ready, share)
                seconds -= share
                for each in ready:
                    if each.row.ours or not later:
                        each.step = None  # frees its memory
                waiting = later
        finally:
            rows += [each.row for each in timed if each.row.seconds or each.row.skipped]
    return rows


class Race:
    """The measurement of one workload: what its variants share, and how far it is."""

    def __init__(self, setting: Setting, loader: Loader, budget: TimeBudget) -> None:
        self.setting, self.loader, self.budget, self.device = setting, loader, budget, setting.device
        self.expected: list[float] = []  # the first losses of the first variant
        self.rounds = 0  # counted over all groups

    def prepare(self, each: Timed, ready: list[Timed]) -> bool:
        """Build the variant and check its first losses. False if it must wait: there is no memory for it beside those
        of ours that are ready.

        Sets `skipped` if that fails, or if the budget has no time for it and for turns of all.
        """
        may_wait = any(other.row.ours for other in ready)
        try:
            self._build(each, ready)
            if may_wait and spare_memory(self.device) < max(other.beside for other in (*ready, each)):
                raise torch.OutOfMemoryError("too little memory is left for the steps of all")
        except Exception as error:  # of torch, a compiler or a driver: the other variants go on
            each.step = None
            if may_wait and isinstance(error, torch.OutOfMemoryError):
                return False
            each.give_up(first_line(error))
        if each.step and (found := self._turn(each, 0, 2)):
            each.pace = found[0][-1]
            each.set(turn=max(1, min(50, round(TURN / each.pace))))
        return True

    def _build(self, each: Timed, ready: list[Timed]) -> None:
        device, workload = self.device, self.setting.workload
        free = spare_memory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            allocated = torch.cuda.memory_allocated(device)
        turns = [other.turn_seconds for other in ready]
        after = LEAST * (sum(turns) + max(turns, default=0.0))  # turns of those that are ready, and of this one
        first = "compiled" if each.variant.compiled else "eager"
        second = first if workload.config.dropout else "eager"  # without dropout it is already compiled
        if not self.budget.fits(first, second, more=after):
            raise TimeoutError(NO_TIME)
        with self.budget.task(first):  # without dropout, because two implementations never draw the same masks
            still = replace(workload, config=replace(workload.config, dropout=0.0))
            step = each.variant.build(self.setting._replace(workload=still))
            each.set(losses=[step(self.loader.train(i)).item() for i in range(CHECKED)])
            del step  # frees its memory
        if not self.budget.fits(second, more=after):
            raise TimeoutError(NO_TIME)
        with self.budget.task(second):
            step = each.variant.build(self.setting)
            for i in range(2):
                step(self.loader.train(i))
            synchronize(device)
        if device.type == "cuda":
            each.set(peak_memory=torch.cuda.max_memory_allocated(device) - allocated)
            each.beside = max(0, each.row.peak_memory - (free - spare_memory(device)))
        tolerance = AGREE[torch.float32 if each.variant.float32 else self.setting.dtype]
        losses, expected = np.array([each.row.losses, self.expected or each.row.losses])
        worst = np.max(np.abs(losses - expected) / np.abs(expected))  # NaN if a loss is
        if not worst < tolerance:
            raise ValueError(f"{WRONG}its losses are off by {worst:.1e}, expected {tolerance:.0e} at most")
        self.expected, each.step = expected.tolist(), step

    def run(self, timed: list[Timed], seconds: float) -> None:
        """Measure rounds of all variants that are ready."""
        deadline, rounds = time.perf_counter() + seconds, 0
        expected = sum(each.turn_seconds for each in timed if each.step)  # seconds of a round
        while ready := [each for each in timed if each.step]:
            begin = time.perf_counter()
            if (rounds >= LEAST and begin >= deadline) or self.budget.left < expected:
                break
            for each in ready:
                if not each.row.seconds:
                    each.set(first_round=self.rounds + rounds)
                if found := self._turn(each, rounds * each.row.turn, each.lead + each.row.turn):
                    taken, host = (every[each.lead :] for every in found)
                    each.set(seconds=each.row.seconds + taken, host_seconds=each.row.host_seconds + host)
            rounds, expected = rounds + 1, time.perf_counter() - begin
        for each in timed:
            if each.step and not each.row.seconds:
                each.give_up(NO_TIME)
        self.rounds += rounds

    def _turn(self, each: Timed, first: int, count: int) -> Turn | None:
        """A turn of a variant. If it fails, or compiles anything again, the variant is given up; returns None."""
        before = compilations()
        try:
            found = self._time(each.step, first, count)
        except Exception as error:  # as in `prepare`
            return each.give_up(first_line(error))
        return found if compilations() == before else each.give_up(WRONG + RECOMPILED)

    def _time(self, step: StepFunction, first: int, count: int) -> Turn:
        """Time `count` iterations. On CUDA events give the times, and the host does not wait in between."""
        synchronize(self.device)
        host, marks = [], [self._now()]
        for i in range(first, first + count):
            begin = time.perf_counter()
            step(self.loader.train(i))
            host.append(time.perf_counter() - begin)
            marks.append(self._now())
        synchronize(self.device)
        if self.device.type != "cuda":
            return [b - a for a, b in pairwise(marks)], []
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)], host

    def _now(self) -> float | torch.cuda.Event:
        """The time now: an event on a CUDA device, seconds elsewhere."""
        if self.device.type != "cuda":
            synchronize(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def spare_memory(device: torch.device) -> float:
    """Bytes that may be taken; infinite unless the device is a CUDA device."""
    if device.type != "cuda":
        return math.inf
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free - SPARE * total


@contextmanager
def _loader(workload: Workload, device: torch.device) -> Iterator[Loader]:
    """A loader of random tokens from files, as in a run. There are so many that no batch comes twice."""
    config, rng = workload.config, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", 2**21), ("val", 2**14)):
            rng.integers(config.vocab_size, size=count, dtype="<u2").tofile(Path(folder, f"{split}.bin"))
        meta = {"vocab_size": config.vocab_size, "tokenizer": "byte", "dtype": "uint16"}
        Path(folder, "meta.json").write_text(json.dumps(meta))
        sizes = {"batch_size": workload.batch_size, "block_size": config.block_size}
        with Loader(Dataset(Path(folder)), **sizes, accumulation=workload.accumulation, device=device) as loader:
            yield loader
