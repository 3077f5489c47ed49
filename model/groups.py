"""The parameters of a GPT as its optimizer's groups."""

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: tensors of 2 or more dimensions (matmul weights, embeddings) decay; biases and LayerNorms do not.

    Each group has the order of named_parameters, so that optimizer states of nanoGPT's checkpoints fit.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
