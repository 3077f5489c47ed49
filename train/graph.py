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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.capture import capture_graphs
from train.data import Batch
from train.errors import UserError, first_line
from train.step import Evaluation, StepResult, TrainStep

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
    side, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    return capture_graphs([task.warm_up for task in tasks], [task.run for task in tasks], side, pool)


class Inputs:
    """The micro-batch that graphs read: x, y of `shape` (batch_size, block_size), int64."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.x, self.y = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))

    def put(self, x: Tensor, y: Tensor) -> None:
        """Copy a micro-batch in. ValueError, with the name, for another shape or dtype."""
        for name, there, value in (("x", self.x, x), ("y", self.y, y)):
            if value.shape != there.shape or value.dtype != there.dtype:
                got, expected = ((x.dtype, tuple(x.shape)) for x in (value, there))
                raise ValueError(f"{name}: got {got[0]} {got[1]}, expected {expected[0]} {expected[1]}, as captured")
        torch._foreach_copy_([self.x, self.y], [x, y])  # one launch


class GraphedEvaluation:
    """A captured `Evaluation`, with the same call and the same results."""

    def __init__(self, replay: Work, inputs: Inputs, loss: Tensor) -> None:
        """replay: computes the loss of the batch in `inputs` and writes it to `loss`."""
        self._replay, self._inputs, self._loss = replay, inputs, loss

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        losses = []
        for batch in batches:
            self._inputs.put(batch.x[0], batch.y[0])
            self._replay()
            losses.append(self._loss.clone())  # the next replay overwrites it
        return torch.stack(losses)


class GraphedStep:
    """A captured `step`, with the same call and the same results. ValueError for inputs of another shape.

    shape: (accumulation, batch_size, block_size) of all batches. Make it between two steps, when there are no
    gradients. Capturing runs the parts of a step a few times. Afterwards `step` is as before: parameters, moments, step
    count, loss scale, random state. This also holds if capturing fails, with a UserError. `capture` is `cuda_graphs`
    on CUDA; tests pass a tape.

    evaluation: of the same model, captured too, for batches of the same size; the result is the attribute `evaluation`.
    Both are captured together, so that all warm-ups end before a capture takes memory.
    """

    def __init__(
        self,
        step: TrainStep,
        shape: tuple[int, int, int],
        evaluation: Evaluation | None = None,
        capture: Capture = cuda_graphs,
    ) -> None:
        self.step, self.scaler = step, step.scaler
        self.accumulation, *micro = shape
        self._inputs = inputs = Inputs(micro, step.loss.device)
        tasks = [
            Task(lambda: step.micro_step(inputs.x, inputs.y, self.accumulation)),
            Task(step.update, prepare=step.optimizer.skip_next_update),
        ]
        if evaluation is not None:
            loss = torch.zeros_like(step.loss)

            def evaluate() -> None:
                with evaluation.mode():
                    loss.copy_(evaluation.loss(inputs.x, inputs.y))

            tasks.append(Task(evaluate))
        # An AccumulateGrad node remembers the stream that it was made on. It lives as long as a loss computed from it.
        # A node of another stream makes the capture fail (torch 2.13) or wait for that stream (2.11). `micro_step`
        # keeps no loss, but a cycle of unused objects may, for example a traceback. The collector frees it.
        gc.collect()
        try:
            with unchanged(step):
                self._micro_step, self._update, *more = capture(tasks)
        except torch.OutOfMemoryError:  # its message says what to do, and graphs are not the cause
            raise
        except Exception as error:  # of any type: from CUDA, Triton, or a library that cannot be captured
            raise UserError(
                f"cuda_graphs: got True, but the step could not be captured: {first_line(error)}; "
                f"--no-cuda_graphs goes on without"
            ) from error
        if evaluation is not None:
            self.evaluation = GraphedEvaluation(*more, inputs, loss)

    def __call__(self, batch: Batch, lr: float) -> StepResult:
        if len(batch.seeds) != self.accumulation:
            raise ValueError(f"batch: got {len(batch.seeds)} micro-steps, expected {self.accumulation}, as captured")
        self.step.begin(lr)
        for micro, seed in enumerate(batch.seeds):
            self.step.seed(seed)
            self._inputs.put(batch.x[micro], batch.y[micro])
            self._micro_step()
        self.step.reduce()
        self._update()
        return self.step.result()


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
