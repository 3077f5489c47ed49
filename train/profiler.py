"""--profile: a few steps under torch.profiler, a Chrome trace of them, and where their time went beside where it must.

The step is wrapped and the loop does not know: what the step computes, and with which bits, stays the same. Only the
master rank's step is wrapped.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from model import GPT
from train.breakdown import Bounds, report
from train.ceilings import measure_ceilings
from train.config import TrainConfig
from train.data import Batch
from train.distributed import World
from train.files import replace_together, staging_folder
from train.graph import GraphedStep
from train.hardware import synchronize
from train.step import StepResult, TrainStep
from train.timeline import WINDOW, read

WARM_UP, STEPS = 5, 5  # iterations before those that are profiled, and those
MICRO_STEPS = 40  # at most: a trace that no viewer opens helps nobody
TRACE = "trace.json"


def profiled_iterations(first: int, max_iters: int, eval_interval: int, accumulation: int) -> range:
    """Which iterations of a run that begins with `first` are profiled: some after a warm-up, no evaluation among them.

    Empty where there are none such before max_iters.
    """
    count = min(STEPS, max(1, MICRO_STEPS // accumulation), eval_interval - 1)
    begin = first + WARM_UP
    evaluated = -(-begin // eval_interval) * eval_interval  # the first iteration from begin on that one comes before
    if evaluated < begin + count:
        begin = evaluated + 1
    return range(begin, min(begin + count, max_iters))


def profiled_step(
    step: TrainStep | GraphedStep,
    config: TrainConfig,
    model: GPT,
    world: World,
    first: int,
    say: Callable[[str], None],
) -> "ProfiledStep":
    """`step`, which trains `model`, profiled as the settings want. first: the run's first iteration."""
    dtype, micro_steps = model.compute_dtype, config.gradient_accumulation_steps
    accumulation = micro_steps // world.size
    bounds = Bounds(
        measure_ceilings(step.scaler.scale.device, dtype),
        model.config,
        config.batch_size,
        accumulation=accumulation,
        compute=dtype.itemsize,
        stream=model.stream_dtype.itemsize,
        gradients=4 if micro_steps > 1 else dtype.itemsize,  # summed in float32 where there are several
        shards=world.size if config.shard else 1,
    )
    which = profiled_iterations(first, config.max_iters, config.eval_interval, accumulation)
    return ProfiledStep(step, which, first, bounds=bounds, out_dir=Path(config.out_dir), say=say)


class ProfiledStep:
    """`step`, the same call and the same results; iterations `which` of a run that begins with `first` are profiled.

    The window is from the end of the step before them to the end of the last of them, whatever the loop does between
    two steps included. say: prints lines.
    """

    def __init__(
        self,
        step: TrainStep | GraphedStep,
        which: range,
        first: int,
        *,
        bounds: Bounds,
        out_dir: Path,
        say: Callable[[str], None],
    ) -> None:
        self.step, self.scaler = step, step.scaler
        self.which, self.bounds, self.out_dir, self.say = which, bounds, out_dir, say
        self._iteration, self._device = first, step.scaler.scale.device
        self._profile: profile | None = None  # while it runs
        self._done = False
        self._host: list[float] = []  # seconds of the warm-up's calls

    def __call__(self, batch: Batch, lr: float) -> StepResult:
        i, self._iteration = self._iteration, self._iteration + 1
        if not self.which or i >= self.which.stop:
            return self.step(batch, lr)
        if i < self.which.start:
            result = self._timed(batch, lr)
            if i == self.which.start - 1:
                self._begin()
            return result
        with record_function(f"iteration {i}"):
            result = self.step(batch, lr)
        if i == self.which.stop - 1:
            self._finish()
        return result

    @property
    def _iterations(self) -> str:
        return f"iterations {self.which.start} to {self.which.stop - 1}"

    def _timed(self, batch: Batch, lr: float) -> StepResult:
        """A step of the warm-up, whose host time is noted: with nothing queued before it, and no profiler."""
        synchronize(self._device)
        begin = time.perf_counter()
        result = self.step(batch, lr)
        self._host.append(time.perf_counter() - begin)
        return result

    def _begin(self) -> None:
        self.say(f"profile: {self._iterations} run under the profiler, which takes its part of their times")
        on_device = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_device], acc_events=True)
        synchronize(self._device)
        self._profile.start()
        self._window = record_function(WINDOW)
        self._window.__enter__()

    def _finish(self) -> None:
        synchronize(self._device)
        self._window.__exit__(None, None, None)
        self._profile.stop()
        try:
            with staging_folder(self.out_dir) as staging:
                self._profile.export_chrome_trace(str(staging / TRACE))
                trace = json.loads((staging / TRACE).read_bytes())
                replace_together(staging, self.out_dir, (TRACE,))
        except (OSError, ValueError) as error:  # the disk is full, say: no reason to end a training run
            self.say(f"profile: {self.out_dir / TRACE} could not be written: {error}")
        else:
            on_cuda = self._device.type == "cuda"
            host = statistics.median(self._host[1:]) if on_cuda else None
            self.say(report(read(trace, cuda=on_cuda), len(self.which), self.bounds, host))
            self.say(f"trace: {self.out_dir / TRACE}, for ui.perfetto.dev or chrome://tracing")
        self._profile, self._done = None, True

    def end(self) -> None:
        """The run is over: say so if it was before there was anything to show.

        To be called however it ended: Python cannot exit with a profiler that runs.
        """
        if self._profile is not None:
            self._window.__exit__(None, None, None)
            self._profile.stop()
        if not self.which:
            self.say(f"profile: none; it takes more than {WARM_UP} iterations, and two of them between evaluations")
        elif not self._done:
            self.say(f"profile: none; the run ended before {self._iterations} were done")
