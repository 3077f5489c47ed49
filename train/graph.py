"""The step and the evaluation captured in CUDA graphs: launched by a few calls, with no host in the way.

One graph holds a micro-step, forward and backward into the accumulated gradients; one the update; one the forward pass
of an evaluation. So accumulation of any length costs no more memory. A captured launch reads its inputs where they lay
and its numbers as they were: what changes lies in device memory (batch, rate, step count, loss scale) or in torch's
generators, which a graph asks again at every replay. Between micro-steps and update, ranks sum their gradients.

The graphs share one pool of memory, which is as large as the largest of them needs. This is safe because nothing in the
pool is read after the replay that wrote it: each graph leaves its results in tensors that were made before the capture,
and replays follow each other on one stream.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.capture import capture_graph
from train.data import Batch
from train.errors import UserError, first_line
from train.step import Evaluation, StepResult, TrainStep

Work = Callable[[], None]
WARM_UP = 3  # runs before a capture: kernels compile, libraries choose and allocate


class Task(NamedTuple):
    """What one graph holds."""

    run: Work
    prepare: Work = lambda: None  # comes before every run, outside the graph


# Runs each task as it likes, every one before the first is captured; returns what repeats each.
Capture = Callable[[list[Task]], list[Work]]


def cuda_graphs(tasks: list[Task]) -> list[Work]:
    """Capture each task in a graph, after warm-ups; returns the graphs' replays.

    All warm-ups come first: a capture takes memory for good, and a warm-up after it would need its own beside that.
    Warm-ups and captures share one side stream. So cuBLAS allocates its workspace for that stream before the captures
    and outside the pool, and no node of autograd remembers another stream.
    """
    side, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    side.wait_stream(torch.cuda.current_stream())
    # entered here too, because a capture that fails leaves its stream the current one
    with torch.cuda.stream(side):
        for task in tasks:
            for _ in range(WARM_UP):
                task.prepare()
                task.run()
        replays = [capture_graph(task.run, side, pool) for task in tasks]
    torch.cuda.current_stream().wait_stream(side)
    return replays


class Inputs:
    """Where graphs find a micro-batch: x, y of `shape` (batch_size, block_size), int64."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.x, self.y = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))

    def put(self, x: Tensor, y: Tensor) -> None:
        """ValueError for other shapes or dtypes, naming the one."""
        for name, there, value in (("x", self.x, x), ("y", self.y, y)):
            if value.shape != there.shape or value.dtype != there.dtype:
                got, expected = ((x.dtype, tuple(x.shape)) for x in (value, there))
                raise ValueError(f"{name}: got {got[0]} {got[1]}, expected {expected[0]} {expected[1]}, as captured")
            there.copy_(value, non_blocking=True)


class GraphedEvaluation:
    """An `Evaluation`, captured: the same call, the same results."""

    def __init__(self, replay: Work, inputs: Inputs, loss: Tensor) -> None:
        """replay: leaves the loss of what is in `inputs` in `loss`."""
        self._replay, self._inputs, self._loss = replay, inputs, loss

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        losses = []
        for batch in batches:
            self._inputs.put(batch.x[0], batch.y[0])
            self._replay()
            losses.append(self._loss.clone())  # the next replay writes in the same place
        return torch.stack(losses)


class GraphedStep:
    """`step`, captured: the same call, the same results. Inputs keep their shapes, or a ValueError names the one.

    shape: (accumulation, batch_size, block_size) of the batches to come. To be made between two steps, when there are
    no gradients. Capturing runs the parts of a step a few times, and `step` is afterwards as it was: parameters,
    moments, step count, loss scale, random state. So it is where capturing fails, with a UserError. `capture` is
    `cuda_graphs` wherever there is CUDA; tests pass a tape.

    evaluation: of the same model, to be captured too, for batches of the same size: then the attribute `evaluation` is
    that. Both are captured at once, so that all warm-ups are over before a capture takes memory.
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
        # An AccumulateGrad node remembers the stream it was made on, and lives as long as any loss that leads to it.
        # Met in a capture, one from another stream makes the capture fail (torch 2.13) or wait for that stream (2.11).
        # Nobody here keeps a loss: `micro_step` drops its own. One that a cycle of dropped objects holds, a traceback
        # say, goes now.
        gc.collect()
        try:
            with unchanged(step):
                self._micro_step, self._update, *more = capture(tasks)
        except torch.OutOfMemoryError:  # which says what to do itself, and graphs are not to blame
            raise
        except Exception as error:  # from CUDA, Triton, a library that does what no capture may: all kinds
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
    """Micro-steps and skipped updates may run inside; the step's state and torch's generators are then as before.

    Micro-steps write gradients and the loss. Skipped updates clear gradients and write the norm and the loss scale. So
    gradients are cleared and the few scalars put back; nothing as large as the model is ever copied.
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
