"""Every case of the registry: values, gradients, bytes, compilation; on tensors that lie otherwise in memory, on rows
far apart, and on no rows. The same bits twice: on a GPU, test_gpu.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kernels.cases import CASES, Case, Shape
from kernels.check import disagreement, fault, outputs_and_gradients
from kernels.launch import INTERPRETED
from tests.kernels.watcher import Memory

NAMED = {case.name: case for case in CASES}
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


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, test_gpu.py; bytes are counted in Triton's interpreter")
@pytest.mark.parametrize(("case", "shape", "dtype"), REGIMES)
def test_agrees_with_float64_and_moves_little_more_than_the_least(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, memory: Memory, nan_filled: None
) -> None:
    forward = 0

    def fused(**inputs):
        nonlocal forward
        returned = case.fused(**inputs)
        forward = memory.loaded + memory.stored
        return returned

    assert not fault(fused, case.reference, case.make_inputs(shape, dtype, device))
    if shape == many_rows(case):
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
    compiled = torch.compile(case.fused, fullgraph=True, backend=backend)
    eager, got = outputs_and_gradients(case.fused, inputs), outputs_and_gradients(compiled, inputs)
    assert not disagreement(got, eager, eager)


# every kernel's arguments, and both paths of mlp; the other cases differ in what is computed only
NAMES = [
    "layer_norm", "add_layer_norm, nothing added", "add_layer_norm, float32 stream", "gelu, erf", "mlp, erf, tiles 1",
    "mlp, erf, cublas", "cross_entropy", "linear_cross_entropy", "linear_cross_entropy in chunks", "embedding",
]  # fmt: skip
VARIOUS = [pytest.param(case, id=case.name) for case in CASES if case.name in NAMES]
WITHOUT_CUBLAS = [param for param in VARIOUS if "cublas" not in param.id and "linear" not in param.id]
LAYOUTS = ["sliced", "aligned", "every second", "one row for all"]
RAGGED = {2: (21, 37), 3: (21, 37, 53), 4: (2, 9, 37, 11)}  # by how many numbers a case's shapes have


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x's values in other memory; of "one row for all", its first row's."""
    if x.ndim == 0:
        return x
    *lead, width = x.shape
    rows = x.reshape(-1, width)
    if layout == "sliced":  # rows further apart than they are wide, and off every alignment
        return torch.cat([x.new_zeros(*lead, 1), x, x.new_zeros(*lead, 2)], -1)[..., 1:-2]
    if layout == "aligned":  # rows that are read 16 bytes at a time though their width is anything
        return torch.cat([x, x.new_zeros(*lead, 16 - width % 16)], -1)[..., :width]
    if layout == "every second":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    if layout == "one row for all":
        return rows[:1].expand(rows.shape).view(x.shape)
    assert layout == "far apart"  # in memory that is never touched in between
    stride = 2**31 // (len(rows) - 1) // 16 * 16 + 16
    storage = torch.UntypedStorage(x.itemsize * (stride * (len(rows) - 1) + width), device=x.device)
    return x.new_empty(0).set_(storage, 0, rows.shape, (stride, 1)).copy_(rows).view(x.shape)


def relaid(function: Callable[..., Any], layout: str) -> Callable[..., list[Tensor]]:
    """The function, to whose results gradients come in this layout."""

    def run(**inputs: Any) -> list[Tensor]:
        outputs = [x for x in tree_leaves(function(**inputs)) if isinstance(x, Tensor)]
        for output in outputs:
            output.register_hook(lambda gradient: laid_out(gradient, layout))
        return outputs

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", VARIOUS)
def test_any_strides(case: Case, layout: str, device: torch.device, nan_filled: None) -> None:
    """Of inputs and gradients. In float32: on few elements in less, torch's error is a lottery."""
    shape = RAGGED[len(case.shapes[0])]
    inputs = case.make_inputs(shape, torch.float32, device)
    several = () if "logits" in inputs else ("x", "residual", "targets")  # (..., C) are rows as (M, C) are
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            # if all logits were equal, torch's error would be 0
            how = "sliced" if name == "weight" and layout == "one row for all" else layout
            changed = laid_out(x.detach(), how)
            inputs[name] = (changed[None] if name in several else changed).requires_grad_(x.requires_grad)
    assert not fault(relaid(case.fused, layout), relaid(case.reference, layout), inputs)


@pytest.mark.parametrize("case", WITHOUT_CUBLAS)
def test_rows_beyond_32_bits(case: Case, device: torch.device) -> None:
    """Row numbers times strides, each of 32 bits. One tensor at a time: on a GPU each takes 4 GB."""
    shape = {2: (3, 3), 3: (3, 16, 16), 4: (1, 3, 3, 3)}[len(case.shapes[0])]
    inputs = case.make_inputs(shape, torch.bfloat16, device)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.ndim == 2 and x.requires_grad:
            far = laid_out(x.detach(), "far apart").requires_grad_()
            assert not fault(case.fused, case.reference, inputs | {name: far}), name
    layout = "sliced" if "logits" in inputs else "far apart"
    assert not fault(relaid(case.fused, layout), relaid(case.reference, layout), inputs)


@pytest.mark.parametrize("case", VARIOUS)
def test_no_rows(case: Case, device: torch.device, nan_filled: None) -> None:
    inputs = case.make_inputs((0, *case.shapes[0][1:]), torch.float32, device)
    assert not fault(case.fused, case.reference, inputs)


@pytest.mark.parametrize(
    ("name", "shape", "stored", "largest"),
    [
        ("mlp, erf, cublas", (17, 16, 48), 2 * 17 * 48, 2 * 17 * 48),  # act, and never pre
        ("mlp, erf, tiles 1", (17, 16, 48), 2 * 17 * 48, 2 * 17 * 48),
        ("linear_cross_entropy", (64, 8, 20), 4 * 64 + 4, 2 * 64 * 32),  # losses and how many count; of all logits
        ("linear_cross_entropy in chunks", (64, 8, 20), 4 * 64 + 4, 2 * 32 * 32),  # of a chunk's
    ],
)
def test_without_a_gradient_nothing_is_kept_for_one(
    name: str, shape: Shape, stored: int, largest: int, device: torch.device, memory: Memory | None
) -> None:
    """stored, largest: bytes in Triton's interpreter, of all stores and of the last kernel's largest tensor."""
    inputs = NAMED[name].make_inputs(shape, torch.bfloat16, device)
    frozen = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    expected, *_ = tree_leaves(NAMED[name].fused(**inputs))
    assert expected.requires_grad
    for arguments in (inputs, frozen):
        before = memory.stored if memory else 0
        with torch.set_grad_enabled(arguments is frozen):
            result, *_ = tree_leaves(NAMED[name].fused(**arguments))
        assert torch.equal(result, expected)
        if memory:
            assert memory.stored - before == stored
            assert max(end - first for first, end in memory.spans) == largest


@pytest.mark.parametrize(
    ("times", "agrees"), [(0.0, True), (1.9, True), (2.1, False), (-2.1, False), (math.nan, False)]
)
def test_an_error_may_be_twice_plain_torchs(times: float, agrees: bool) -> None:
    exact = torch.linspace(0.5, 1, 9, dtype=torch.float64)
    fused, plain = exact.float(), exact.float() + 1e-3
    fused[4] += times * 1e-3
    assert (disagreement({"y": fused}, {"y": plain}, {"y": exact}) == "") == agrees
