"""A model's state in flat buffers: parameters, their copies in the compute dtype, gradients, moments.

All buffers have the same layout: first the tensors that decay (2 or more dimensions), in named_parameters' order, then
the others. Each tensor starts at a multiple of ALIGN elements. The gaps always hold zeros. So an update is one launch,
zeroing is one memset, and ranks sum their gradients in a few large calls.

With bfloat16 or float16 the model reads copies of its parameters in that dtype. The optimizer writes the copies as it
updates, so the forward pass has no casts. Gradients are those of the copies. They are summed in float32 if there are
several to sum, over micro-steps or ranks.
"""

import torch
from torch import Tensor, nn

from model import GPT

ALIGN = 64  # elements: 128 bytes of a 2-byte type, a cache line


class FlatState:
    """Flat buffers of n elements; [0, n_decay) decay. The model's parameters become views of `param`.

    model: on its device, in float32; `model.precision` says which copies it gets. in_float32: sum the gradients of
    copies in float32.
    """

    def __init__(self, model: GPT, *, in_float32: bool = False) -> None:
        parameters = list(model.parameters())
        kept = parameters[0].dtype  # float32; float64 in tests that need exact values
        assert all(p.dtype == kept and p.requires_grad for p in parameters)
        order = sorted(parameters, key=lambda p: p.dim() < 2)  # stable: tensors that decay first, else in order
        self.places: dict[nn.Parameter, slice] = {}
        end = 0
        for p in order:
            self.places[p] = slice(end, end + p.numel())
            end += -(-p.numel() // ALIGN) * ALIGN
        self.n_decay = next((place.start for p, place in self.places.items() if p.dim() < 2), end)
        device, dtype = order[0].device, model.precision.compute
        self.param, self.exp_avg, self.exp_avg_sq = (torch.zeros(end, device=device, dtype=kept) for _ in range(3))
        self.grad = torch.zeros(end, device=device, dtype=dtype)  # where autograd writes
        self.compute = None if dtype == kept else torch.zeros(end, device=device, dtype=dtype)
        self.total = torch.zeros(end, device=device) if in_float32 and self.compute is not None else self.grad
        leaves = {}
        for p in order:
            self.view(self.param, p).copy_(p.data)
            p.data = self.view(self.param, p)
            leaves[p] = p if self.compute is None else self.view(self.compute, p).detach().requires_grad_()
            leaves[p].grad = self.view(self.grad, p)
        self.leaves: dict[Tensor, slice] = {leaves[p]: self.places[p] for p in order}  # in the buffers' order
        if self.compute is not None:
            model.read_copies(leaves)
            self.sync()

    def view(self, buffer: Tensor, p: nn.Parameter) -> Tensor:
        """p's part of a buffer, with p's shape."""
        return buffer[self.places[p]].view(p.shape)

    def sync(self) -> None:
        """Write the copies again, after something other than the optimizer changed the parameters."""
        if self.compute is not None:
            self.compute.copy_(self.param)

    def gather(self, part: slice = slice(None)) -> Tensor:
        """Add autograd's gradients to the total and clear them for the next micro-step. Returns (part of) the total."""
        if self.total is not self.grad:
            self.total[part].add_(self.grad[part])
            self.grad[part].zero_()
        return self.total[part]

    def clear(self) -> None:
        """Clear the gradients."""
        self.grad.zero_()
        self.total.zero_()
