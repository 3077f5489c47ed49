"""Sampling: a loop that yields tokens one after the other, and the draw of one token from its logits.

While the context fits into block_size, each token goes through the model only once. Keys and values of earlier tokens
do not depend on later ones, so a cache keeps them. Past block_size the window slides. Then every token in it gets
another (learned, absolute) position, and the cache is not valid any more. From there on each step computes the whole
window, as nanoGPT does at every step.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from model.attention import KVCache, attention_dtype


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    n_vocab: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue idx with a GPT. Yields the next token of each row, (B,) int64, as it is drawn.

    idx: (B, T) int64 on the model's device, not empty; only the last block_size tokens count. temperature divides the
    logits; 0 is greedy, and so is what float32 cannot divide by. top_k keeps the k most likely tokens; a k above the
    vocabulary size keeps all. Then top_p keeps the fewest most likely tokens whose probabilities sum to top_p or more.
    Ids from `n_vocab` on are the padding of a vocabulary, and are never drawn. `generator` is on the model's device;
    with one, the global random state does not change.

    The model is in eval mode from the first token until the iterator ends or is closed. Then it gets its old mode back.
    The call checks its arguments and raises ValueError. After the call, only reading a token waits for the device.
    """
    vocab_size = model.config.vocab_size
    n_vocab = vocab_size if n_vocab is None else n_vocab
    fits = idx.dim() == 2 and idx.numel() > 0 and idx.dtype == torch.int64
    checked = (
        ("idx", f"shape {tuple(idx.shape)} of {idx.dtype}", fits, "a non-empty (B, T) of torch.int64"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or a finite number above it"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or None to keep every token"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "more than 0 and at most 1"),
        ("n_vocab", n_vocab, 1 <= n_vocab <= vocab_size, f"1 to vocab_size ({vocab_size})"),
    )
    for name, value, good, expected in checked:
        if not good:
            raise ValueError(f"{name}: got {value}, expected {expected}")
    low, high = (int(bound) for bound in idx.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"idx: got ids from {low} to {high}, expected 0 to {vocab_size - 1}")

    def draw(logits: Tensor) -> Tensor:
        logits = logits[:, :n_vocab].float()
        if temperature < torch.finfo(torch.float32).tiny:
            return logits.argmax(dim=-1)
        return sample(probabilities(logits, temperature, top_k, top_p), generator)

    return _stream(model, idx, max_new_tokens, draw)


@torch.no_grad()
def _stream(model: nn.Module, idx: Tensor, max_new_tokens: int, draw: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    (batch, length), block_size = idx.shape, model.config.block_size
    tokens = torch.cat([idx, idx.new_empty(batch, max_new_tokens)], dim=1)
    cache = None
    if length < block_size:
        cache = KVCache(model.config, batch, idx.device, attention_dtype(idx.device, model.precision.compute))
    was_training = model.training
    model.eval()
    try:
        for end in range(length, length + max_new_tokens):
            if cache is not None and end <= block_size:
                logits, _ = model(tokens[:, cache.length : end], cache=cache)  # first the prompt, then (B, 1)
            else:
                cache = None  # frees it, since the window slides from here on
                logits, _ = model(tokens[:, max(0, end - block_size) : end])
            tokens[:, end] = draw(logits[:, -1])
            yield tokens[:, end].clone()  # a copy, which the caller may change
    finally:
        model.train(was_training)


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """softmax(logits / temperature) of (B, V) float32 logits. top_k, then top_p, set the other tokens to 0.

    Rows sum to 1. Tokens as likely as the k-th are kept, as in nanoGPT.
    """
    # without the subtraction, a low temperature could make the largest logit infinite
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked  # sum over all likelier tokens; 0 for the first
        probs = probs.scatter(-1, order, ranked.masked_fill((before >= top_p) & (before > 0), 0.0))
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def sample(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw an index from each row of probs (B, V): (B,) int64.

    Each index gets an exponential random time, with its probability as the rate. The index with the earliest time is i
    with probability probs[i]. torch.multinomial draws the same from the same seed, but it first checks its input, and
    that waits for the device.
    """
    times = torch.empty_like(probs).exponential_(generator=generator)
    tiny = torch.finfo(probs.dtype).tiny  # 0 / 0 is NaN, which argmax would choose
    return (probs / times.clamp_min_(tiny)).argmax(dim=-1)
