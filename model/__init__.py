"""GPT-2: the model, its attention, its FLOP counts, sampling, and weights in and out.

from model import GPT, GPTConfig
model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))
logits, loss = model(idx, targets)
"""

from model.config import GPT2_SIZES, GPTConfig
from model.gpt import GPT

__all__ = ["GPT", "GPT2_SIZES", "GPTConfig"]
