"""Every case of the registry: values, gradients, bytes, compilation. The same bits twice: on a GPU, test_gpu.py."""

import math

import pytest
import torch

from kernels.cases import CASES, Case, Shape
from kernels.check import disagreement, fault, outputs_and_gradients
from tests.kernels.watcher import Memory

# the same kernels as another case's, with other arguments: at one shape
VARIANTS = [
    "layer_norm", "layer_norm without bias", "add_layer_norm, nothing added", "add_layer_norm",
    "add_layer_norm without bias, float32 stream", "sum_partials, added", "gelu, tanh", "adamw",
    "adamw without clipping, with a copy",
]  # fmt: skip


def many_rows(case: Case) -> Shape:
    """The shape at which vectors, statistics and partial sums count least; of adamw's not the largest, which takes
    seconds."""
    return max(shape for shape in case.shapes if shape[0] <= 1000)


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
    for j, shape in enumerate([many_rows(case)] if case.name in VARIANTS else case.shapes)
    for k, dtype in enumerate(case.dtypes)
]
COMPILED = [
    pytest.param(case, "aot_eager_decomp_partition", id=case.name) for case in CASES if case.name not in VARIANTS
] + [pytest.param(case, "inductor", id=f"{case.name}-inductor", marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("case", "shape", "dtype"), REGIMES)
def test_agrees_with_float64_and_moves_little_more_than_the_least(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, memory: Memory | None, nan_filled: None
) -> None:
    """Bytes are counted in Triton's interpreter."""
    forward = 0

    def fused(**inputs):
        nonlocal forward
        returned = case.fused(**inputs)
        forward = memory.loaded + memory.stored if memory else 0
        return returned

    assert not fault(fused, case.reference, case.make_inputs(shape, dtype, device))
    if memory and shape == many_rows(case):
        least = case.forward_bytes(*shape, dtype.itemsize)
        assert least <= forward <= 1.1 * case.again * least
        if case.backward_bytes is not None:
            backward, least = memory.loaded + memory.stored - forward, case.backward_bytes(*shape, dtype.itemsize)
            assert least <= backward <= 1.1 * case.again * least


@pytest.mark.parametrize(("case", "backend"), COMPILED)
def test_compiled_without_a_break_it_is_the_same(
    case: Case, backend: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if backend == "inductor":
        request.getfixturevalue("compiler")
    inputs = case.make_inputs(case.shapes[0], case.dtypes[-1], device)
    torch.compiler.reset()
    compiled = torch.compile(case.fused, fullgraph=True, backend=backend)
    eager, got = outputs_and_gradients(case.fused, inputs), outputs_and_gradients(compiled, inputs)
    assert not disagreement(got, eager, eager)


@pytest.mark.parametrize(
    ("times", "agrees"), [(0.0, True), (1.9, True), (2.1, False), (-2.1, False), (math.nan, False)]
)
def test_an_error_may_be_twice_plain_torchs(times: float, agrees: bool) -> None:
    exact = torch.linspace(0.5, 1, 9, dtype=torch.float64)
    fused, plain = exact.float(), exact.float() + 1e-3
    fused[4] += times * 1e-3
    assert (disagreement({"y": fused}, {"y": plain}, {"y": exact}) == "") == agrees
