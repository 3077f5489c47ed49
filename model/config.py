"""The sizes and options of a GPT."""

from dataclasses import dataclass

# OpenAI's four models; all have 1024 positions, a vocabulary of 50257 and biases
GPT2_SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}


@dataclass(frozen=True)
class GPTConfig:
    """nanoGPT's GPTConfig, and the kind of GELU. Raises ValueError for values that no model can have."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 padded to a multiple of 64: aligned rows for the head's matmul
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms, as in GPT-2; False: a bit better and faster
    gelu: str = "erf"  # "erf", as nanoGPT trains; "tanh", as OpenAI trained GPT-2

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: got {self.n_embd}, expected a multiple of n_head ({self.n_head})")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected 0 or more and less than 1")
        if self.gelu not in ("erf", "tanh"):
            raise ValueError(f"gelu: got {self.gelu!r}, expected 'erf' or 'tanh'")
