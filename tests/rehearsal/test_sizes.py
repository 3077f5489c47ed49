"""Every kernel compiles for sm_90 without spills, at sizes that Triton specialises: 1, ragged, each dtype."""

from collections.abc import Iterable

import pytest
import torch

from kernels.cases import BUDGETS, CASES, Case, Shape
from kernels.launch import Device, Launch, specialised
from kernels.targets import compile_launch, launches
from tests.kernels.test_gpu import EVERY_REGIME, one_regime

H100 = Device(capability=90, multiprocessors=132)
PARTS = 4  # of a walk over all kernels, so that several processes share it


def sizes(case: Case) -> list[Shape]:
    """All ones, and the case's own shapes, some ragged, some with one row."""
    return [(1,) * len(case.shapes[0]), *case.shapes]


def planned(case: Case, shape: Shape, dtype: torch.dtype) -> list[Launch]:
    """What the case launches; nothing if it is refused."""
    try:
        return launches(case, shape, dtype, H100)
    except ValueError as error:
        if "multiples of 16 elements" not in str(error):  # the fused matmul's refusal, which test_mlp.py tests
            raise
        return []


def distinct(regimes: Iterable[tuple[Case, Shape, torch.dtype]]) -> dict[tuple, tuple[str, Launch]]:
    """The launches that Triton compiles separately, each with the name of its first regime."""
    found: dict[tuple, tuple[str, Launch]] = {}
    for case, shape, dtype in regimes:
        for launch in planned(case, shape, dtype):
            name = f"{case.name} {shape} {dtype} {launch.kernel.fn.__name__}"
            found.setdefault(specialised(launch), (name, launch))
    return found


def faults(name: str, launch: Launch) -> list[str]:
    """A line if the launch's kernel does not compile, spills or does not fit a multiprocessor."""
    try:
        compiled = compile_launch(launch, H100.capability)
    except Exception as error:
        return [f"{name}: {str(error).strip().splitlines()[-1]}"]
    fine = compiled.resident_warps and not compiled.spills
    return [] if fine else [f"{name}: {compiled.spills} spills, {compiled.resident_warps} warps at once"]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS), ids="part{}".format)
def test_all_sizes_and_dtypes(part: int) -> None:
    """With dropout and without, with biases and without."""
    found = distinct((case, shape, dtype) for case in CASES for shape in sizes(case) for dtype in case.dtypes)
    assert {launch.kernel.fn.__name__ for _, launch in found.values()} == set(BUDGETS)
    assert [fault for regime in list(found.values())[part::PARTS] for fault in faults(*regime)] == []


def test_no_regime_of_the_gpu_tests_is_refused_there() -> None:
    regimes = [regime.values for regime in EVERY_REGIME]
    regimes += [(case, *regime) for case in CASES for regime in one_regime(case)]
    for case, shape, dtype in regimes:
        assert launches(case, shape, dtype, H100), (case.name, shape, dtype)


def test_no_rows_launch_nothing() -> None:
    for case in CASES:
        if len(case.shapes[0]) == 2 and "adamw" not in case.name:
            assert launches(case, (0, *case.shapes[0][1:]), torch.bfloat16, H100) == [], case.name
