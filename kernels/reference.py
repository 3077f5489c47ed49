"""What every kernel means, in plain torch. This file is the definition; a kernel is right when it agrees with it.

Shapes: B sequences of T tokens, C channels, V vocabulary entries; `M` is any number of rows. Statistics and losses are
computed in float32 whatever the inputs' dtype (float64 stays, as a test's yardstick). `p` is a dropout probability; 0
outside training. Weights come cast to the dtype of the activations they multiply: the caller casts, so that fused ops
need no autocast rule.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5  # GPT-2's; nanoGPT's too


def widened(x: Tensor) -> Tensor:
    """x in the dtype of statistics: float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor, p: float = 0.0) -> Tensor:
    """Token plus position embedding, then dropout: the start of the residual stream.

    idx (B, T) int64, wte (V, C), wpe (T, C), the rows of idx's positions. Returns (B, T, C) in wte's dtype.
    """
    return F.dropout(F.embedding(idx, wte) + wpe, p, training=p > 0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension: (x - mean) * rstd * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    x (..., C) of any float dtype, weight and bias (C,) float32. Returns y (..., C) in `dtype`; statistics in float32.
    """
    return F.layer_norm(widened(x), weight.shape, weight, bias, LAYER_NORM_EPS).to(dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The residual connection and the LayerNorm after it: residual' = residual + dropout(x), y = LayerNorm(residual').

    x (..., C), a sub-layer's output; residual (..., C), the stream. Returns residual', in residual's dtype, and y, in
    `dtype`.
    """
    residual = residual + F.dropout(x, p, training=p > 0).to(residual.dtype)
    return residual, layer_norm(residual, weight, bias, dtype)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): "erf", exact, or "tanh", the one GPT-2 was trained with."""
    return F.gelu(x, approximate="none" if approximate == "erf" else approximate)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU(x @ weight.T + bias): x (..., K), weight (N, K), bias (N,), all of one dtype. Returns (..., N) in it."""
    return gelu(F.linear(x, weight, bias), approximate)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """Mean of -log softmax(logits)[target] over the targets that are not `ignore_index`; float32 scalar.

    logits (M, V) of any float dtype, targets (M,) int64. Where every target is ignored, the mean of nothing is NaN.
    """
    return F.cross_entropy(widened(logits), targets, ignore_index=ignore_index)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1
) -> tuple[Tensor, Tensor | None]:
    """The head and the loss: cross_entropy(x @ weight.T, targets).

    x (B, T, C) and weight (V, C) of one dtype, targets (B, T) int64. Returns the loss, a float32 scalar, and the logits
    (B, T, V), or None from an implementation that never holds them all.
    """
    logits = F.linear(x, weight)
    return cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index), logits
