"""Whether Triton can launch anything here: the trial kernel, and which bundle follows from its answer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.build import compile_module_from_src

from kernels import REFERENCE, missing, select
from kernels.launch import why_no_launch

CUDA = torch.device("cuda")


def build(p_x: torch.Tensor) -> None:
    compile_module_from_src("#include <no_such_header_as_if_it_were_Python.h>\n", "launcher")


def fail(p_x: torch.Tensor) -> None:
    raise RuntimeError("\n no driver\nat all")


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (build, "false could not build Triton's launcher, which takes a C compiler and Python's headers"),
        (fail, "no driver"),
        (lambda p_x: None, "a kernel of Triton's that stores 1.0 stored 0.0"),
    ],
)
def test_a_failure_of_the_trial_kernel_is_one_line(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, does: Callable, reason: str
) -> None:
    """does: in place of the kernel."""
    monkeypatch.setenv("CC", "false")  # a compiler that builds nothing
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("kernels.launch.trial_kernel", {(1,): lambda p_x, **options: does(p_x)})
    assert why_no_launch(device) == reason


def test_what_is_missing_decides_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device it is, in the interpreter."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert select("auto", CUDA, lambda device: "").name == "fused"
    assert select("auto", torch.device("cpu"), lambda device: "") is REFERENCE
    monkeypatch.setattr("kernels.launch.why_no_launch", lambda device: "no compiler")
    assert select("auto", CUDA) is REFERENCE
    with pytest.raises(ValueError, match=r"got fused, expected reference or auto: no compiler"):
        select("fused", CUDA)
    monkeypatch.setattr(torch.version, "hip", "6.4")  # torch calls AMD's devices cuda, and their capability passes
    assert missing(CUDA) == "they are written and tuned for NVIDIA's GPUs, this device is AMD's (ROCm 6.4)"
