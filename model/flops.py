"""How many parameters a GPT has, and how many FLOPs a token costs: arithmetic on the config, no torch.

A matmul of one token's activation with a weight of n elements costs 2n FLOPs, a multiply and an add each.
Its backward costs twice that: the activation's gradient and the weight's. So a token costs 6N FLOPs for N
weights. The head's matmul counts although its weight is the token embedding's, which N holds once: looking a
row up is free.

Attention also has matmuls without weights. QK^T and (softmax)V are Q*T multiply-adds each for a head and
token, 12*L*H*Q*T FLOPs with the backward (L layers, H heads of size Q, T tokens of context). By nanoGPT's
convention, and PaLM's before it, the causal half that need not be computed is not taken off.
"""

from model.config import GPTConfig

FORMULAS = ("nanogpt", "6n")


def num_params(config: GPTConfig, non_embedding: bool = True) -> int:
    """Parameters of GPT(config), the tied head counted once.

    non_embedding leaves out the position embeddings, and only those.
    """
    c, bias = config.n_embd, int(config.bias)
    norm = c + bias * c
    attention = (c + bias) * 3 * c + (c + bias) * c  # qkv, projection
    mlp = (c + bias) * 4 * c + (4 * c + bias) * c  # up, down
    blocks = config.n_layer * (2 * norm + attention + mlp)
    positions = 0 if non_embedding else config.block_size * c
    return config.vocab_size * c + positions + blocks + norm


def flops_per_token(config: GPTConfig, formula: str = "nanogpt") -> int:
    """FLOPs of training on one token, forward and backward, at full block size.

    "nanogpt" is 6N + 12*L*H*Q*T, "6n" is 6N alone; in both N is num_params(config), without position
    embeddings. Raises ValueError for another formula.
    """
    if formula not in FORMULAS:
        raise ValueError(f"mfu_formula: got {formula!r}, expected one of: {', '.join(FORMULAS)}")
    flops = 6 * num_params(config)
    if formula == "nanogpt":
        flops += 12 * config.n_layer * config.n_embd * config.block_size  # n_embd is H*Q
    return flops
