"""Tensors whose memory is laid out otherwise than a kernel would like it."""

import torch
from torch import Tensor


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x's values in other memory; of the two layouts that repeat memory, its first row's or its first value."""
    if layout == "sliced":  # rows further apart than they are wide, and off every alignment
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "aligned":  # rows that are read 16 bytes at a time though their width is anything
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 16 - x.shape[-1] % 16)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if layout == "part of a larger table":  # rows and columns before it and after it
        large = x.new_zeros(*(size + 3 for size in x.shape))
        inside = large[tuple(slice(1, 1 + size) for size in x.shape)]
        inside.copy_(x)
        return inside
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "one row for all":
        return x[:1].expand(x.shape)
    if layout == "the same everywhere":
        return x.flatten()[:1].view([1] * x.ndim).expand(x.shape) if x.numel() else x
    assert layout == "packed"
    return x


class Relay(torch.autograd.Function):
    """The identity; its gradient arrives in another layout."""

    @staticmethod
    def forward(ctx, x: Tensor, layout: str) -> Tensor:
        ctx.layout = layout
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return laid_out(gradient, ctx.layout), None
