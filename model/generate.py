"""Sampling: a loop that streams tokens, computing each only once, and the draw of one token from its logits.

One token costs one row through the model as long as the context fits block_size: the keys and values of
earlier tokens do not depend on later ones, so they are computed once and kept. Past block_size the window
slides, every token in it gets another (learned, absolute) position, and nothing kept is valid any more: from
there on each step runs the whole window, which is what nanoGPT computes at every step.
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
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Continue idx by a GPT; yields the next token of each row, (B,) int64, as it is drawn.

    idx: (B, T) int64, neither of them 0, on the model's device; past block_size, the last tokens count.
    temperature divides the logits; 0 is greedy. top_k keeps the k most likely tokens (any k over the
    vocabulary keeps all), then top_p the fewest most likely ones whose probabilities reach top_p. Ids from
    `n_vocab` on, the padding of a vocabulary, are never drawn. `generator` lives on the model's device; with
    one, the global random state is untouched.

    The model is in eval mode from the first token until the iterator ends or is closed, then in the mode it
    was in. After the call, which checks idx, nothing here waits for the device: reading a token does. Without
    `use_cache` every step runs the whole window, for the same tokens up to rounding. Raises ValueError at the
    call.
    """
    vocab_size = model.config.vocab_size
    n_vocab = vocab_size if n_vocab is None else n_vocab
    if idx.dim() != 2 or idx.numel() == 0 or idx.dtype != torch.int64:
        raise ValueError(
            f"idx: got shape {tuple(idx.shape)} of {idx.dtype}, expected a non-empty (B, T) of torch.int64"
        )
    low, high = (int(bound) for bound in idx.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"idx: got ids from {low} to {high}, expected 0 to {vocab_size - 1}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected 0 or more")
    if not 0 <= temperature < math.inf:  # NaN fails too
        raise ValueError(f"temperature: got {temperature}, expected 0 (greedy) or a finite number above it")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected 1 or more, or None to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if not 1 <= n_vocab <= vocab_size:
        raise ValueError(f"n_vocab: got {n_vocab}, expected 1 to vocab_size ({vocab_size})")

    def draw(logits: Tensor) -> Tensor:
        logits = logits[:, :n_vocab].float()
        if temperature == 0:
            return logits.argmax(dim=-1)
        return sample(probabilities(logits, temperature, top_k, top_p), generator)

    return _stream(model, idx, max_new_tokens, draw, use_cache)


@torch.no_grad()
def _stream(
    model: nn.Module, idx: Tensor, max_new_tokens: int, draw: Callable[[Tensor], Tensor], use_cache: bool
) -> Iterator[Tensor]:
    (batch, length), block_size = idx.shape, model.config.block_size
    tokens = torch.cat([idx, idx.new_empty(batch, max_new_tokens)], dim=1)
    cache = None
    if use_cache and length < block_size:
        cache = KVCache(model.config, batch, idx.device, attention_dtype(idx.device, model.precision.compute))
    was_training = model.training
    model.eval()
    try:
        for end in range(length, length + max_new_tokens):
            if cache is not None and end <= block_size:
                logits, _ = model(tokens[:, cache.length : end], cache=cache)  # the prompt once, then (B, 1)
            else:
                cache = None  # frees it: the window slides from here on
                logits, _ = model(tokens[:, max(0, end - block_size) : end])
            tokens[:, end] = draw(logits[:, -1])
            yield tokens[:, end].clone()  # the caller's own
    finally:
        model.train(was_training)


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """softmax(logits / temperature) of (B, V) float32 logits, zero outside top_k, then top_p.

    Rows sum to 1. Tokens that tie with the k-th are kept, as nanoGPT keeps them.
    """
    # the difference to the largest cannot overflow at any temperature
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked  # probability of all that is likelier; 0 for the first
        probs = probs.scatter(-1, order, ranked.masked_fill(before >= top_p, 0.0))
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def sample(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw an index from each row of probs (B, V): (B,) int64.

    Which of V independent exponential clocks of these rates rings first: index i with probability probs[i].
    torch.multinomial draws the same from the same seed, but checks its input first, a wait for the device.
    """
    clocks = torch.empty_like(probs).exponential_(generator=generator)
    tiny = torch.finfo(probs.dtype).tiny  # 0 / 0 would win the argmax
    return (probs / clocks.clamp_min_(tiny)).argmax(dim=-1)
