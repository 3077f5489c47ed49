"""The step and the evaluation, captured in CUDA graphs. A few calls launch them, so the host does not slow them down.

There are three graphs: a micro-step (forward and backward into the accumulated gradients), the update, and the forward
pass of an evaluation. So more micro-steps need no more memory. A replay reads the same addresses and uses the same
numbers as the captured run. What changes must lie in device memory (batch, rate, step count, loss scale) or come from
torch's generators, which a graph reads at every replay. Ranks sum their gradients between micro-steps and update.

The graphs share one pool of memory, as large as the largest of them needs. This is safe because nothing in the pool is
read after the replay that wrote it. Each graph writes its results to tensors that were made before the capture, and
replays follow each other on one stream.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.capture import capture_graphs, side_stream
from train.errors import UserError, first_line
from train.step import TrainStep

Work = Callable[[], None]


class Task(NamedTuple):
    """The work of one graph."""

    run: Work
    prepare: Work = lambda: None  # called before every run, outside the graph

    def warm_up(self) -> None:
        self.prepare()
        self.run()


# Captures tasks. It may run them too, but only before the first capture. Returns a replay for each.
Capture = Callable[[list[Task]], list[Work]]


def cuda_graphs(tasks: list[Task]) -> list[Work]:
    """Capture each task in a graph, after the warm-ups of all. Returns the graphs' replays."""
    side, pool = side_stream(torch.device("cuda", torch.cuda.current_device())), torch.cuda.graph_pool_handle()
    return capture_graphs([task.warm_up for task in tasks], [task.run for task in tasks], side, pool)


class GraphedStep(TrainStep):
    """A `step` whose micro-steps and updates are replayed. ValueError for inputs of another shape or dtype.

    shape: (batch_size, block_size) of all micro-batches. Make it between two steps, when there are no gradients.
    Capturing runs the parts of a step a few times. Afterwards `step` is as before: parameters, moments, step
    count, loss scale, random state. This also holds if capturing fails, with a UserError. `capture` is `cuda_graphs`
    on CUDA; tests pass a tape.

    evaluates: whether evaluations are captured too, of batches of the same size. All is captured together, so that all
    warm-ups end before a capture takes memory.
    """

    def __init__(
        self, step: TrainStep, shape: tuple[int, int], evaluates: bool = False, capture: Capture = cuda_graphs
    ) -> None:
        vars(self).update(vars(step))  # the same model, optimizer and tensors
        self._x, self._y = x, y = [torch.zeros(shape, dtype=torch.int64, device=step.loss.device) for _ in range(2)]
        self._evaluated = torch.zeros_like(step.loss)
        tasks = [
            Task(lambda: step.micro_step(x, y)),
            Task(step.update, prepare=step.optimizer.skip_next_update),
        ]
        if evaluates:
            tasks.append(Task(lambda: self._evaluated.copy_(step.evaluate(x, y))))
        # An AccumulateGrad node remembers the stream that it was made on. It lives as long as a loss computed from it.
        # A node of another stream makes the capture fail (torch 2.13) or wait for that stream (2.11). `micro_step`
        # keeps no loss, but a cycle of unused objects may, for example a traceback. The collector frees it.
        gc.collect()
        try:
            with unchanged(step):
                self._replay_micro_step, self._replay_update, *self._replay_evaluation = capture(tasks)
        except torch.OutOfMemoryError:  # its message says what to do, and graphs are not the cause
            raise
        except Exception as error:  # of any type: from CUDA, Triton, or a library that cannot be captured
            raise UserError(
                f"cuda_graphs: got True, but the step could not be captured: {first_line(error)}; "
                f"--no-cuda_graphs goes on without"
            ) from error

    def micro_step(self, x: Tensor, y: Tensor) -> None:
        self._put(x, y)
        self._replay_micro_step()

    def update(self) -> None:
        self._replay_update()

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        (replay,) = self._replay_evaluation
        self._put(x, y)
        replay()
        return self._evaluated.clone()  # the next replay overwrites it

    def _put(self, x: Tensor, y: Tensor) -> None:
        """Copy a micro-batch to where graphs read it. ValueError, with the name, for another shape or dtype."""
        for name, there, value in (("x", self._x, x), ("y", self._y, y)):
            if (value.dtype, value.shape) != (there.dtype, there.shape):
                got, expected = (f"{t.dtype} {tuple(t.shape)}" for t in (value, there))
                raise ValueError(f"{name}: got {got}, expected {expected}, as captured")
        torch._foreach_copy_([self._x, self._y], [x, y])  # one launch


@contextmanager
def unchanged(step: TrainStep) -> Iterator[None]:
    """Micro-steps and skipped updates may run inside. Afterwards the step's state and torch's generators are as before.

    Micro-steps write gradients and the loss. Skipped updates clear gradients and write the norm and the loss scale. So
    it is enough to clear the gradients and restore a few scalars. Nothing as large as the model is copied.
    """
    scaler = step.scaler
    scalars = [step.loss, step.grad_norm, scaler.scale, scaler.growth_tracker]
    kept = [x.clone() for x in scalars]
    devices = [step.loss.device] if step.loss.is_cuda else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            step.optimizer.clear()
            for x, before in zip(scalars, kept, strict=True):
                x.copy_(before)
