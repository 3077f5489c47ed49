"""Every kernel compiles for sm_90 without spills, at sizes that Triton specialises: 1, ragged, each dtype."""

import pytest
import torch

from kernels.cases import BUDGETS, CASES, Case, Shape
from kernels.launch import Device, Launch, specialised
from kernels.targets import compile_launch, launches
from tests.kernels.test_gpu import EVERY_REGIME, one_regime, refused

H100 = Device(capability=90, multiprocessors=132)
PARTS = 4  # of a walk over all kernels, so that several processes share it


def regimes() -> list[tuple[Case, Shape, torch.dtype]]:
    """Each case at its own shapes, some ragged, some with one row, and where all sizes are 1; in each dtype."""
    sizes = [(case, shape) for case in CASES for shape in ((1,) * len(case.shapes[0]), *case.shapes)]
    found = [(case, shape, dtype) for case, shape in sizes for dtype in case.dtypes]
    return [regime for regime in found if not refused(*regime)]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS), ids="part{}".format)
def test_all_sizes_and_dtypes(part: int) -> None:
    """With dropout and without, with biases and without. Launches that Triton compiles separately, each once."""
    found: dict[tuple, tuple[tuple, Launch]] = {}
    for regime in regimes():
        for launch in launches(*regime, H100):
            found.setdefault(specialised(launch), (regime, launch))
    assert {launch.kernel.fn.__name__ for _, launch in found.values()} == set(BUDGETS)
    for (case, *sizes), launch in list(found.values())[part::PARTS]:
        compiled = compile_launch(launch, H100.capability)
        assert not compiled.spills, (case.name, sizes, launch.kernel)
        assert compiled.resident_warps, (case.name, sizes, launch.kernel)


def test_no_regime_of_the_gpu_tests_is_refused_there() -> None:
    expected = [regime.values for regime in EVERY_REGIME]
    expected += [(case, *regime) for case in CASES for regime in one_regime(case)]
    for case, shape, dtype in expected:
        assert launches(case, shape, dtype, H100), (case.name, shape, dtype)
