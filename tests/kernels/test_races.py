"""The watcher of races sees one: the other tests of kernels, which all run under it, can fail."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.launch import INTERPRETED, Launch, run
from tests.kernels.watcher import Race

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="races are looked for in Triton's interpreter")
N, BLOCK = 64, 16


@triton.jit
def shifted_kernel(x_ptr, y_ptr, reach, stride, BLOCK: tl.constexpr):
    """y[program's place] = x[reach further]."""
    o = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o + reach))


def launch(x: torch.Tensor, y: torch.Tensor, *, reach: int = 0, stride: int = BLOCK) -> None:
    arguments = dict(x_ptr=x, y_ptr=y, reach=reach, stride=stride)
    run(x, Launch(shifted_kernel, (3,), arguments, dict(BLOCK=BLOCK)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_programs_may_write_over_what_they_alone_read(dtype: torch.dtype) -> None:
    x = torch.arange(N).to(dtype)
    launch(x, x)
    launch(x, torch.empty(N, dtype=dtype), reach=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_programs_must_not_write_to_one_address(dtype: torch.dtype) -> None:
    with pytest.raises(Race, match="shifted_kernel: several programs write"):
        launch(torch.zeros(N, dtype=dtype), torch.zeros(N, dtype=dtype), stride=BLOCK - 1)


def test_a_program_must_not_read_what_another_writes() -> None:
    x = torch.zeros(N)
    with pytest.raises(Race, match="shifted_kernel: a program reads"):
        launch(x, x, reach=1)
