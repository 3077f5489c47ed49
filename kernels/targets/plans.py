"""What `kernels.targets` compiles: every kernel at GPT shapes, and the budget that each must keep.

A plan's tensors are meta tensors: nothing is allocated, and Triton takes them as aligned, as torch's allocations are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import adamw, cross_entropy, embedding, gelu, layer_norm, linear_cross_entropy, matmul
from kernels.launch import Device, Launch
from kernels.targets.budgets import Budget, Matmul, Plan

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64

# GPT-2 124M at 32 sequences of 1024 tokens, its padded vocabulary
M, C, V = 32 * 1024, 768, 50304
P_DROP = 0.1


def meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


# LayerNorm ------------------------------------------------------------------------------------------------------------


def _row_fill(launch: Launch) -> float:
    return launch.args["C"] / launch.constants["BLOCK_N"]


def _layer_norm_forward(stream: torch.dtype, *, add: bool, dropout: bool, C: int) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        x, seed = meta(M, C, dtype=BF16) if add else None, meta(1, dtype=INT64) if dropout else None
        residual, weight = meta(M, C, dtype=stream), meta(C, dtype=FP32)
        y, mean, rstd = meta(M, C, dtype=BF16), meta(M, dtype=FP32), meta(M, dtype=FP32)
        out = meta(M, C, dtype=stream) if add else None
        p = P_DROP if dropout else 0.0
        return layer_norm.plan_forward(device, x, residual, weight, weight, seed, p, out, y, mean, rstd)

    return launches


def _layer_norm_backward(stream: torch.dtype, *, add: bool, dropout: bool, C: int) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        dy, seed = meta(M, C, dtype=BF16), meta(1, dtype=INT64) if dropout else None
        saved, weight, statistic = meta(M, C, dtype=stream), meta(C, dtype=FP32), meta(M, dtype=FP32)
        dstream = meta(M, C, dtype=stream) if add else None
        dresidual, dx = meta(M, C, dtype=stream), meta(M, C, dtype=BF16) if add else None
        partial = meta(layer_norm.backward_programs(device, M, C), C, dtype=FP32)
        p = P_DROP if dropout else 0.0
        return layer_norm.plan_backward(
            device, dy, dstream, saved, weight, statistic, statistic, seed, p, dresidual, dx, partial, partial
        )

    return launches


_STATISTICS = {
    "mean_ptr": (4, "one value a row"),
    "rstd_ptr": (4, "one value a row"),
    "seed_ptr": (8, "one value"),
}

_REGIMES = {
    "layer_norm {}": dict(stream=FP32, add=False, dropout=False, C=C),
    "add_layer_norm {}": dict(stream=FP32, add=True, dropout=False, C=C),
    "add_layer_norm {}, bf16 stream, dropout": dict(stream=BF16, add=True, dropout=True, C=C),
    "add_layer_norm {}, dropout, 1600 wide": dict(stream=FP32, add=True, dropout=True, C=1600),
}

_LAYER_NORM = [
    Plan(name.format(way), plan(**regime), budget, fill=_row_fill)
    for name, regime in _REGIMES.items()
    for way, plan, budget in (
        ("forward", _layer_norm_forward, Budget(warps=32, narrow=_STATISTICS)),
        ("backward", _layer_norm_backward, Budget(warps=12, one_wave=True, narrow=_STATISTICS)),
    )
]

# GELU -----------------------------------------------------------------------------------------------------------------


def _gelu_forward(approximate: str) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        x, y, bias = meta(M, 4 * C, dtype=BF16), meta(M, 4 * C, dtype=BF16), meta(4 * C, dtype=BF16)
        return gelu.plan_forward(device, x, bias, approximate, y)

    return launches


def _gelu_backward(approximate: str) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        dy, x, dx, bias = (meta(*size, dtype=BF16) for size in ((M, 4 * C), (M, 4 * C), (M, 4 * C), (4 * C,)))
        partial = meta(gelu.partial_rows(device, M, 4 * C), 4 * C, dtype=FP32)
        return gelu.plan_backward(device, dy, x, bias, approximate, dx, partial)

    return launches


_BIAS = {
    "bias_ptr": (2, "a tile has one column for each thread"),
    "dbias_ptr": (4, "a tile has one column for each thread"),
}

_GELU = [
    Plan(f"bias_gelu {way}, {approximate}", plan(approximate), Budget(warps=32, one_wave=one_wave, narrow=_BIAS))
    for approximate in gelu.FORMS
    for way, plan, one_wave in (("forward", _gelu_forward, False), ("backward", _gelu_backward, True))
]

# AdamW ----------------------------------------------------------------------------------------------------------------


def _adamw(gradient: torch.dtype, compute: torch.dtype | None) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        n = 124_439_808  # GPT-2 124M
        param, exp_avg, exp_avg_sq = (meta(n, dtype=FP32) for _ in range(3))
        lr, step, norm, found_inf = (meta(1, dtype=FP32)[0] for _ in range(4))
        grad, copy = meta(n, dtype=gradient), None if compute is None else meta(n, dtype=compute)
        partial, scalars = meta(adamw.norm_programs(device, grad), dtype=FP32), meta(3, dtype=FP32)
        return adamw.plan_adamw(
            device, param, grad, exp_avg, exp_avg_sq, lr, step, None, copy, partial, scalars, norm, found_inf,
            n, 0.9, 0.95, 1e-8, 0.1, 1.0,
        )  # fmt: skip

    return launches


_SCALARS = {name: (4, "a scalar") for name in ("lr_ptr", "step_ptr", "scalars_ptr", "norm_ptr", "found_inf_ptr")} | {
    "partial_ptr": (4, "one value a program"),
}

_FOUR = dict.fromkeys(("grad_ptr", "compute_ptr"), (8, "4 elements a thread: 16 bytes of float32, 8 of these"))


def _adamw_plans(name: str, gradient: torch.dtype, compute: torch.dtype | None) -> tuple[Plan, Plan]:
    plan, narrow = _adamw(gradient, compute), _SCALARS if gradient == FP32 else _SCALARS | _FOUR
    return (
        Plan(f"adamw norm, {name}", lambda device: plan(device)[:1], Budget(warps=32, one_wave=True, narrow=_SCALARS)),
        Plan(f"adamw update, {name}", lambda device: plan(device)[1:], Budget(warps=32, narrow=narrow)),
    )


_ADAMW = [
    *_adamw_plans("float32 gradient", FP32, None),
    *_adamw_plans("bf16 gradient and copy", BF16, BF16),
]

# Embedding ------------------------------------------------------------------------------------------------------------


def _embedding(plan: str) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        idx, seed = meta(M, dtype=INT64), meta(1, dtype=INT64)
        wte, wpe, x = meta(V, C, dtype=FP32), meta(1024, C, dtype=FP32), meta(M, C, dtype=FP32)
        if plan == "forward":
            return embedding.plan_forward(device, idx, wte, wpe, seed, P_DROP, x)
        if plan == "wpe":
            return embedding.plan_wpe_backward(device, x, seed, P_DROP, wpe)
        tokens, starts = meta(M, dtype=torch.int32), meta(V + 1, dtype=torch.int32)
        pieces = meta(M // embedding.PIECE, C, dtype=FP32)
        return embedding.plan_wte_backward(device, x, tokens, idx, starts, seed, P_DROP, pieces, wte)

    return launches


_TOKENS = {
    "idx_ptr": (4, "one value a row"),
    "seed_ptr": (8, "one value"),
    "tokens_ptr": (4, "two values a program"),
    "starts_ptr": (4, "two values a program"),
    "order_ptr": (4, "one value a row"),
}

_EMBEDDING = [
    Plan(
        f"embedding {name}, dropout",
        _embedding(plan),
        Budget(warps=warps, narrow=_TOKENS),
        fill=_row_fill,
        elements=M * C,
        bytes=moved,
    )
    for name, plan, warps, moved in (
        ("forward", "forward", 32, 2 * M * C * 4),  # a row of wte for each token; wpe comes out of the cache
        ("backward, wte", "wte", 16, (M + V) * C * 4),
        ("backward, wpe", "wpe", 16, (M + 1024) * C * 4),
    )
]

# Cross-entropy --------------------------------------------------------------------------------------------------------


def _cross_entropy(way: str, n_vocab: int = V, columns: int = V) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        logits, targets = meta(M, columns, dtype=BF16), meta(M, dtype=INT64)
        losses, stats = meta(2, M, dtype=FP32), meta(2, M, dtype=FP32)
        options = (-1, 0.0, 0.0, n_vocab)
        if way == "backward":
            dloss, dlogits = meta(1, dtype=FP32)[0], meta(M, columns, dtype=BF16)
            return cross_entropy.plan_backward(device, dloss, logits, targets, stats, dlogits, *options)
        if way == "in place":
            return cross_entropy.plan_forward(device, logits, targets, losses, None, logits, *options)
        return cross_entropy.plan_forward(device, logits, targets, losses, stats, None, *options)

    return launches


def _column_fill(launch: Launch) -> float:
    block = launch.constants["LANES"] * launch.constants["WIDTH"]
    return launch.args["V"] / (-(-launch.args["V"] // block) * block)


def _scale(device: Device) -> list[Launch]:
    x = meta(M, C, dtype=BF16)
    return linear_cross_entropy.plan_scale(device, x, meta(1, dtype=FP32)[0], x)


_ROWS = {
    "targets_ptr": (8, "one value a row"),
    "target_logit_ptr": (2, "one value a row"),
    "losses_ptr": (4, "one value a row"),
    "stats_ptr": (4, "one value a row"),
    "dloss_ptr": (4, "a scalar"),
}

_CROSS_ENTROPY = [
    *(
        Plan(name, launches, Budget(warps=warps, narrow=_ROWS), fill=_column_fill)
        for name, warps, launches in (
            ("cross_entropy forward", 32, _cross_entropy("forward")),
            ("cross_entropy backward", 32, _cross_entropy("backward")),
            ("linear_cross_entropy, rows", 32, _cross_entropy("in place")),
            ("linear_cross_entropy, rows of 65", 24, _cross_entropy("in place", 65, linear_cross_entropy.padded(65))),
        )
    ),
    Plan("linear_cross_entropy, scale", _scale, Budget(warps=32, narrow={"scale_ptr": (4, "a scalar")})),
]

# Matmuls with a GELU --------------------------------------------------------------------------------------------------


def _matmul_forward(approximate: str, choice: int) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        candidates = matmul.tiles_for(matmul.FORWARD_TILES, device, BF16)
        x, weight, bias = meta(M, C, dtype=BF16), meta(4 * C, C, dtype=BF16), meta(4 * C, dtype=BF16)
        pre, act = meta(M, 4 * C, dtype=BF16), meta(M, 4 * C, dtype=BF16)
        tiles = candidates[min(choice, len(candidates) - 1)]
        return matmul.plan_forward(device, x, weight, bias, approximate, pre, act, tiles)

    return launches


def _matmul_backward(approximate: str, choice: int) -> Callable[[Device], list[Launch]]:
    def launches(device: Device) -> list[Launch]:
        candidates = matmul.tiles_for(matmul.BACKWARD_TILES, device, BF16)
        tiles = candidates[min(choice, len(candidates) - 1)]
        dy, weight, partial = meta(M, C, dtype=BF16), meta(C, 4 * C, dtype=BF16), matmul.partial_rows(M, tiles)
        pre, dpre, dbias = meta(M, 4 * C, dtype=BF16), meta(M, 4 * C, dtype=BF16), meta(partial, 4 * C, dtype=FP32)
        return matmul.plan_backward(device, dy, weight, pre, approximate, dpre, dbias, tiles)

    return launches


def _tiles(launch: Launch) -> Matmul:
    tile = 2 * launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"]
    tiles = launch.args["row_tiles"] * launch.args["column_tiles"]
    return Matmul(tiles=tiles, flops=tile * launch.args["K"], step_flops=tile * launch.constants["BLOCK_K"])


_TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_BIAS_ROW = {name: (4, "one row of a tile") for name in ("bias_ptr", "dbias_ptr")}

_MATMUL = [
    Plan(
        f"linear_gelu {way}, {approximate}, tiles {choice}",
        plan(approximate, choice),
        Budget(warps=8, one_wave=True, narrow=_BIAS_ROW, mma=_TENSOR_CORES),
        bytes=2 * (M * C + C * 4 * C + 2 * M * 4 * C),
        matmul=_tiles,
    )
    for approximate, choice in (("erf", 0), ("erf", 1), ("tanh", 0))
    for way, plan in (("forward", _matmul_forward), ("backward", _matmul_backward))
]

PLANS: tuple[Plan, ...] = (*_LAYER_NORM, *_GELU, *_ADAMW, *_EMBEDDING, *_CROSS_ENTROPY, *_MATMUL)
