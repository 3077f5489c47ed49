"""One optimizer step: micro-steps, accumulation, clipping, update; and an evaluation. The loop around them: `loop.py`.

Everything that changes from step to step lies in device memory, and nothing here waits for the device or branches on
what it computed: so `graph.py` can capture `micro_step` and `update` and replay them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.data import Batch
from train.distributed import Reducer
from train.optim import LossScale, Optimizer


class StepResult(NamedTuple):
    """Device tensors: reading one waits for the device, so the step itself never does."""

    loss: Tensor  # float32 scalar, the mean over this rank's micro-steps
    grad_norm: Tensor  # float32 scalar, of all ranks' mean gradient, before clipping


class TrainStep:
    """step(batch, lr) -> StepResult, leaving the parameters one AdamW update further and no gradients behind.

    `model` maps (idx, targets) to (logits, loss) and may be compiled. `grad_clip` is the largest global gradient norm,
    0 for no clipping. `scaler` scales float16's losses so that small gradients survive; updates whose gradients
    overflowed are skipped. `reducer` sums gradients over ranks; a sharded model sums its own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        grad_clip: float,
        scaler: LossScale | None = None,
        reducer: Reducer | None = None,
    ) -> None:
        self.model, self.optimizer, self.grad_clip = model, optimizer, grad_clip
        self.loss, self.grad_norm = optimizer.scalar(), optimizer.scalar()
        self.scaler = scaler or LossScale(self.loss.device, enabled=False)
        self.reducer = reducer

    def __call__(self, batch: Batch, lr: float) -> StepResult:
        self.begin(lr)
        accumulation = len(batch.seeds)
        for micro, seed in enumerate(batch.seeds):
            self.seed(seed)
            if self.reducer is not None and micro == accumulation - 1:
                self.reducer.start_with_backward()
            self.micro_step(batch.x[micro], batch.y[micro], accumulation)
        self.reduce()
        self.update()
        return self.result()

    def begin(self, lr: float) -> None:
        """A new step, at this rate."""
        self.optimizer.set_lr(lr)
        self.loss.zero_()

    @staticmethod
    def seed(seed: int) -> None:
        """Dropout draws from torch's generators. Seeding them for every micro-step makes the masks, like the data, a
        function of (seed, step): nothing to save, nothing that an evaluation could disturb."""
        torch.manual_seed(seed)

    def micro_step(self, x: Tensor, y: Tensor, accumulation: int) -> None:
        """Forward and backward of one of `accumulation`: adds to the gradients and to the mean loss."""
        loss = self.model(x, y)[1]  # the logits are not held
        mean = loss / accumulation
        (mean * self.scaler.scale if self.scaler.enabled else mean).backward()
        if self.reducer is None or not self.reducer.overlapping:
            self.optimizer.gather()
        self.loss += mean.detach()

    def reduce(self) -> None:
        """Sum the gradients over the ranks."""
        if self.reducer is not None:
            self.reducer.finish()

    def update(self) -> None:
        """Norm, clipping, AdamW, and the gradients cleared."""
        size = 1 if self.reducer is None else self.reducer.world.size
        inv_scale = None
        if self.scaler.enabled:
            inv_scale = 1 / (self.scaler.scale * size)
        elif size > 1:
            inv_scale = torch.full_like(self.grad_norm, 1 / size)
        norm, found_inf = self.optimizer.update(self.grad_clip, inv_scale)
        self.scaler.update(found_inf)
        self.grad_norm.copy_(norm)

    def result(self) -> StepResult:
        """Of the step just made; copies, since the next one writes in the same places."""
        return StepResult(self.loss.clone(), self.grad_norm.clone())


class Evaluation:
    """evaluation(batches) -> the loss of each, (n,) float32 on the device: without dropout, gradients or a host sync.

    `model` maps (idx, targets) to (logits, loss) and may be compiled; outside of an evaluation it trains. A batch is
    one micro-step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        with self.mode():
            return torch.stack([self.loss(batch.x[0], batch.y[0]) for batch in batches])

    @contextmanager
    def mode(self) -> Iterator[None]:
        """What `loss` is to be called in."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of one micro-batch."""
        return self.model(x, y)[1]
