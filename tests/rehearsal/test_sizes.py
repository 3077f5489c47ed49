"""Every kernel compiles for sm_90 without spills, at sizes that Triton specialises: 1, ragged, each dtype."""

import pytest
import torch

from kernels.cases import CASES, Case, Shape
from kernels.launch import Device
from kernels.targets import compile_launch, launches
from tests.kernels.test_gpu import EVERY_REGIME, one_regime

H100 = Device(capability=90, multiprocessors=132)


def sizes(case: Case) -> list[Shape]:
    """All ones, and the case's own shapes, some ragged, some with one row."""
    return [(1,) * len(case.shapes[0]), *case.shapes]


def faults(case: Case, shape: Shape, dtype: torch.dtype) -> list[str]:
    """A line for each kernel of the case that does not compile, that spills, or that does not fit."""
    found = []
    try:
        planned = launches(case, shape, dtype, H100)
    except ValueError as error:
        if "multiples of 16 elements" not in str(error):  # the fused matmul's refusal, which test_mlp.py tests
            raise
        return []
    for launch in planned:
        name = f"{case.name} {shape} {dtype} {launch.kernel.fn.__name__}"
        try:
            compiled = compile_launch(launch, H100.capability)
        except Exception as error:
            found.append(f"{name}: {str(error).strip().splitlines()[-1]}")
        else:
            if compiled.spills or not compiled.resident_warps:
                found.append(f"{name}: {compiled.spills} spills, {compiled.resident_warps} warps at once")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ones_and_ragged(case: Case) -> None:
    ones, *_ = sizes(case)
    ragged = max(case.shapes, key=lambda shape: sum(n % 16 != 0 for n in shape))
    assert [fault for shape in (ones, ragged) for fault in faults(case, shape, torch.bfloat16)] == []


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_sizes_and_dtypes(case: Case) -> None:
    every = [(shape, dtype) for shape in sizes(case) for dtype in case.dtypes]
    assert [fault for shape, dtype in every for fault in faults(case, shape, dtype)] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_regime_of_the_gpu_tests_is_refused_there(case: Case) -> None:
    regimes = [(shape, dtype) for other, shape, dtype in (r.values for r in EVERY_REGIME) if other is case]
    assert regimes
    for shape, dtype in [*regimes, *one_regime(case)]:
        assert launches(case, shape, dtype, H100), (shape, dtype)


def test_no_rows_launch_nothing() -> None:
    for case in CASES:
        if len(case.shapes[0]) == 2 and "adamw" not in case.name:
            assert launches(case, (0, *case.shapes[0][1:]), torch.bfloat16, H100) == [], case.name
