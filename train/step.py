"""One optimizer step (micro-steps, accumulation, clipping, update), and an evaluation. `loop.py` calls both.

Everything that changes from step to step lies in device memory. Nothing here waits for the device or branches on its
results. So `graph.py` can capture `micro_step`, `update` and `evaluate` and replay them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.data import Batch
from train.distributed import World
from train.optim import LossScale, Optimizer


class StepResult(NamedTuple):
    """Tensors on the device. Reading one waits for the device, so the step never reads them."""

    loss: Tensor  # float32 scalar, the mean over this rank's micro-steps
    grad_norm: Tensor  # float32 scalar, of all ranks' mean gradient, before clipping


class TrainStep:
    """step(batch, lr) -> StepResult. Makes one AdamW update and clears the gradients.

    `model` maps (idx, targets) to (logits, loss) and may be compiled. `accumulation`: micro-steps in a step.
    `grad_clip`: the largest global gradient norm, 0 for no clipping. `scaler` scales float16's losses, so that small
    gradients do not vanish; updates whose gradients overflowed are skipped. `world`: the ranks to sum gradients over;
    None for a sharded model, which does it itself.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        grad_clip: float,
        accumulation: int = 1,
        scaler: LossScale | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.optimizer, self.grad_clip, self.accumulation = model, optimizer, grad_clip, accumulation
        weight = optimizer.param_groups[0]["params"][0]
        self._results = torch.zeros(2, dtype=weight.dtype, device=weight.device)
        self.loss, self.grad_norm = self._results[0], self._results[1]
        self.scaler = scaler or LossScale(self.loss.device, enabled=False)
        self.world = world or World()
        assert optimizer.several or accumulation == self.world.size == 1, "gradients would be lost"
        self._share = torch.full_like(self.loss, 1 / accumulation)  # of a micro-step in the mean loss

    def __call__(self, batch: Batch, lr: float) -> StepResult:
        assert len(batch.seeds) == self.accumulation
        self.optimizer.set_lr(lr)
        self.loss.zero_()
        for micro, seed in enumerate(batch.seeds):
            # Dropout draws from torch's generators. With a seed for every micro-step the masks, like the data, depend
            # only on (seed, step). A checkpoint needs no random state, and an evaluation changes no mask.
            if self.loss.device.type == "cpu":
                torch.default_generator.manual_seed(seed)
            else:  # all devices; for those that are not there yet it stores the call, with its traceback: 0.1 to 0.4 ms
                torch.manual_seed(seed)
            self.micro_step(batch.x[micro], batch.y[micro])
        if self.world.size > 1:
            self.optimizer.reduce(self.world)
        self.update()
        return StepResult(*self._results.clone())  # copies: the next step overwrites the originals

    def micro_step(self, x: Tensor, y: Tensor) -> None:
        """Forward and backward of one micro-step. Adds to the gradients and to the mean loss."""
        # the gradient of its loss, () on the device: its share of the mean, times the loss scale
        dloss = self.scaler.scale / self.accumulation if self.scaler.enabled else self._share
        loss = self.model(x, y, dloss=dloss)[1]  # does not keep the logits
        loss.backward(dloss)
        self.optimizer.gather()
        loss = loss.detach()
        self.loss += loss if self.accumulation == 1 else loss / self.accumulation

    def update(self) -> None:
        """Compute the gradient norm, clip, make the AdamW update, clear the gradients."""
        size = self.world.size
        inv_scale = None
        if self.scaler.enabled:
            inv_scale = 1 / (self.scaler.scale * size)
        elif size > 1:
            inv_scale = torch.full_like(self.grad_norm, 1 / size)
        norm, found_inf = self.optimizer.update(self.grad_clip, inv_scale)
        self.scaler.update(found_inf)
        self.grad_norm.copy_(norm)

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one micro-batch, without dropout. Outside of an evaluation the model is in training mode."""
        self.model.eval()
        try:
            return self.model(x, y)[1]
        finally:
            self.model.train()
