"""One optimizer step: micro-steps, accumulation, clipping, update. The loop around it lives in `loop.py`."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.data import Batch


class StepResult(NamedTuple):
    """Device tensors: reading one waits for the device, so the step itself never does."""

    loss: Tensor  # float32 scalar, the mean over this rank's micro-steps
    grad_norm: Tensor  # float32 scalar, of all ranks' mean gradient, before clipping


class TrainStep:
    """step(batch, lr) -> StepResult, leaving the parameters one AdamW update further and no gradients behind.

    `model` maps (idx, targets) to (logits, loss) and may be compiled or wrapped in DDP, which then averages gradients
    over ranks in the last micro-step. `grad_clip` is the largest global gradient norm, 0 for no clipping. `scaler`
    scales float16's losses so that small gradients survive; it skips updates whose gradients overflowed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        grad_clip: float,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.optimizer, self.grad_clip = model, optimizer, grad_clip
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.parameters = list(model.parameters())

    def __call__(self, batch: Batch, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        accumulation = len(batch.seeds)
        losses = []
        for micro, seed in enumerate(batch.seeds):
            # Dropout draws from torch's global generator. Seeding it for every micro-step makes the masks, like the
            # data, a function of (seed, step): nothing to save, nothing that an evaluation could disturb.
            torch.manual_seed(seed)
            with self._gradient_sync(last=micro == accumulation - 1):
                _, loss = self.model(batch.x[micro], batch.y[micro])
                self.scaler.scale(loss / accumulation).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(torch.stack(losses).mean(), grad_norm)

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager:
        """DDP reduces gradients in every backward pass unless told not to; once a step is enough."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()
