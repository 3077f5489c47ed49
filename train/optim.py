"""AdamW over a GPT's parameters, grouped as nanoGPT groups them."""

import torch
from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: tensors of 2 or more dimensions (matmul weights, embeddings) decay; biases and LayerNorms do not.

    Their order is named_parameters', which is what makes optimizer states of nanoGPT's checkpoints fit.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """torch's AdamW, fused: one kernel for many tensors on CUDA, one vectorised pass a tensor on a CPU."""
    return torch.optim.AdamW(param_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)
