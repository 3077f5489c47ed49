"""One trivial kernel, launched to see whether Triton can launch any here.

Triton builds its launcher at the first launch, with a C compiler and Python's headers. A machine may have a GPU, its
driver and Triton, and lack these.
"""

import subprocess
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, run


@triton.jit
def trial_kernel(p_x):
    tl.store(p_x, 1.0)


def why_not(device: torch.device, kernel: Any = trial_kernel) -> str:
    """Why Triton cannot run a kernel on `device`, in one line; empty where it can.

    kernel: stores 1.0 in the one float32 it is given. Waits for the device.
    """
    try:
        x = torch.zeros(1, device=device)
        run(x, Launch(kernel, (1,), {"p_x": x}))
        stored = x.item()
    except subprocess.CalledProcessError as error:
        command = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"{command} could not build Triton's launcher, which takes a C compiler and Python's headers"
    except Exception as error:  # from Triton, its compiler, a driver: all kinds
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return "" if stored == 1.0 else f"a kernel of Triton's that stores 1.0 stored {stored}"
