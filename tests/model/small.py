"""A small GPT and a batch for it."""

import torch
from torch import Tensor

from kernels import REFERENCE, Ops
from model import GPT, GPTConfig, Precision

SHAPE = dict(block_size=16, vocab_size=40, n_layer=2, n_head=4, n_embd=32)


def make(
    ops: Ops = REFERENCE,
    *,
    precision: Precision = Precision(),
    attention: str = "auto",
    recompute: str = "none",
    std: float = 0.2,
    **shape,
) -> GPT:
    """Its weights are so large that every part of it matters, and its biases are not zero."""
    config = GPTConfig(**SHAPE | shape)
    model = GPT(config, ops, precision=precision, attention=attention, recompute=recompute)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = std * torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + values if ".ln_" in name and name.endswith("weight") else values
    return model


def batch(model: GPT, B: int = 3, T: int | None = None) -> tuple[Tensor, Tensor]:
    """idx and targets, where the model is. Every third target does not count: of the usual 48, 32 do, a power of two,
    whose reciprocal costs bfloat16 no rounding."""
    size = (2, B, T or model.config.block_size)
    both = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))
    if B * size[-1] > 3:
        both[1].view(-1)[::3] = -1
    idx, targets = both.to(model.lm_head.weight.device)
    return idx, targets
