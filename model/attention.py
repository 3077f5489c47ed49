"""Causal self-attention, and the cache of keys and values that makes sampling linear in the tokens drawn.

| tensor      | layout                                                                     |
|-------------|----------------------------------------------------------------------------|
| qkv         | (B, T, 3C) packed, as c_attn writes it                                      |
| q, k, v     | (B, H, T, Q) views of qkv: no copy; SDPA takes any strides with a unit last one |
| y           | (B, T, C)                                                                  |
| cache k, v  | (L, B, H, S, Q), S = block_size                                            |
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig


def attention_dtype(device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
    """What attention computes in: `compute_dtype`, but float32 for bfloat16 on a CPU, where torch is slow in it.

    (At 12 sequences of 64 tokens its bfloat16 backward pass took four times as long.)
    """
    return torch.float32 if device.type == "cpu" and compute_dtype == torch.bfloat16 else compute_dtype


class KVCache:
    """Keys and values of the `length` tokens seen so far, for every layer; room for block_size of them."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> None:
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.head_size)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, H, T, Q) after those held; returns all, (B, H, length + T, Q).

        `length` itself moves on in `GPT.forward`, once every layer has written.
        """
        end = self.length + k.size(2)
        assert end <= self.k.size(3), f"cache of {self.k.size(3)} tokens asked to hold {end}"
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def causal_attention(qkv: Tensor, n_head: int, p: float = 0.0, cache: KVCache | None = None, layer: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(Q) + causal mask) v, with dropout `p` on the weights: qkv (B, T, 3C) -> y (B, T, C).

    With a cache, its `length` earlier tokens are attended to as well; then T must be 1, or the cache empty.
    """
    B, T, C3 = qkv.shape
    dtype = qkv.dtype
    qkv = qkv.to(attention_dtype(qkv.device, dtype))
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)  # each (B, H, T, Q)
    causal = True
    if cache is not None:
        assert T == 1 or cache.length == 0, "several tokens after a filled cache would need a shifted mask"
        causal = T > 1
        k, v = cache.extend(layer, k, v)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
    return y.transpose(1, 2).reshape(B, T, C3 // 3).to(dtype)
