"""AdamW over a GPT's flat state. Parameter groups and state_dict are the same as nanoGPT's."""

import torch
from torch import Tensor

from kernels import Ops
from model import GPT
from model.gpt import param_groups
from train.distributed import World
from train.flat import FlatState


class Optimizer:
    """What a step asks of an optimizer, beside torch's own methods. Its state_dict is AdamW's, as in nanoGPT.

    several: whether an update takes the sum of several gradients, of micro-steps or ranks; otherwise a micro-step's
    gradient replaces the one before.
    """

    several = True

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next updates."""
        for group in self.param_groups:
            group["lr"] = lr

    def gather(self) -> None:
        """Finish the gradients of a micro-step, after its backward pass."""

    def reduce(self, world: World) -> None:
        """Sum the gradients over the ranks."""

    def update(self, max_norm: float, inv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip, update, clear the gradients. Returns (gradient norm, found_inf), float32 scalars on the device.

        max_norm: 0 for no clipping. inv_scale: gradients are multiplied by it first. found_inf: 1 if a gradient is not
        finite; then gradients are cleared and nothing else changes.
        """
        raise NotImplementedError

    def clear(self) -> None:
        """Clear the gradients."""
        self.zero_grad()

    def skip_next_update(self) -> None:
        """Make the next update clear the gradients and do nothing else. For a capture's warm-ups, of an optimizer whose
        `update` a CUDA graph can capture: all that it reads or changes lies on the device."""
        raise NotImplementedError


class FlatAdamW(Optimizer, torch.optim.AdamW):
    """torch's AdamW, with the same rule and state_dict. Its update is one call of `ops.adamw` over flat buffers.

    lr (), steps (): float32 on the device, so that a captured update reads their values at its replay.
    """

    def __init__(
        self,
        model: GPT,
        ops: Ops,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        several: bool = False,
    ) -> None:
        """model, ops, several: as for FlatState, which moves the model's parameters to flat buffers."""
        self.flat, self._adamw = FlatState(model, ops, several=several), ops.adamw
        super().__init__(param_groups(model, weight_decay), lr=learning_rate, betas=betas)
        self.several, device = several, self.flat.param.device
        self.lr, self.steps = (torch.full((), value, device=device) for value in (learning_rate, 0.0))
        self._make_state_views()

    def _make_state_views(self) -> None:
        """Every tensor's moments become views of the flat ones. All tensors share one step count."""
        for p in self.flat.places:
            moments = {name: self.flat.view(getattr(self.flat, name), p) for name in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": self.steps, **moments}

    def gather(self) -> None:
        self.flat.gather()

    def reduce(self, world: World) -> None:
        world.sum(self.flat.grad)  # all in one exchange

    def clear(self) -> None:
        self.flat.clear()

    def skip_next_update(self) -> None:
        self.flat.grad[:1].fill_(float("nan"))  # then the update is skipped

    def set_lr(self, lr: float) -> None:
        self.lr.fill_(lr)  # captured updates read it
        super().set_lr(lr)

    @torch.no_grad()
    def update(self, max_norm: float, inv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat, group = self.flat, self.param_groups[0]
        results = self._adamw(
            flat.param,
            flat.grad,
            flat.exp_avg,
            flat.exp_avg_sq,
            self.lr,
            self.steps,
            n_decay=flat.n_decay,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            max_norm=max_norm,
            inv_scale=inv_scale,
            compute=flat.compute,
        )
        if flat.several:  # otherwise the next micro-step replaces it
            flat.grad.zero_()
        return results

    def state_dict(self) -> dict:
        """As torch's: the moments of each parameter, and a step count for each, because torch increments each one."""
        state = super().state_dict()
        taken = {i: {**entry, "step": entry["step"].clone()} for i, entry in state["state"].items()}
        return {**state, "state": taken}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of torch's AdamW or ours. Without moments, they start at zero."""
        super().load_state_dict(state_dict)
        loaded = dict(self.state)
        self._make_state_views()
        for p, own in self.state.items():
            for name, buffer in own.items():
                buffer.copy_(loaded[p][name] if p in loaded else torch.zeros(()))


class LossScale:
    """float16's loss scale, with torch.amp.GradScaler's rule and state, on the device.

    The loss is multiplied by `scale`. An update whose gradients overflowed is skipped and halves `scale`. 2000 updates
    in a row without overflow double it. `enabled` False: no scale.
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), 65536.0, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Change the scale. found_inf: float32 scalar, 1 if the update was skipped."""
        if self.enabled:
            torch._amp_update_scale_(
                self.scale, self.growth_tracker, found_inf, self.GROWTH, self.BACKOFF, self.INTERVAL
            )

    def state_dict(self) -> dict:
        """GradScaler's state; {} if not enabled."""
        if not self.enabled:
            return {}
        return {
            "scale": self.scale.item(),
            "growth_factor": self.GROWTH,
            "backoff_factor": self.BACKOFF,
            "growth_interval": self.INTERVAL,
            "_growth_tracker": self.growth_tracker.item(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.scale.fill_(state["scale"])
        self.growth_tracker.fill_(state["_growth_tracker"])
