"""A case of plain torch that the tests of the benchmarks measure."""

from typing import Any

import torch
from torch import Tensor

from bench.kernels import Contest
from bench.results import Kernel
from kernels.cases import Case, draw

CPU = torch.device("cpu")
SHAPE = (8, 16)
FP32 = torch.float32


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * weight.float()).to(x.dtype)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    randn = draw(device)
    return {"x": randn(*shape, dtype=dtype), "weight": randn(shape[-1], dtype=dtype)}


TOY = Case(
    name="toy",
    fused=scaled,
    reference=scaled,
    make_inputs=inputs_of,
    shapes=(SHAPE,),
    gpt_shapes=(SHAPE,),
    forward_bytes=lambda shape, dtype: 100,
    backward_bytes=lambda shape, dtype: 150,
    cpu_shapes=(SHAPE,),
)


def measured(case: Case, direction: str = "forward", **options: Any) -> dict[str, Kernel]:
    found = Contest(case, case.cpu_shapes[0], FP32, CPU).measure(direction, seconds=0, **options)
    return {row.variant: row for row in found}
