"""A model's state in flat buffers: parameters, their copies in the compute dtype, gradients, moments.

All buffers have the same layout: first the tensors that decay (2 or more dimensions), in named_parameters' order, then
the others. Each tensor starts at a multiple of ALIGN elements. The gaps always hold zeros. So AdamW is two launches,
zeroing is one memset, and ranks sum their gradients in one call.

With bfloat16 or float16 the model reads copies of its parameters in that dtype. The optimizer writes the copies as it
updates, so the forward pass has no casts. Gradients are those of the copies. They are summed in float32 if there are
several to sum, over micro-steps or ranks.

Fused operations write each gradient straight into the buffer, or add to it if there are several. So nothing is
gathered, and a gradient that stands alone is overwritten, never cleared. A LayerNorm's gradients are the exception: its
operation leaves partial sums, and one launch after the backward pass finishes those of all layers. Other operations
leave their gradients to autograd. Then `gather` copies them into the buffer, or adds them, and frees them.
"""

import torch
from torch import Tensor, nn

from kernels import Ops
from model import GPT
from model.gpt import LayerNorm

ALIGN = 64  # elements: 128 bytes of a 2-byte type, a cache line


class FlatState:
    """Flat buffers of n elements; [0, n_decay) decay. The model's parameters become views of `param`.

    model: on its device, in float32; `model.precision` says which copies it gets. ops: its operations. several: whether
    an update takes the sum of several gradients, of micro-steps or ranks. Then `grad` is in float32.
    """

    def __init__(self, model: GPT, ops: Ops, *, several: bool = False) -> None:
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
        self.several = several
        self.param, self.exp_avg, self.exp_avg_sq = (torch.zeros(end, device=device, dtype=kept) for _ in range(3))
        self.grad = torch.zeros(end, device=device, dtype=kept if several else dtype)
        self.compute = None if dtype == kept else torch.zeros(end, device=device, dtype=dtype)
        for p in order:
            self.view(self.param, p).copy_(p.data)
            p.data = self.view(self.param, p)
        leaves = {p: p if self.compute is None else self.view(self.compute, p).detach() for p in order}
        self.leaves = [leaf.requires_grad_() for leaf in leaves.values()]
        if self.compute is not None:
            model.read_copies(leaves)
            self.compute.copy_(self.param)
        self._grads = {p: self.view(self.grad, p) for p in order}
        self.partials: Tensor | None = None
        if ops.sum_partials is not None:
            self._sum_partials = ops.sum_partials
            self._put_gradients(model, ops)

    def _put_gradients(self, model: GPT, ops: Ops) -> None:
        """Have the model's operations write to `grad` and, for LayerNorms, to `partials` (L, P, C)."""
        norms = [module for module in model.modules() if isinstance(module, LayerNorm)]
        vectors = [p for norm in norms for p in norm.parameters()]
        C, device = model.config.n_embd, self.grad.device
        self.partials = torch.zeros(len(vectors), ops.partial_rows(C, device), C, device=device)
        starts = [self.places[p].start - self.n_decay for p in vectors]
        self._offsets = torch.stack([torch.full((), n, dtype=torch.int64, device=device) for n in starts])
        partials = self.partials.view(len(norms), -1, *self.partials.shape[1:])  # a weight and perhaps a bias each
        model.put_gradients(self._grads, dict(zip(norms, partials, strict=True)), self.several)

    def view(self, buffer: Tensor, p: nn.Parameter) -> Tensor:
        """p's part of a buffer, with p's shape."""
        return buffer[self.places[p]].view(p.shape)

    def gather(self) -> None:
        """Finish what a micro-step's backward pass left."""
        if self.partials is not None:
            self._sum_partials(self.partials, self._offsets, self.grad[self.n_decay :], self.several)
            return
        put = torch._foreach_add_ if self.several else torch._foreach_copy_
        put([*self._grads.values()], [leaf.grad for leaf in self.leaves])
        self._free()

    def clear(self) -> None:
        self.grad.zero_()
        self._free()

    def _free(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
