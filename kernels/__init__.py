"""The operations a GPT is made of: what each means in plain torch, and their fused Triton kernels.

The floors above use `Ops`, the bundle a model is built with; `REFERENCE`, the plain-torch bundle, and `FUSED`, that of
the Triton kernels; `select`, which gives the bundle for a device by name; `missing`, which says why the fused ones
cannot run there, and `too_wide`, why they cannot compute a model.

The fused operations also stand alone, for a model of your own: `layer_norm`, `add_layer_norm` (dropout, residual
addition and LayerNorm in one pass), `gelu`, `cross_entropy` and `linear_cross_entropy` (the head and its loss in one
op, the gradient written over the logits). They are differentiable, work under torch.compile and in CUDA graphs, and
take any strides. Their docstrings give shapes, dtypes and errors. This is a small model's training step with them, on
a GPU, or on a CPU with TRITON_INTERPRET=1:

>>> import torch
>>> from kernels import add_layer_norm, gelu, linear_cross_entropy
>>> device = "cuda" if torch.cuda.is_available() else "cpu"
>>> wte, up, down = (torch.nn.Parameter(0.1 * torch.randn(n, 64, device=device)) for n in (100, 256, 256))
>>> weight = torch.nn.Parameter(torch.ones(64, device=device))
>>> tokens = torch.randint(100, (2, 9), device=device)
>>> x, targets = wte[tokens[:, :-1]], tokens[:, 1:]  # (2, 8, 64), (2, 8)
>>> branch = gelu(x @ up.t(), "tanh") @ down
>>> x, y = add_layer_norm(branch, x, weight, None, torch.float32, p=0.1)  # the stream, and what the next layer reads
>>> loss, _ = linear_cross_entropy(y, wte, targets)
>>> loss.backward()
>>> loss.item() > 0, wte.grad.shape
(True, torch.Size([100, 64]))

A caller under autocast casts first: x and the weights that multiply it have one dtype, LayerNorm's may be float32.
"""

from importlib import import_module
from typing import Any

from kernels.available import missing, select, too_wide
from kernels.ops import REFERENCE, Ops
from kernels.reference import Grads

# These need Triton. Each is imported from its file at its first use.
_TRITON = {
    "FUSED": "kernels.fused",
    "layer_norm": "kernels.fused.layer_norm",
    "add_layer_norm": "kernels.fused.layer_norm",
    "gelu": "kernels.fused.gelu",
    "cross_entropy": "kernels.fused.cross_entropy",
    "linear_cross_entropy": "kernels.fused.linear_cross_entropy",
}

__all__ = ["REFERENCE", "Grads", "Ops", "missing", "select", "too_wide", *_TRITON]


def __getattr__(name: str) -> Any:
    if name in _TRITON:
        return getattr(import_module(_TRITON[name]), name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
