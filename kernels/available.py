"""Which bundle a device can run. Triton is imported only when the fused one is asked for: it need not be there."""

from collections.abc import Callable

import torch

from kernels.ops import REFERENCE, Ops


def missing(device: torch.device) -> str:
    """What the fused kernels lack on this device, in one line; empty if they run. It launches a kernel to see."""
    if device.type == "cuda" and torch.version.hip:  # torch calls AMD's devices cuda too
        return f"they are written and tuned for NVIDIA's GPUs, this device is AMD's (ROCm {torch.version.hip})"
    try:
        from kernels.launch import INTERPRETED, why_no_launch
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if not INTERPRETED:
        if device.type != "cuda":
            instead = "TRITON_INTERPRET=1 tries them on a CPU, slowly"
            return f"Triton's kernels need a CUDA device, this is {device} ({instead})"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):  # Ampere
            return f"they need compute capability 8.0 or more, this device has {'.'.join(map(str, capability))}"
    return why_no_launch(device)


def too_wide(width: int) -> str:
    """Why the fused kernels, where they run, cannot compute a model of this width, in one line; empty if they can."""
    from kernels.fused.layer_norm import MAX_WIDTH

    return f"their LayerNorm takes at most {MAX_WIDTH} channels, the model has {width}" if width > MAX_WIDTH else ""


def select(name: str, device: torch.device, lacks: Callable[[torch.device], str] = missing) -> Ops:
    """The bundle by name: "reference", "fused", or "auto": fused on a CUDA device that can run it, else reference.

    ValueError if "fused" cannot run on `device`, with the reason, and for another name. lacks: what the
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
    from kernels.fused import FUSED

    return FUSED
