"""Models whose state is too large for one device. `--shard` gives each rank a share of every tensor, by torch's FSDP2.

A block's parameters are gathered, in the compute dtype, for its forward pass and again for its backward pass. Its
gradients are summed over the ranks in float32, and each rank keeps its share. So a rank holds 1/size of parameters,
gradients and moments, and one whole block. (Zhao et al. 2023, "PyTorch FSDP"; `torch.distributed.fsdp.fully_shard`.)

This path uses the library instead of `flat.py` and `graph.py`: torch's AdamW over the shares, and no CUDA graphs.
Checkpoints hold whole tensors, as in any other run, and load on any number of ranks.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_map_only

from model import GPT
from model.gpt import param_groups
from train.checkpoint import MOMENTS
from train.distributed import World
from train.optim import Optimizer


def share_out(model: GPT, world: World, device: torch.device) -> None:
    """Split `model` over the ranks' devices, in place. Before, every rank has the same whole model on its host.

    A rank's device holds at most one whole block at a time, also during this call. Parameters are gathered in the
    compute dtype.
    """
    # torch warns each rank not to write into a block's output in place. Nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    compute = model.precision.compute
    low = None if compute == torch.float32 else compute
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        # the residual stream between blocks keeps its own dtype
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for block in model.transformer.h:
        fully_shard(block, **settings)
    fully_shard(model, **settings)


class ShardedAdamW(Optimizer, torch.optim.AdamW):
    """torch's AdamW over a sharded model. FSDP adds up the gradients of micro-steps, and takes the mean over the ranks.

    Every method must be called on all ranks. There is no loss scale for float16.
    """

    def __init__(self, model: GPT, *, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(param_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)
        self._params = [p for group in self.param_groups for p in group["params"]]
        assert all(isinstance(p, DTensor) for p in self._params)

    @torch.no_grad()
    def update(self, max_norm: float, inv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert inv_scale is None
        norm = get_total_norm([p.grad for p in self._params]).full_tensor()
        if max_norm > 0:
            clip_grads_with_norm_(self._params, max_norm, norm)
        self.step()
        self.zero_grad()
        return norm, torch.zeros_like(norm)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load whole tensors, as in a checkpoint. Every rank passes the same ones."""
        state = {}
        for index, entry in state_dict["state"].items():
            p = self._params[index]
            for name in MOMENTS:  # this rank's share of a tensor that every rank has whole
                moment = distribute_tensor(entry[name].to(p.device), p.device_mesh, p.placements, src_data_rank=None)
                entry = {**entry, name: moment}
            state[index] = entry
        super().load_state_dict({**state_dict, "state": state})


def whole(tree: Any, *, keep: bool) -> Any:
    """A copy of `tree` (dicts, lists, plain values) with whole tensors on the CPU, or None for tensors if not `keep`.

    Every rank must call it with the same tree, because the ranks gather one tensor after the other.
    """

    def put_together(x: Tensor) -> Tensor | None:
        x = x.full_tensor() if isinstance(x, DTensor) else x
        return x.cpu() if keep else None

    return tree_map_only(Tensor, put_together, tree)


def whole_model(model: GPT, *, keep: bool) -> dict[str, Tensor]:
    """A sharded model's state_dict, by `whole`. Every rank must call it. Tied weights stay one tensor."""
    model.reshard()  # an evaluation leaves the embeddings and the last LayerNorm gathered, in the compute dtype
    parameters = whole({name: p.detach() for name, p in model.named_parameters()}, keep=keep)
    names = {p: name for name, p in model.named_parameters()}
    return {name: parameters[names[p]] for name, p in model.named_parameters(remove_duplicate=False)}
