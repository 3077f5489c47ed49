"""flash_attn 4, in a file of its own: `torch.compiler.disable` imports Dynamo, which takes two seconds."""

import torch
from torch import Tensor


@torch.compiler.disable  # its kernels are not torch operations: torch.compile's graph breaks here
def fa4(packed: Tensor) -> Tensor:
    """Causal attention: packed (B, T, 3, H, Q) -> (B, T, H, Q)."""
    from flash_attn.cute import flash_attn_func

    y, _ = flash_attn_func(*packed.unbind(2), causal=True)  # the second result is the log of the softmax's sums
    return y
