"""Models whose state outgrows one device: `--shard` gives each rank its share of every tensor, by torch's FSDP2.

A block's parameters are gathered, in the compute dtype, for its forward pass and again for its backward pass; its
gradients are summed over the ranks in float32 and each keeps its share. So a rank holds 1/size of parameters, gradients
and moments, and one block whole. (Zhao et al. 2023, "PyTorch FSDP"; `torch.distributed.fsdp.fully_shard`.)

It is the library's road, beside the project's own (`flat.py`, `graph.py`): torch's AdamW over the shares, and no CUDA
graphs. Checkpoints hold whole tensors, as any other run's, and load on any number of ranks.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model import GPT
from train.checkpoint import MOMENTS
from train.distributed import World
from train.optim import param_groups


def share_out(model: GPT, world: World, device: torch.device) -> None:
    """Share out `model`, whole on every rank's host and the same on each, over the ranks' devices, in place.

    A rank's device holds at most one block whole at a time, also while this runs. The compute dtype is what the
    parameters are gathered as.
    """
    # Nothing here writes into a block's output in place, which is what torch warns of, once a rank.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    compute = model.precision.compute
    low = None if compute == torch.float32 else compute
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        # the stream that goes from block to block keeps its own dtype
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for block in model.transformer.h:
        fully_shard(block, **settings)
    fully_shard(model, **settings)


class ShardedAdamW(torch.optim.AdamW):
    """torch's AdamW over a sharded model, called as `FlatAdamW` is.

    Every method must be called on all ranks. Gradients arrive as means over the ranks. float16's loss scale is not
    served.
    """

    def __init__(self, model: GPT, *, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(param_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)
        self._params = [p for group in self.param_groups for p in group["params"]]
        assert all(isinstance(p, DTensor) for p in self._params)

    def scalar(self) -> Tensor:
        """A zero, float32, where the parameters are."""
        return torch.zeros((), device=self._params[0].device)

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def gather(self) -> None:
        """FSDP adds up micro-steps' gradients itself."""

    def clear(self) -> None:
        self.zero_grad()

    @torch.no_grad()
    def update(self, max_norm: float = 0.0, inv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip, update, clear the gradients: (gradient norm, 0), float32 scalars on the device."""
        assert inv_scale is None
        norm = get_total_norm([p.grad for p in self._params]).full_tensor()
        if max_norm > 0:
            clip_grads_with_norm_(self._params, max_norm, norm)
        self.step()
        self.zero_grad()
        return norm, torch.zeros_like(norm)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """From whole tensors, the same on every rank, as in a checkpoint."""
        state = {}
        for index, entry in state_dict["state"].items():
            moments = {name: share(entry[name], self._params[index]) for name in MOMENTS}
            state[index] = {**entry, **moments}
        super().load_state_dict({**state_dict, "state": state})


def share(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's share of a tensor that every rank has whole, laid out as `like`."""
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tree: Any, *, keep: bool) -> Any:
    """`tree` of dicts, lists and plain values, its tensors whole and on the CPU; None for them where not `keep`.

    Every rank must call it, with the same tree: tensors are put together one after the other.
    """
    if isinstance(tree, Tensor):
        put_together = tree.full_tensor() if isinstance(tree, DTensor) else tree
        return put_together.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: whole(value, keep=keep) for key, value in tree.items()}
    return [whole(value, keep=keep) for value in tree] if isinstance(tree, list) else tree


def whole_model(model: GPT, *, keep: bool) -> dict[str, Tensor]:
    """A sharded model's state_dict, whole and on the CPU where `keep`; called on every rank. Tied weights stay one."""
    parameters = whole({name: p.detach() for name, p in model.named_parameters()}, keep=keep)
    names = {p: name for name, p in model.named_parameters()}
    return {name: parameters[names[p]] for name, p in model.named_parameters(remove_duplicate=False)}
