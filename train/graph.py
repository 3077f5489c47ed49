"""The step captured in CUDA graphs: launched by two or three calls, with no host in the way.

One graph holds a micro-step, forward and backward into the accumulated gradients; the other the update. So accumulation
of any length costs no more memory. A captured launch reads its inputs where they lay and its numbers as they were: what
changes lies in device memory (batch, rate, step count, loss scale) or in torch's generators, which a graph asks anew at
every replay. Between the two, ranks sum their gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from train.data import Batch
from train.step import StepResult, TrainStep

Work = Callable[[], None]
Capture = Callable[[Work], Work]  # runs the work as it likes; returns what repeats it
WARM_UP = 3  # runs before a capture: kernels compile, libraries choose and allocate


def cuda_graph(work: Work) -> Work:
    """Capture the work, after a warm-up on a side stream; returns the graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: the loader's thread may allocate pinned memory meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class GraphedStep:
    """`step`, captured: the same call, the same results. Inputs keep their shapes, or a ValueError names the one.

    shape: (accumulation, batch_size, block_size) of the batches to come. Capturing runs the step a few times; its state
    is put back as it was: parameters, moments, step count, gradients, loss scale, random state. `capture` is
    `cuda_graph` wherever there is CUDA; tests pass a tape.
    """

    def __init__(self, step: TrainStep, shape: tuple[int, int, int], capture: Capture = cuda_graph) -> None:
        self.step, self.scaler = step, step.scaler
        self.accumulation, *micro = shape
        self.x, self.y = (torch.zeros(micro, dtype=torch.int64, device=step.loss.device) for _ in range(2))
        with unchanged(step):
            self._micro_step = capture(lambda: step.micro_step(self.x, self.y, self.accumulation))
            self._update = capture(step.update)

    def __call__(self, batch: Batch, lr: float) -> StepResult:
        if len(batch.seeds) != self.accumulation:
            raise ValueError(f"batch: got {len(batch.seeds)} micro-steps, expected {self.accumulation}, as captured")
        self.step.begin(lr)
        for micro, seed in enumerate(batch.seeds):
            self.step.seed(seed)
            self._put(self.x, batch.x[micro], "x")
            self._put(self.y, batch.y[micro], "y")
            self._micro_step()
        self.step.reduce()
        self._update()
        return self.step.result()

    @staticmethod
    def _put(there: Tensor, value: Tensor, name: str) -> None:
        if value.shape != there.shape or value.dtype != there.dtype:
            got, expected = ((x.dtype, tuple(x.shape)) for x in (value, there))
            raise ValueError(f"{name}: got {got[0]} {got[1]}, expected {expected[0]} {expected[1]}, as captured")
        there.copy_(value, non_blocking=True)


@contextmanager
def unchanged(step: TrainStep) -> Iterator[None]:
    """Whatever runs inside, the step's state and torch's generators are afterwards as they were before.

    What is kept lies in host memory: there may be no room for it twice on the device.
    """
    optimizer, scaler = step.optimizer, step.scaler
    flat = optimizer.flat
    state = [flat.param, flat.exp_avg, flat.exp_avg_sq, flat.grad, flat.total, flat.compute, optimizer.steps]
    state += [optimizer.lr, scaler.scale, scaler.growth_tracker, step.loss, step.grad_norm]
    kept = [(x, x.cpu().clone()) for x in state if x is not None]
    devices = [flat.param.device] if flat.param.is_cuda else []
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for x, before in kept:
            x.copy_(before)
