"""The bundle of operations that a model is built with: chosen once, passed in, never swapped.

A model's parameters and state_dict are the same whichever bundle it holds, so a checkpoint made with one runs with
another, and a parity test is two constructors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference

OLDEST = (8, 0)  # compute capability of the oldest devices that the kernels are written for: Ampere


@dataclass(frozen=True)
class Ops:
    """Functions with the signatures and meanings of `kernels/reference.py`."""

    name: str
    embedding: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    mlp: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor | None]]
    adamw: Callable[..., tuple[Tensor, Tensor]]


REFERENCE = Ops(
    name="reference",
    embedding=reference.embedding,
    layer_norm=reference.layer_norm,
    add_layer_norm=reference.add_layer_norm,
    mlp=reference.mlp,
    linear_cross_entropy=reference.linear_cross_entropy,
    adamw=reference.adamw,
)


def select(name: str, device: torch.device) -> Ops:
    """The bundle by name: "reference", "fused", or "auto": fused where the device can run it, else reference.

    ValueError, saying what is missing, where "fused" cannot run on `device`, and for another name.
    """
    if name not in ("auto", "fused", "reference"):
        raise ValueError(f"got {name!r}, expected auto, fused or reference")
    missing = "" if name == "reference" else _missing(device)
    if name == "fused" and missing:
        raise ValueError(f"got fused, expected reference or auto: {missing}")
    if name == "reference" or missing or (name == "auto" and device.type != "cuda"):
        return REFERENCE
    from kernels.fused import FUSED  # only here: Triton need not be there for what does without it

    return FUSED


def _missing(device: torch.device) -> str:
    """What the fused kernels lack on this device; empty where they run."""
    try:
        from kernels.launch import INTERPRETED
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device, this is {device} (TRITON_INTERPRET=1 tries them on a CPU, slowly)"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"they need compute capability 8.0 or more, this device has {'.'.join(map(str, capability))}"
    return ""
