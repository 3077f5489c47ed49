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


def missing(
    device: torch.device,
    trial: Callable[[torch.device], str] | None = None,
    rocm: str | None = torch.version.hip,
) -> str:
    """What the fused kernels lack on this device, in one line; empty where they run.

    trial: launches a kernel on the device and says why it cannot; None for that of `kernels/trial.py`. rocm: the
    version that torch was built for, if it was; torch calls such a device cuda too.
    """
    if device.type == "cuda" and rocm:
        return f"they are written and tuned for NVIDIA's GPUs, this device is AMD's (ROCm {rocm})"
    try:
        from kernels.launch import INTERPRETED
        from kernels.trial import why_not
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if not INTERPRETED:
        if device.type != "cuda":
            instead = "TRITON_INTERPRET=1 tries them on a CPU, slowly"
            return f"Triton's kernels need a CUDA device, this is {device} ({instead})"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"they need compute capability 8.0 or more, this device has {'.'.join(map(str, capability))}"
    return (trial or why_not)(device)


def select(name: str, device: torch.device, lacks: Callable[[torch.device], str] = missing) -> Ops:
    """The bundle by name: "reference", "fused", or "auto": fused on a CUDA device that can run it, else reference.

    ValueError, saying what is missing, where "fused" cannot run on `device`, and for another name. lacks: what the
    fused kernels lack on a device, asked only where they are wanted.
    """
    if name not in ("auto", "fused", "reference"):
        raise ValueError(f"got {name!r}, expected auto, fused or reference")
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return REFERENCE
    if reason := lacks(device):
        if name == "fused":
            raise ValueError(f"got fused, expected reference or auto: {reason}")
        return REFERENCE
    from kernels.fused import FUSED  # only here: Triton need not be there for what does without it

    return FUSED
