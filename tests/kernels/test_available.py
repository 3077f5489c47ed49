"""Whether Triton can launch anything here: the trial kernel, and which bundle follows from its answer."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.build import compile_module_from_src

from kernels import REFERENCE, missing, select
from kernels.launch import INTERPRETED, why_no_launch

CUDA = torch.device("cuda")


class Kernel:
    """A stand-in for a Triton kernel: does this with its tensor."""

    def __init__(self, does: Callable[[torch.Tensor], object]) -> None:
        self.does = does

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda p_x, **options: self.does(p_x)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/no/such/compiler", "[Errno 2] No such file or directory: '/no/such/compiler'"),
        ("false", "false could not build Triton's launcher, which takes a C compiler and Python's headers"),
    ],
)
def test_without_a_compiler_or_headers_it_says_so(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = "#include <no_such_header_as_if_it_were_Python.h>\n"
    first_launch = Kernel(lambda p_x: compile_module_from_src(source, "launcher"))
    assert why_no_launch(device, first_launch) == reason


def test_the_first_line_of_any_failure_is_the_reason(device: torch.device) -> None:
    def fail(p_x: torch.Tensor) -> None:
        raise RuntimeError("\n no driver\nat all")

    assert why_no_launch(device, Kernel(fail)) == "no driver"
    assert why_no_launch(device, Kernel(lambda p_x: None)) == "a kernel of Triton's that stores 1.0 stored 0.0"


@pytest.mark.slow
def test_a_real_launch_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    """On a GPU machine Triton's own launcher, without a compiler; elsewhere its driver is missing."""
    code = (
        "import torch; from kernels.launch import why_no_launch; "
        "print(why_no_launch(torch.device('cuda' if torch.cuda.is_available() else 'cpu')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CC": "/no/such/compiler", "TRITON_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert len(ended.stdout.strip().splitlines()) == 1


def test_what_is_missing_decides_the_bundle(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device it is, in the interpreter."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert missing(device) == ""
    assert select("auto", CUDA, lambda device: "").name == "fused"
    monkeypatch.setattr("kernels.launch.why_no_launch", lambda device: "no compiler")
    assert select("auto", CUDA) is REFERENCE
    with pytest.raises(ValueError, match=r"got fused, expected reference or auto: no compiler"):
        select("fused", CUDA)


def test_rocm_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls AMD's devices cuda, and their capability passes for Ampere's or Hopper's."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert missing(CUDA) == "they are written and tuned for NVIDIA's GPUs, this device is AMD's (ROCm 6.4)"


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes any device")
def test_a_cpu_lacks_a_device() -> None:
    assert "need a CUDA device, this is cpu" in missing(torch.device("cpu"))
