"""The variants that are timed for each case: ours, plain torch eager and compiled, and other people's kernels.

Other people's packages are no dependency. They are imported when they are used: Liger-Kernel's functions
(https://github.com/linkedin/Liger-Kernel, `liger_kernel.transformers.functional`), and every backend of
`model/attention.py`. Attention has no kernel of ours.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.timing import only_compiled
from kernels import reference, select
from kernels.cases import CASES, Case, Shape, draw
from kernels.launch import INTERPRETED
from model.attention import BACKENDS, causal_attention

Function = Callable[..., Any]
COMPILED = "compiled"  # the entrant that is the reference under torch.compile


@dataclass(frozen=True)
class Entrant:
    """One variant of a case. `make()` returns a function of the case's inputs, or raises if it cannot run here.

    `ours`: it must meet the tests' own criterion; if it does not, the run fails. `own_inputs`: it may overwrite its
    inputs, so every call gets copies.
    """

    name: str
    make: Callable[[], Function]
    ours: bool = False
    own_inputs: bool = False


def entrants(case: Case, device: torch.device) -> list[Entrant]:
    """The variants of a case, also those that cannot run here."""
    fused, plain = case.in_place or (case.fused, case.reference)
    compiled = Entrant(COMPILED, lambda: only_compiled(plain))
    if case.name == ATTENTION.name:
        others = [Entrant(name, partial(partial, plain, backend=name)) for name in BACKENDS if name != "auto"]
        return [Entrant("reference", lambda: plain), compiled, *others]

    def ours() -> Function:
        if reason := why_not_fused(device):
            raise ValueError(reason)
        return fused

    found = [Entrant("fused", ours, ours=True), Entrant("reference", lambda: plain), compiled]
    if case.name in LIGER:
        found.append(Entrant("liger", partial(liger, case.name), own_inputs=True))
    return found


def why_not_fused(device: torch.device) -> str:
    """Why our kernels are not timed on this device; empty if they are."""
    if INTERPRETED or device.type != "cuda":
        return "Triton's kernels need a CUDA device; its interpreter is no benchmark"
    try:
        select("fused", device)
    except ValueError as error:
        return str(error)
    return ""


# For each case that Liger-Kernel has too: its function's name, and how to call it.
LIGER: dict[str, tuple[str, Function]] = {
    "layer_norm": (
        "liger_layer_norm",
        lambda theirs, x, weight, bias, dtype: theirs(x, weight, bias, reference.LAYER_NORM_EPS).to(dtype),
    ),
    "cross_entropy": (
        "liger_cross_entropy",
        lambda theirs, logits, targets: theirs(logits, targets, ignore_index=-1).float(),
    ),
    "linear_cross_entropy": (
        "liger_fused_linear_cross_entropy",
        lambda theirs, x, weight, targets, chunk_rows: theirs(x, weight, targets, ignore_index=-1).float(),
    ),
}
LIGER |= {"linear_cross_entropy in chunks": LIGER["linear_cross_entropy"]}  # it chooses its own chunks


def liger(case: str) -> Function:
    """Liger-Kernel's function for a case. ImportError if it is not installed."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    name, call = LIGER[case]
    return partial(call, getattr(functional, name))


# Attention


def _qkv(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    B, T, H, Q = shape
    return {"qkv": draw(device)(B, T, 3 * H * Q, dtype=dtype), "n_head": H}


def _attention_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of qkv and y, or of their gradients."""
    B, T, H, Q = shape
    return 4 * B * T * H * Q * dtype.itemsize


ATTENTION = Case(
    name="attention",
    fused=causal_attention,
    reference=causal_attention,
    make_inputs=_qkv,
    shapes=((2, 64, 2, 32),),
    gpt_shapes=((32, 1024, 12, 64), (64, 256, 6, 64), (8, 1024, 25, 64)),
    cpu_shapes=((4, 256, 6, 64),),
    forward_bytes=_attention_bytes,
    backward_bytes=_attention_bytes,
    flops=lambda shape: 2 * shape[0] * shape[1] ** 2 * shape[2] * shape[3],  # two matmuls, half of each masked
)

TIMED: tuple[Case, ...] = (*CASES, ATTENTION)
