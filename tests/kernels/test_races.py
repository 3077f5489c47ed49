"""The watcher sees a race and an access out of bounds: the other tests of kernels, which all run under it, can fail."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from kernels.launch import INTERPRETED, Launch, run

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="accesses are watched in Triton's interpreter")
BLOCK = 16


@triton.jit
def shifted_kernel(x_ptr, y_ptr, reach, stride, BLOCK: tl.constexpr):
    """y[program's place] = x[reach further]."""
    o = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o + reach))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_programs_must_not_do_is_seen(dtype: torch.dtype) -> None:
    def launch(x: torch.Tensor, y: torch.Tensor, reach: int = 0, stride: int = BLOCK) -> None:
        run(x, Launch(shifted_kernel, (3,), dict(x_ptr=x, y_ptr=y, reach=reach, stride=stride, BLOCK=BLOCK)))

    x, y = torch.zeros(2, 4 * BLOCK, dtype=dtype).clone().unbind()
    launch(x, x)  # they may write over what they alone read
    launch(x, y, reach=3)
    with pytest.raises(AssertionError, match="shifted_kernel: several programs write"):
        launch(x, y, stride=BLOCK - 1)
    with pytest.raises(AssertionError, match="shifted_kernel: a program reads"):
        launch(x, x, reach=1)
    with pytest.raises(InterpreterError, match="2 of 16 accesses outside"):
        launch(x[:-2], y, reach=BLOCK)
