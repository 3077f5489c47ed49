"""Causal self-attention with one of several backends, and the cache of keys and values for sampling.

c_attn writes qkv (B, T, 3C), packed as (B, T, 3, H, Q). flash_attn and fa3 read it as it is, and write its gradient in
the same order. The others read q, k and v as views of it. Their three gradients are copied once more, into one dqkv.
`math` and `kernels/cpu.py` also copy q, k and v first, and then y: c_proj reads it as (B, T, C), and their y is in the
order (B, H, T, Q). With a cache, k and v are copied there. It holds (L, B, H, S, Q), S = block_size.

cudnn, flash, efficient and math are torch's (`scaled_dot_product_attention`). `auto` lets torch choose among them. On a
CPU none of them is fast with dropout or in bfloat16; there `auto` uses plain matmuls (`kernels/cpu.py`). The others are
packages, imported when they are used: flash_attn 2, its version for Hopper (`flash_attn_interface`) and the one for
Hopper and Blackwell (`flash_attn.cute`), https://github.com/Dao-AILab/flash-attention.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import cpu
from model.config import GPTConfig

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = ("flash_attn", "fa3", "fa4")
BACKENDS = ("auto", *SDPA, *PACKAGES)


def attention_dtype(device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of SDPA and of a cache: `compute_dtype`, but float32 instead of bfloat16 on a CPU. There bfloat16's
    backward pass took four times as long as float32's at 12 sequences of 64 tokens, and equally long at 256 tokens."""
    return torch.float32 if device.type == "cpu" and compute_dtype == torch.bfloat16 else compute_dtype


class KVCache:
    """Keys and values of the `length` tokens so far, for every layer. It has room for block_size tokens."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> None:
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_size)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values (B, H, T, Q); returns all, (B, H, length + T, Q).

        `GPT.forward` updates `length` after every layer has written.
        """
        end = self.length + k.size(2)
        assert end <= self.k.size(3), f"cache of {self.k.size(3)} tokens asked to hold {end}"
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def causal_attention(
    qkv: Tensor, n_head: int, p: float = 0.0, backend: str = "auto", cache: KVCache | None = None, layer: int = 0
) -> Tensor:
    """softmax(q k^T / sqrt(Q) + causal mask) v, with dropout `p` on the weights: qkv (B, T, 3C) -> y (B, T, C).

    With a cache, tokens also attend to its `length` earlier tokens; then T must be 1, or the cache empty. With a cache,
    and for T = 1, which some backends do not support, `backend` counts as `auto`. Raises ValueError for an unknown
    backend and for dropout that the backend lacks, ImportError if its package is missing, RuntimeError if it does not
    support the device, dtype or head size.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention: got {backend!r}, expected {' | '.join(BACKENDS)}")
    B, T, C3 = qkv.shape
    packed = qkv.view(B, T, 3, n_head, C3 // (3 * n_head))
    if cache is not None or T == 1:
        backend = "auto"
    if reason := why_not_dropout(backend, p):
        raise ValueError(f"attention: {reason}, got {p}")
    if backend in PACKAGES and not qkv.is_meta:
        y = _packaged(packed, p, backend)
    elif backend == "auto" and cache is None and slow_in_sdpa(qkv.device, qkv.dtype, T, p):
        y = cpu.attention(packed, p)
    else:
        y = _sdpa(packed, p, backend, cache, layer)
    return y.reshape(B, T, C3 // 3).to(qkv.dtype)


def _sdpa(packed: Tensor, p: float, backend: str, cache: KVCache | None, layer: int) -> Tensor:
    """torch's SDPA: packed (B, T, 3, H, Q) -> (B, T, H, Q)."""
    packed = packed.to(attention_dtype(packed.device, packed.dtype))
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    causal = True
    if cache is not None:
        T = q.size(2)
        assert T == 1 or cache.length == 0, "several tokens after a filled cache would need a shifted mask"
        if T == 1:  # a branch: compiled for any T, the comparison is no bool, and SDPA refuses it
            causal = False
        k, v = cache.extend(layer, k, v)
    if q.is_meta:  # torch chooses by the device, and a meta tensor has none
        return _on_shapes(q, k, v, p, backend).transpose(1, 2)
    if backend == "auto" and why_not_dropout("cudnn", p):
        allowed = sdpa_kernel([kernel for name, kernel in SDPA.items() if name != "cudnn"])
    else:
        allowed = sdpa_kernel(SDPA[backend]) if backend in SDPA else nullcontext()
    with allowed:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
    return y.transpose(1, 2)


def why_not_dropout(backend: str, p: float) -> str:
    """Why `backend` cannot drop weights with probability `p`; empty if it can, on some device."""
    if backend in ("fa3", "fa4") and p > 0:
        return f"{backend} has no dropout"
    if backend == "cudnn" and (16 * p) % 1 != 0:  # some versions round silently: pytorch #174245
        return "cudnn may round dropout to sixteenths"
    return ""


def _on_shapes(q: Tensor, k: Tensor, v: Tensor, p: float, backend: str) -> Tensor:
    """What a GPU's kernel would return, for tensors that have only shapes (`train/dryrun.py`). `auto` means cuDNN, or
    flash attention if cuDNN lacks this dropout."""
    aten, keeps = torch.ops.aten, torch.is_grad_enabled() and q.requires_grad
    if backend == "math":
        return aten._scaled_dot_product_attention_math(q, k, v, None, p, True)[0]
    if backend == "efficient" or q.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, keeps, p, True)[0]
    if backend == "flash" or (backend == "auto" and why_not_dropout("cudnn", p)):
        return aten._scaled_dot_product_flash_attention(q, k, v, p, True)[0]
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, keeps, p, True)[0]


def slow_in_sdpa(device: torch.device, dtype: torch.dtype, tokens: int, p: float) -> bool:
    """Whether plain matmuls (`kernels/cpu.py`) are faster, and the (B, H, T, T) that they keep are small, or SDPA keeps
    them too. Never in float16: they would overflow.

    Of the time of SDPA in float32 they take 0.4 in bfloat16 (16 sequences of 256 tokens, 6 heads of 64, one thread,
    forward and backward). With dropout SDPA has only its `math`, which also draws a random float for every weight:
    they take 0.5 of its time.
    """
    if device.type != "cpu" or dtype == torch.float16:
        return False
    return p > 0 or (dtype == torch.bfloat16 and tokens <= 256)


def _packaged(packed: Tensor, p: float, backend: str) -> Tensor:
    """Attention of a package: packed (B, T, 3, H, Q) -> (B, T, H, Q). The kernels of flash_attn 2 and 3 are registered
    as torch operations, so torch.compile can put them into its graph. flash_attn 4 has no packed function."""
    if backend == "flash_attn":
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(packed, dropout_p=p, causal=True)
    if backend == "fa3":
        from flash_attn_interface import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(packed, causal=True)
    from model.fa4 import fa4

    return fa4(packed)
