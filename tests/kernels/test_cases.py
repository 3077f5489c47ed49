"""Every case of the registry: values, gradients, compilation, bytes. The same bits twice: on a GPU, test_gpu.py."""

import re

import pytest
import torch

from kernels.cases import CASES, Case, Shape
from kernels.check import disagreement, fault, outputs_and_gradients
from kernels.launch import INTERPRETED
from tests.kernels.watcher import Memory

# each shape of a case in one of its dtypes, by turns; in the others it is slow
REGIMES = [
    pytest.param(
        case,
        shape,
        dtype,
        id=f"{case.name}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}",
        marks=[] if (i + j + k) % len(case.dtypes) == 0 else pytest.mark.slow,
    )
    for i, case in enumerate(CASES)
    for j, shape in enumerate(case.shapes)
    for k, dtype in enumerate(case.dtypes)
]
BY_NAME = [pytest.param(case, id=case.name) for case in CASES]
KINDS = [re.split(" |,", case.name)[0] for case in CASES]  # adamw, of which there are several cases
COMPILED = [
    pytest.param(case, id=case.name, marks=[] if KINDS.index(kind) == i else pytest.mark.slow)
    for i, (case, kind) in enumerate(zip(CASES, KINDS, strict=True))
]


@pytest.mark.parametrize(("case", "shape", "dtype"), REGIMES)
def test_agrees_with_float64(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, nan_filled: None
) -> None:
    assert not fault(case.fused, case.reference, case.make_inputs(shape, dtype, device))


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_without_a_break_it_is_the_same(case: Case, device: torch.device, compiler: None) -> None:
    inputs = case.make_inputs(case.shapes[0], case.dtypes[-1], device)
    torch.compiler.reset()
    compiled = torch.compile(case.fused, fullgraph=True)
    eager, got = outputs_and_gradients(case.fused, inputs), outputs_and_gradients(compiled, inputs)
    assert not disagreement(got, eager, eager)


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")
@pytest.mark.parametrize("case", BY_NAME)
def test_moves_little_more_than_the_least(case: Case, memory: Memory) -> None:
    """At the shape with the most rows, where vectors, statistics and partial sums count least."""
    shape, dtype = max(case.shapes), torch.float32
    inputs = case.make_inputs(shape, dtype, torch.device("cpu"))
    returned = case.fused(**inputs)
    forward, least = memory.loaded + memory.stored, case.forward_bytes(shape, dtype)
    assert least <= forward <= 1.1 * case.again * least
    if case.backward_bytes is not None:
        outputs = [o for o in (returned if isinstance(returned, tuple) else (returned,)) if o is not None]
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        backward, least = memory.loaded + memory.stored - forward, case.backward_bytes(shape, dtype)
        assert least <= backward <= 1.1 * case.again * least
