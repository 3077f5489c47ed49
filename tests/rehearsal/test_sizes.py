"""Every kernel compiles for sm_90, without spills, at the sizes that Triton specialises: 1, ragged, each dtype."""

import pytest
import torch

from kernels.cases import CASES, Case
from kernels.cases.case import Shape
from kernels.cases.check import outputs_and_gradients
from kernels.launch import Device, Launch, specialised
from kernels.targets.architectures import ARCHITECTURES
from kernels.targets.compiled import compile_launch
from tests.rehearsal.device import gpu  # noqa: F401
from train.dryrun import Recorder

META = torch.device("meta")


def launches(case: Case, shape: Shape, dtype: torch.dtype, capability: int = 90) -> list[Launch]:
    """What the case launches, forward and backward, one of each that Triton compiles anew."""
    device = Device(capability, ARCHITECTURES[capability].multiprocessors)
    with Recorder(device, "meta") as recorder:
        outputs_and_gradients(case.fused, case.make_inputs(shape, dtype, META))
    return list({specialised(launch): launch for launch in recorder.launches}.values())


def sizes(case: Case) -> list[Shape]:
    """The case's own, which are ragged and one row, and nothing but ones."""
    return [(1,) * len(case.shapes[0]), *case.shapes]


def faults(case: Case, shape: Shape, dtype: torch.dtype, capability: int = 90) -> list[str]:
    """A line for every kernel of the case that does not compile, spills or does not fit."""
    found = []
    try:
        planned = launches(case, shape, dtype, capability)
    except ValueError as error:
        if "path" not in str(error):  # the fused matmul's refusal, which test_linear_gelu.py tests
            raise
        return []
    for launch in planned:
        name = f"{case.name} {shape} {dtype} {launch.kernel.fn.__name__}"
        try:
            compiled = compile_launch(launch, capability)
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


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_sizes_and_dtypes(case: Case, capability: int) -> None:
    every = [(shape, dtype) for shape in sizes(case) for dtype in case.dtypes]
    assert [fault for shape, dtype in every for fault in faults(case, shape, dtype, capability)] == []


def test_no_rows_launch_nothing() -> None:
    for case in CASES:
        if len(case.shapes[0]) == 2 and "adamw" not in case.name:
            assert launches(case, (0, *case.shapes[0][1:]), torch.bfloat16) == [], case.name
