"""The registry: every kernel in every regime, its plain-torch meaning, and what it may cost.

Tests walk a case's `shapes`, the benchmark times its `gpt_shapes` (on a CPU `cpu_shapes`), `kernels.targets` compiles
the first of these and holds each kernel to its row of `BUDGETS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from kernels import FUSED, add_layer_norm, cross_entropy, gelu, layer_norm, reference
from kernels import traffic as least
from kernels.launch import FLOATS

Shape = tuple[int, ...]
GPT = ((32 * 1024, 768), (64 * 256, 384), (8 * 1024, 1600))  # rows, channels: GPT-2 124M, shakespeare_char, GPT-2 XL


@dataclass(frozen=True)
class Case:
    """One operation in one regime.

    `make_inputs(shape, dtype, device)` gives the keyword arguments of both `fused` and `reference`, drawn from a fixed
    seed; tensors among them that require grad are differentiated. What both return or write over is compared.
    """

    name: str
    fused: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, torch.device], dict[str, Any]]
    shapes: tuple[Shape, ...]  # for tests; a comment says which regime of the kernel each exercises
    gpt_shapes: tuple[Shape, ...]
    # (*shape, bytes of one element) -> the least bytes that any implementation moves
    forward_bytes: Callable[..., int]
    backward_bytes: Callable[..., int] | None = None  # None: nothing is differentiated
    again: float = 1.0  # times the least that ours moves more: what it reads a second time, out of the caches
    flops: Callable[..., int] | None = None  # (*shape) -> forward; None: bound by memory, not worth counting
    dtypes: tuple[torch.dtype, ...] = FLOATS
    cpu_shapes: tuple[Shape, ...] = ()  # none where the case differs from another in its kernel only
    compiled_with: tuple[dict[str, Any], ...] = ({},)  # arguments beside the inputs, each compiled: dropout


def draw(device: torch.device, seed: int = 0) -> Callable[..., Tensor]:
    """randn(*size, dtype=, scale=, grad=) from one generator: a Case's inputs, the same every time. On the meta device
    they have shapes only."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def randn(*size: int, dtype: torch.dtype, scale: float = 1.0, grad: bool = True) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device) * scale
        return values.to(dtype).requires_grad_(grad)

    return randn


# LayerNorm, alone and with the residual addition: (M, C) --------------------------------------------------------------


def _layer_norm(name: str, *, bias: bool, add: bool, first: bool = False, wide: bool = False) -> Case:
    """first: of a model, with a stream and nothing to add to it; wide: the stream is float32."""

    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        randn, C = draw(device), shape[-1]
        inputs = {"x": None if first else randn(*shape, dtype=dtype)}
        if add:
            inputs["residual"] = randn(*shape, dtype=torch.float32 if wide else dtype, scale=3.0)
        inputs["weight"] = randn(C, dtype=torch.float32)
        inputs["bias"] = randn(C, dtype=torch.float32) if bias else None
        return {**inputs, "dtype": dtype}

    return Case(
        name=name,
        fused=add_layer_norm if add else layer_norm,
        reference=reference.add_layer_norm if add else reference.layer_norm,
        make_inputs=make_inputs,
        shapes=(
            (1, 64),  # one row; a width that fills its block
            (37, 37),  # neither fills a block; rows not a multiple of a tile
            (3, 1600),  # gpt2-xl: two fifths of the block masked
            (130, 24),  # every backward program takes several tiles of rows, the last one ragged
            (5, 2100),  # more warps
        ),
        gpt_shapes=GPT,
        cpu_shapes=((4096, 384),) if bias and not wide else (),
        forward_bytes=lambda M, C, b: least.layer_norm_forward(
            M, C, b, 4 if wide else b, bias=bias, add=add and not first
        ),
        backward_bytes=lambda M, C, b: least.layer_norm_backward(M, C, b, 4 if wide else b, bias=bias, add=add),
        again=1.5 if first else 1.0,  # the stream is also copied
        compiled_with=({}, {"p": 0.1}) if add and not first else ({},),
    )


# The partial sums of L LayerNorms' gradients, P rows each: (L, P, C) --------------------------------------------------


def _sum_partials(*, accumulate: bool) -> Case:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        (L, P, C), randn = shape, draw(device)
        offsets = torch.arange(L, device=device) * (C + 64)  # gaps between them, as in the flat gradients
        out = randn(L * (C + 64), dtype=dtype, grad=False)
        return {"partials": randn(L, P, C, dtype=torch.float32, grad=False), "offsets": offsets, "out": out}

    def plain(partials: Tensor, offsets: Tensor, out: Tensor) -> None:
        place = offsets[:, None] + torch.arange(partials.shape[-1], device=out.device)
        out[place] = (partials.sum(1) + (out[place] if accumulate else 0)).to(out.dtype)

    return Case(
        name="sum_partials, added" if accumulate else "sum_partials",
        fused=partial(FUSED.sum_partials, accumulate=accumulate),
        reference=plain,
        make_inputs=make_inputs,
        shapes=(
            (1, 1, 64),  # one row, one tile of columns
            (3, 37, 37),  # neither rows nor columns fill a tile
            (2, 64, 130),  # several tiles of columns and of rows
        ),
        gpt_shapes=((25, 528, 768), (13, 528, 384)),
        forward_bytes=lambda L, P, C, b: L * (4 * P * C + 8 + (1 + accumulate) * C * b),
    )


# GELU: (M, N) ---------------------------------------------------------------------------------------------------------


def _gelu(approximate: str) -> Case:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {"x": draw(device)(*shape, dtype=dtype, scale=2.0), "approximate": approximate}

    return Case(
        name=f"gelu, {approximate}",
        fused=gelu,
        reference=reference.gelu,
        make_inputs=make_inputs,
        shapes=(
            (1, 64),  # one row
            (37, 37),  # neither rows nor columns fill a tile
            (8, 256),  # one whole tile
            (150, 300),  # two columns of tiles; every backward program takes several tiles, the last one ragged
        ),
        gpt_shapes=tuple((M, 4 * C) for M, C in GPT),
        cpu_shapes=((1024, 4 * 384),),
        forward_bytes=least.gelu_forward,
        backward_bytes=least.gelu_backward,
    )


# The MLP: (M, K, N); its fused matmul's tiles are 16 x 32 of 16 in the interpreter, whose two programs share them -----


def _mlp(approximate: str, *, tiles: int) -> Case:
    """tiles: as `mlp` takes them, forward and backward; 0: cuBLAS."""

    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        (M, K, N), randn = shape, draw(device)
        return {
            "x": randn(M, K, dtype=dtype),
            "fc_weight": randn(N, K, dtype=dtype, scale=2 * K**-0.5),
            "fc_bias": randn(N, dtype=dtype),
            "proj_weight": randn(K, N, dtype=dtype, scale=N**-0.5),
            "proj_bias": randn(K, dtype=dtype),
            "approximate": approximate,
        }

    def product(M: int, K: int, N: int, b: int) -> int:  # both operands; what goes into GELU, and what comes out
        return (M * K + N * K + 2 * M * N) * b

    return Case(
        name=f"mlp, {approximate}, {f'tiles {tiles}' if tiles else 'cublas'}",
        fused=partial(FUSED.mlp, forward_tiles=tiles, backward_tiles=tiles),
        reference=reference.mlp,
        make_inputs=make_inputs,
        shapes=(
            (16, 32, 32),  # one whole tile
            (1, 16, 64),  # one row
            (37, 37, 53),  # nothing fills its tile; three tiles for each program
            (130, 16, 48),  # more rows of tiles than are taken together
        ),
        gpt_shapes=tuple((M, C, 4 * C) for M, C in GPT),
        dtypes=FLOATS if tiles < 2 else FLOATS[1:],
        cpu_shapes=() if tiles else ((1024, 384, 4 * 384),),
        # of cuBLAS's way what GELU moves: the products are not ours
        forward_bytes=product if tiles else lambda M, K, N, b: least.gelu_forward(M, N, b),
        backward_bytes=product if tiles else lambda M, K, N, b: least.gelu_backward(M, N, b),
        again=8.0 if tiles else 1.0,  # an operand is read once for each column, or row, of tiles
        flops=lambda M, K, N: 4 * M * K * N,
        compiled_with=({}, {"fc_bias": None, "proj_bias": None}),
    )


# Cross-entropy, of logits at hand (M, V) and of a head's (M, C, V), all rows at once and in chunks --------------------


def _targets(M: int, V: int, device: torch.device) -> Tensor:
    """Every fourth does not count."""
    targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(2))
    targets[3::4] = -1
    return targets.to(device)


def _cross_entropy() -> Case:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        M, V = shape
        return {"logits": draw(device)(M, V, dtype=dtype, scale=3.0), "targets": _targets(M, V, device)}

    return Case(
        name="cross_entropy",
        fused=cross_entropy,
        reference=reference.cross_entropy,
        make_inputs=make_inputs,
        shapes=(
            (1, 37),  # one row, which fills no block; rows that are not aligned
            (70, 65),  # characters: several rows a program, the last program ragged
            (5, 8192),  # one block, filled
            (3, 16400),  # three blocks, the last one ragged
            (2, 10007),  # the same, not aligned
        ),
        gpt_shapes=((32 * 1024, 50304), (64 * 256, 65)),
        cpu_shapes=((4096, 512),),
        forward_bytes=lambda M, V, b: least.cross_entropy_forward(M, V, b, counted=M - M // 4, gradient=False),
        backward_bytes=lambda M, V, b: (M - M // 4 + M) * V * b + 16 * M + 8,
    )


def _linear_cross_entropy(name: str, *, chunked: bool) -> Case:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        M, C, V = shape
        randn, rows = draw(device), 4096 if M > 4096 else 32
        inputs = {"x": randn(M, C, dtype=dtype), "weight": randn(V, C, dtype=dtype, scale=3 * C**-0.5)}
        return {**inputs, "targets": _targets(M, V, device), "chunk_rows": rows if chunked else 0}

    return Case(
        name=name,
        fused=FUSED.linear_cross_entropy,
        reference=lambda **inputs: reference.linear_cross_entropy(**inputs)[0],
        make_inputs=make_inputs,
        shapes=(
            (1, 16, 37),  # one row
            (70, 24, 65),  # several rows a program, three chunks, all ragged
            (2, 8, 16400),  # several blocks a row; one chunk, not filled
        ),
        gpt_shapes=((32 * 1024, 768, 50304), (64 * 256, 384, 65), (8 * 1024, 1600, 50304)),
        cpu_shapes=() if chunked else ((4096, 384, 512),),
        forward_bytes=lambda M, C, V, b: least.cross_entropy_forward(M, V, b, counted=M - M // 4, gradient=True),
        backward_bytes=lambda M, C, V, b: 0,  # torch's own kernels
        again=1.8,  # a row of logits is read twice, the second time out of the cache; rows are padded
        flops=lambda M, C, V: 2 * M * C * V,
    )


# Embedding: (B, T, C, V). Tokens follow Zipf's law, as a text's do: the k-th most common is k times rarer -------------


@lru_cache
def _tokens(B: int, T: int, V: int) -> Tensor:
    uniform = torch.rand(B, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((V + 1) ** uniform).long() - 1


def _embedding() -> Case:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        randn, (B, T, C, V) = draw(device), shape
        wte, wpe = randn(V, C, dtype=dtype), randn(T, C, dtype=dtype)
        return {"idx": _tokens(B, T, V).to(device), "wte": wte, "wpe": wpe, "dtype": dtype}

    return Case(
        name="embedding",
        fused=FUSED.embedding,
        reference=reference.embedding,
        make_inputs=make_inputs,
        shapes=(
            (2, 9, 37, 11),  # nothing fills a block; fewer rows than a piece
            (3, 77, 64, 3),  # long segments: whole pieces inside them; a piece's last row belongs to another token
            (9, 3, 600, 50),  # several tiles of sequences, the last one ragged; most tokens are not there
            (1, 1, 1600, 2),  # one row, gpt2-xl's width
        ),
        gpt_shapes=((32, 1024, 768, 50304), (64, 256, 384, 65), (8, 1024, 1600, 50304)),
        cpu_shapes=((16, 256, 384, 512),),
        forward_bytes=lambda B, T, C, V, b: least.embedding_forward(
            B * T, T, C, b, b, distinct=_tokens(B, T, V).unique().numel()
        ),
        backward_bytes=lambda B, T, C, V, b: least.embedding_backward(B * T, T, C, V, b, b),
        again=2.0,  # a token's row is read wherever it stands; dx is read for both tables
        compiled_with=({}, {"p": 0.1}),
    )


# AdamW over flat buffers: (n, n_decay) -------------------------------------------------------------------------------


def _adamw(name: str, *, copy: bool, scaled: bool, max_norm: float) -> Case:
    def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        randn, (n, n_decay) = draw(device), shape

        def scalar(value: float) -> Tensor:
            return torch.tensor(value, device=device)

        return {
            "param": randn(n, dtype=torch.float32, scale=0.02, grad=False),
            "grad": randn(n, dtype=dtype, scale=0.5, grad=False),
            "exp_avg": randn(n, dtype=torch.float32, scale=0.01, grad=False),
            "exp_avg_sq": randn(n, dtype=torch.float32, scale=0.01, grad=False).square_(),
            "lr": scalar(6e-4),
            "step": scalar(9.0),
            "compute": randn(n, dtype=dtype if dtype.itemsize == 2 else torch.bfloat16, grad=False) if copy else None,
            "inv_scale": scalar(2.0**-7) if scaled else None,
            "n_decay": n_decay,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "max_norm": max_norm,
        }

    return Case(
        name=name,
        fused=FUSED.adamw,
        reference=reference.adamw,
        make_inputs=make_inputs,
        shapes=(
            (1, 1),  # one element
            (1000, 601),  # the boundary of the decay inside a tile; the last tile ragged
            (70_001, 33_333),  # every program of both kernels takes several tiles in Triton's interpreter
            (12_288, 0),  # whole tiles, three programs of the norm kernel: no power of two; nothing decays
        ),
        gpt_shapes=((124_373_760, 124_354_560), (10_745_088, 10_740_096)),  # GPT-2 124M; shakespeare_char
        cpu_shapes=() if copy else ((1_000_000, 990_000),),
        forward_bytes=lambda n, n_decay, b: least.adamw(n, b, copy=2 if copy else 0),
        again=1.25,  # the norm is there before the first element is updated: the gradient is read twice
    )


CASES: list[Case] = [
    _layer_norm("layer_norm", bias=True, add=False),
    _layer_norm("layer_norm without bias", bias=False, add=False),
    _layer_norm("add_layer_norm, nothing added", bias=False, add=True, first=True),
    _layer_norm("add_layer_norm", bias=True, add=True),
    _layer_norm("add_layer_norm, float32 stream", bias=True, add=True, wide=True),
    _layer_norm("add_layer_norm without bias, float32 stream", bias=False, add=True, wide=True),
    _sum_partials(accumulate=False),
    _sum_partials(accumulate=True),
    _gelu("erf"),
    _gelu("tanh"),
    _mlp("erf", tiles=1),
    _mlp("tanh", tiles=2),
    _mlp("erf", tiles=0),
    _cross_entropy(),
    _linear_cross_entropy("linear_cross_entropy", chunked=False),
    _linear_cross_entropy("linear_cross_entropy in chunks", chunked=True),
    _embedding(),
    _adamw("adamw", copy=False, scaled=False, max_norm=1.0),
    _adamw("adamw with a loss scale and a copy", copy=True, scaled=True, max_norm=1e-3),
    _adamw("adamw without clipping, with a copy", copy=True, scaled=False, max_norm=0.0),
]


# Budgets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a kernel must keep on every architecture that it is compiled for.

    warps: on a multiprocessor at once. one_wave: the whole grid is there at once, as programs that loop until all is
    done need. wide: of the bytes that its loads and stores name, the share that moves 16 bytes a thread or a whole
    tile; the rest are a row's numbers. mma: whether it multiplies with the architecture's newest tensor-core
    instruction. spills: instructions that move registers to or from memory.
    """

    warps: int
    one_wave: bool = False
    wide: float = 0.9
    mma: bool = False
    spills: int = 0


BUDGETS: dict[str, Budget] = {
    "add_layer_norm_fwd_kernel": Budget(warps=32, spills=2),  # one register, once, of bfloat16 alone on sm_90
    "add_layer_norm_bwd_kernel": Budget(warps=12, one_wave=True),
    "sum_partials_kernel": Budget(warps=32, wide=0.7),  # one warp writes the sums
    "gelu_fwd_kernel": Budget(warps=32),
    "gelu_bwd_kernel": Budget(warps=32),
    "linear_gelu_fwd_kernel": Budget(warps=8, one_wave=True, mma=True),
    "linear_gelu_bwd_kernel": Budget(warps=8, one_wave=True, mma=True),
    "count_kernel": Budget(warps=8),
    "cross_entropy_fwd_kernel": Budget(warps=24, wide=0.4),
    "embedding_fwd_kernel": Budget(warps=32),
    "embedding_bwd_pieces_kernel": Budget(warps=16, wide=0.7),
    "embedding_bwd_wte_kernel": Budget(warps=16, wide=0.7),
    "embedding_bwd_wpe_kernel": Budget(warps=16, wide=0.7),
    "adamw_norm_kernel": Budget(warps=32, one_wave=True, wide=0.7),
    "adamw_update_kernel": Budget(warps=32, wide=0.5),  # 4 elements a thread: 8 bytes of a 2-byte dtype
}
