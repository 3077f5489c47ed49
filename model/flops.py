"""How many parameters a GPT has, and how many FLOPs a token costs: arithmetic on the config, no torch.

A matmul of one token's activation with a weight of n elements costs 2n FLOPs: n multiplies and n adds. The backward
pass costs twice that, for the activation's gradient and the weight's. So a token costs 6N FLOPs for N weights. The head
shares its weight with the token embedding, and N counts it once: its matmul costs FLOPs, an embedding lookup none.

Attention also has matmuls without weights. QK^T and (softmax)V have Q*T multiply-adds each, for one head and token.
With the backward pass that is 12*L*H*Q*T FLOPs (L layers, H heads of size Q, T tokens of context). The causal mask
makes half of them unnecessary. They count anyway, as in nanoGPT and in PaLM.
"""

from model.config import GPTConfig

FORMULAS = ("nanogpt", "6n")


def num_params(config: GPTConfig, non_embedding: bool = True) -> int:
    """Parameters of GPT(config), with the tied head counted once.

    non_embedding leaves out the position embeddings, and only these.
    """
    c, bias = config.n_embd, int(config.bias)
    norm = c + bias * c
    attention = (c + bias) * 3 * c + (c + bias) * c  # qkv, projection
    mlp = (c + bias) * 4 * c + (4 * c + bias) * c  # up, down
    blocks = config.n_layer * (2 * norm + attention + mlp)
    positions = 0 if non_embedding else config.block_size * c
    return config.vocab_size * c + positions + blocks + norm


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation, 0 to 1: `flops` in `seconds` on devices of `peak` FLOP/s together."""
    return flops / (seconds * peak)


def flops_per_token(config: GPTConfig, formula: str = "nanogpt") -> int:
    """FLOPs of training on one token, forward and backward, at full block size.

    "nanogpt" is 6N + 12*L*H*Q*T, "6n" is only 6N. N is num_params(config), without position embeddings. Raises
    ValueError for another formula.
    """
    if formula not in FORMULAS:
        raise ValueError(f"mfu_formula: got {formula!r}, expected one of: {', '.join(FORMULAS)}")
    flops = 6 * num_params(config)
    if formula == "nanogpt":
        flops += 12 * config.n_layer * config.n_embd * config.block_size  # n_embd is H*Q
    return flops
