"""Case: one kernel in one regime, its plain-torch meaning, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Traffic(NamedTuple):
    """Bytes that one call moves between memory and registers."""

    dram: int  # every input read once, every output written once, at the tensors' own widths
    cached: int = 0  # further accesses, that the caches serve: parameters read by every program, a row's second read


@dataclass(frozen=True)
class Case:
    """What tests walk (`shapes`) and the benchmark times (`gpt_shapes`; on a CPU, `cpu_shapes`).

    `make_inputs(shape, dtype, device)` gives the keyword arguments of both `fused` and `reference`, drawn from a fixed
    seed; tensors among them that require grad are differentiated. Both return a tensor or a tuple of tensors, whose
    other members (None, integers) are not compared.
    """

    name: str
    fused: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, torch.device], dict[str, Any]]
    shapes: tuple[Shape, ...]
    gpt_shapes: tuple[Shape, ...]
    forward_bytes: Callable[[Shape, torch.dtype], Traffic]
    backward_bytes: Callable[[Shape, torch.dtype], Traffic] | None = None  # None: nothing is differentiated
    flops: Callable[[Shape], int] | None = None  # forward; None: bound by memory, not worth counting
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    cpu_shapes: tuple[Shape, ...] = ()  # none where the case differs from another in its kernel only
    # fused and reference that write over their inputs, where those above work on copies: these are timed
    in_place: tuple[Callable[..., Any], Callable[..., Any]] | None = None


def draw(device: torch.device, seed: int = 0) -> Callable[..., Tensor]:
    """randn(*size, dtype=, scale=, grad=) from one generator: a Case's inputs, the same every time. On the meta device
    they have shapes only."""
    if device.type == "meta":
        return lambda *size, dtype, scale=1.0, grad=True: torch.empty(
            *size, dtype=dtype, device=device, requires_grad=grad
        )
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int, dtype: torch.dtype, scale: float = 1.0, grad: bool = True) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device) * scale
        return values.to(dtype).requires_grad_(grad)

    return randn
