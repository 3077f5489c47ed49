"""The work of training, by arithmetic on the config: FLOPs of a token by convention, and the least work of a step.

`flops_per_token` counts by nanoGPT's convention, which PaLM has too, to compare runs. A matmul of one token's
activation with a weight of n elements costs 2n FLOPs: n multiplies and n adds. The backward pass costs twice that, for
the activation's gradient and the weight's. So a token costs 6N FLOPs for N weights. The head shares its weight with the
token embedding, and N counts it once: its matmul costs FLOPs, an embedding lookup none. Attention's matmuls without
weights, QK^T and (softmax)V, have Q*T multiply-adds each, for one head and token. With the backward pass that is
12*L*H*Q*T FLOPs (L layers, H heads of size Q, T tokens of context). The causal mask makes half of them unnecessary.
They count anyway.

`step_work` counts, part by part, the FLOPs and the bytes between memory and registers that no implementation can avoid.
It shows how far an implementation is from the best:

- Matmuls: 2 FLOPs a multiply-add, one matmul forward and two backward. Each reads both operands and writes its result.
- Attention: only the causal half is computed. Forward has two matmuls, backward five, because it computes the scores
  again. q, k, v and the output are read and written; the scores stay on the chip.
- Everything else moves bytes and has almost no FLOPs. Each input is read once, each output written once
  (`kernels/traffic.py`).

A part takes at least as long as its FLOPs take at the device's peak, and as long as its bytes take at its bandwidth:
`floor`. Kernels may not reach this bound: no attention kernel with heads of 64 reaches a large matmul's FLOP/s. A part
can be faster than its bytes allow if the caches still hold the results of the part before. `duration` estimates what
kernels need that reach some share of the device's rates.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kernels import traffic
from model.config import GPTConfig

FORMULAS = ("nanogpt", "6n")
MATMULS = ("qkv", "attention projection", "mlp up", "mlp down", "head")


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

    formula: one of FORMULAS. "nanogpt" is 6N + 12*L*H*Q*T, "6n" is only 6N. N is num_params(config), without position
    embeddings.
    """
    scores = 0 if formula == "6n" else 12 * config.n_layer * config.n_embd * config.block_size  # n_embd is H*Q
    return 6 * num_params(config) + scores


@dataclass(frozen=True)
class Work:
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Work":
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Shares:
    """Shares of a device's rates that kernels reach, 0 to 1."""

    matmul: float = 1.0
    attention: float = 1.0  # its matmuls are small, and half of each diagonal tile is not needed
    bandwidth: float = 1.0


SHEET = Shares()
ATTAINED = Shares(matmul=0.81, attention=0.34, bandwidth=0.9)  # by good kernels on an H100; assumed of other devices
POOR = Shares(matmul=0.60, attention=0.30, bandwidth=0.70)  # an assumption


def floor(work: Work, peak_flops: float, bandwidth: float) -> float:
    """Least seconds of `work`. peak_flops: FLOP/s; bandwidth: bytes/s."""
    return max(work.flops / peak_flops, work.bytes / bandwidth)


def duration(parts: Iterable[tuple[str, Work]], peak_flops: float, bandwidth: float, shares: Shares = SHEET) -> float:
    """Seconds of parts (name, work), one after the other, by kernels that reach these shares of the device's rates."""
    total = 0.0
    for name, work in parts:
        attention = "attention" in name and name not in MATMULS
        reached = peak_flops * (shares.attention if attention else shares.matmul)
        total += floor(work, reached, bandwidth * shares.bandwidth)
    return total


def step_work(
    config: GPTConfig,
    batch_size: int,
    *,
    accumulation: int = 1,
    compute: int = 2,
    stream: int = 4,
    gradients: int = 2,
    shards: int = 1,
    fused_gelu: bool = False,
) -> dict[str, Work]:
    """A step's parts and their work: `accumulation` micro-steps of batch_size x block_size tokens, and an update.

    compute, stream, gradients: bytes of an element of the compute dtype, of the residual stream, and of the gradients
    that the optimizer reads. If compute is not float32, the weights are copies (`train/flat.py`). shards: number of
    devices that share the update; communication is not counted. fused_gelu: GELU and its derivative run inside matmuls;
    only the MLP's pre-activations are written and read.
    """
    B, T, L, C, V = batch_size, config.block_size, config.n_layer, config.n_embd, config.vocab_size
    M, b, s = B * T, compute, stream
    n = -(-num_params(config, non_embedding=False) // shards)
    qkv, y, lse = 3 * M * C * b, M * C * b, 4 * M * config.n_head  # each row's log-sum-exp is kept for backward
    plain, added = ({"bias": config.bias, "add": add} for add in (False, True))  # the first LayerNorm adds nothing
    pre = M * 4 * C * b
    micro_step = {
        "qkv": _linear(M, C, 3 * C, b) * L,
        "attention projection": _linear(M, C, C, b) * L,
        "mlp up": _linear(M, C, 4 * C, b) * L,
        "mlp down": _linear(M, 4 * C, C, b) * L,
        "head": _linear(M, C, V, b),
        "attention forward": Work(2 * M * T * C, qkv + y + lse) * L,
        "attention backward": Work(5 * M * T * C, 2 * (qkv + y) + lse) * L,
        "LayerNorm forward": Work(bytes=traffic.layer_norm_forward(M, C, b, s, **plain))
        + Work(bytes=traffic.layer_norm_forward(M, C, b, s, **added)) * (2 * L),
        "LayerNorm backward": Work(bytes=traffic.layer_norm_backward(M, C, b, s, **plain))
        + Work(bytes=traffic.layer_norm_backward(M, C, b, s, **added)) * (2 * L),
        "GELU forward": Work(bytes=pre if fused_gelu else traffic.gelu_forward(M, 4 * C, b)) * L,
        "GELU backward": Work(bytes=pre if fused_gelu else traffic.gelu_backward(M, 4 * C, b)) * L,
        "cross-entropy": Work(bytes=traffic.cross_entropy_forward(M, V, b, counted=M, gradient=True)),
        # the rows of the tokens that occur are left out: their number depends on the text. The gradient of the others
        # is the head's alone, which its matmul writes.
        "embedding forward": Work(bytes=traffic.embedding_forward(M, T, C, b, s, distinct=0)),
        "embedding backward": Work(bytes=traffic.embedding_backward(M, T, C, 0, b, s)),
    }
    update = {
        # a matmul adds its result to the sum, which it reads and writes; the first one starts the sum
        "accumulation": Work(bytes=n * ((accumulation - 1) * (2 * gradients - b) + gradients - b)),
        # the gradient is read twice: for its norm, then for the update
        "optimizer": Work(bytes=n * gradients + traffic.adamw(n, gradients, copy=b if b != 4 else 0)),
    }
    return {name: work * accumulation for name, work in micro_step.items()} | update


def _linear(M: int, K: int, N: int, b: int) -> Work:
    """x (M, K) @ w (K, N), and both gradients: three matmuls of the same three sizes."""
    return Work(2 * M * K * N, (M * K + K * N + M * N) * b) * 3
