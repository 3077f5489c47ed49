"""What every kernel means, in plain torch. This file is the definition; a kernel is right when it agrees with it.

Shapes: B sequences of T tokens, C channels, V vocabulary entries; `M` is any number of rows. Statistics and losses are
computed in float32 whatever the inputs' dtype (float64 stays, as a test's yardstick). `p` is a dropout probability; 0
outside training. Weights come cast to the dtype of the activations they multiply: the caller casts, so that fused ops
need no autocast rule.

Some arguments matter to a fused implementation only, and are ignored here. `seed`: what its dropout masks are drawn
from; torch draws its own. `grads`: where it puts the gradients of weights; here they are autograd's. `dloss`: the
gradient of the loss, known in advance; autograd brings it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu

LAYER_NORM_EPS = 1e-5  # GPT-2's; nanoGPT's too
CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class Grads(NamedTuple):
    """Where an operation's backward pass puts the gradients of a layer's weights, instead of giving them to autograd.

    Each has the shape that the operation asks for. Views of one buffer are `.data`, whose version counters are their
    own: autograd refuses what was changed since it was saved.
    """

    weight: Tensor
    bias: Tensor | None
    accumulate: bool  # add to what is there; else it is overwritten


def widened(x: Tensor) -> Tensor:
    """x in the dtype of statistics: float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def dropout(x: Tensor, p: float) -> Tensor:
    """x with a share p of its elements 0 and the others divided by 1 - p; x itself where p is 0."""
    if p == 0:
        return x
    if x.device.type == "cpu":
        keep, scale = cpu.random_mask(x, p)
        return x * keep * scale
    return torch.native_dropout(x, p, True)[0]


def seeds(n: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """Seeds for n calls of operations with dropout: none, torch draws the masks."""
    return (None,) * n


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    dtype: torch.dtype,
    p: float = 0.0,
    seed: Tensor | None = None,
    grads: tuple[Grads, Grads] | None = None,
) -> Tensor:
    """Token plus position embedding, then dropout: the start of the residual stream.

    idx (B, T) int64, wte (V, C), wpe (T, C), the rows of idx's positions. Returns (B, T, C) in `dtype`. grads: those of
    wte and of wpe.
    """
    rows = cpu.embedding(idx, wte) if idx.device.type == "cpu" else widened(F.embedding(idx, wte))
    x = rows + widened(wpe)
    return dropout(x.to(dtype), p)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension: (x - mean) * rstd * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    x (..., C), weight and bias (C,) of any float dtype. Returns y (..., C) in `dtype`; statistics in float32.
    """
    x, weight, bias = widened(x), widened(weight), None if bias is None else widened(bias)
    return F.layer_norm(x, weight.shape, weight, bias, LAYER_NORM_EPS).to(dtype)


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    p: float = 0.0,
    seed: Tensor | None = None,
    grads: Grads | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual connection and the LayerNorm after it: residual' = residual + dropout(x), y = LayerNorm(residual').

    x (..., C), a sub-layer's output, None: nothing is added; residual (..., C), the stream. Returns residual', in
    residual's dtype, and y, in `dtype`.
    """
    if x is not None:
        residual = residual + dropout(x, p).to(residual.dtype)
    return residual, layer_norm(residual, weight, bias, dtype)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): "erf", exact, or "tanh", the one GPT-2 was trained with."""
    approximate = "none" if approximate == "erf" else approximate
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        return cpu.gelu(x, approximate)
    return F.gelu(x, approximate=approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, grads: Grads | None = None) -> Tensor:
    """x @ weight.T + bias: x (..., K), weight (N, K), bias (N,) or None, of one dtype. Returns (..., N)."""
    return F.linear(x, weight, bias)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str,
    fc_grads: Grads | None = None,
    proj_grads: Grads | None = None,
) -> Tensor:
    """A transformer block's feed-forward half: GELU(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias.

    x (..., K), fc_weight (N, K), fc_bias (N,), proj_weight (C, N), proj_bias (C,), all of one dtype. Returns (..., C).
    """
    return F.linear(gelu(F.linear(x, fc_weight, fc_bias), approximate), proj_weight, proj_bias)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """Mean of -log softmax(logits)[target] over the targets that are not `ignore_index`; float32 scalar.

    logits (M, V) of any float dtype, targets (M,) int64. Where every target is ignored, the mean of nothing is NaN.
    """
    return F.cross_entropy(widened(logits), targets, ignore_index=ignore_index)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    *,
    chunk_rows: int = 0,
    dloss: Tensor | None = None,
    grads: Grads | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The head and the loss: cross_entropy(x @ weight.T, targets).

    x (..., C) and weight (V, C) of one dtype, targets (...) int64. Returns the loss, a float32 scalar, and the logits
    (..., V), or None from an implementation that never holds them all. `chunk_rows`, how many rows' logits a fused
    implementation holds at a time (0: all), changes nothing here.
    """
    logits = F.linear(x, weight)
    return cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index), logits


@torch.no_grad()
def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    inv_scale: Tensor | None,
    compute: Tensor | None,
    *,
    n_decay: int,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    max_norm: float,
) -> tuple[Tensor, Tensor]:
    """One update of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) after clipping, in place and without a sync.

    param, exp_avg, exp_avg_sq (n,) float32, flat buffers of which elements [0, n_decay) decay; grad (n,) of any float
    dtype, to be multiplied by inv_scale () float32; lr () float32; step () float32 or int64, the updates done so far.
    `max_norm`: largest norm of the whole gradient, 0 for no clipping. compute (n,): param's rounded copy, kept so.

    Returns the gradient's norm, unscaled and before clipping, and found_inf, 1 where that norm is not finite, both ()
    float32. Then nothing is changed, nor is step advanced.
    """
    g = widened(grad) if grad.dtype != param.dtype else grad
    norm = torch.linalg.vector_norm(g)
    factor = torch.ones_like(norm) if inv_scale is None else inv_scale
    norm = norm * factor
    if max_norm > 0:
        factor = factor * (max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
    found_inf = norm.isfinite().logical_not().float()
    g = g * factor if g is grad else g.mul_(factor)
    settings = dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, amsgrad=False, maximize=False, found_inf=found_inf)
    number = step.float() + 1
    for part, decay in ((slice(n_decay), weight_decay), (slice(n_decay, None), 0.0)):
        buffers = [[x[part]] for x in (param, g, exp_avg, exp_avg_sq)]
        torch._fused_adamw_(*buffers, [], [number], weight_decay=decay, **settings)  # nothing, where found_inf is 1
    step.copy_(number - found_inf)
    if compute is not None:
        compute.copy_(param)  # where nothing changed, the same once more
    return norm, found_inf
