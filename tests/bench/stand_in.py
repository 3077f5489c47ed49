"""A stand-in for a nanoGPT checkout: the same interface over our own model, with a fault to switch on."""

from pathlib import Path

SOURCE = """
from dataclasses import dataclass
import torch
import model

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(model.GPTConfig(**vars(config)))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("a line that nobody wants to see")
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate * FAULT, betas=betas)
"""


def make_checkout(folder: Path, fault: float = 1.0) -> str:
    """fault: what its learning rate is multiplied by."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(SOURCE.replace("FAULT", str(fault)))
    return str(folder)
