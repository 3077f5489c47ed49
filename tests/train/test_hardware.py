"""Peaks by device name, devices and dtypes by name, on machines with and without an accelerator; kept memory."""

import platform
import subprocess
import sys
from unittest import mock

import pytest
import torch

from train import hardware
from train.config import TrainConfig
from train.errors import UserError
from train.settings import settings_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def cuda(monkeypatch):
    """Make torch see CUDA devices with this name and compute capability."""

    def pretend(name="NVIDIA H100 80GB HBM3", capability=(9, 0), count=1):
        answers = {"is_available": count > 0, "device_count": count}
        answers |= {"get_device_name": name, "get_device_capability": capability}
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, mock.Mock(return_value=answer))

    return pretend


def test_every_data_sheet_is_plausible():
    """Finds sparse figures, wrong columns and wrong digits. Tensor cores double their rate at half the bits."""
    for sheet in hardware.DATA_SHEETS:
        assert sheet.source
        assert 200 < sheet.bandwidth < 10_000, sheet
        assert 1.9 < sheet.bf16 / sheet.tf32 < 2.1, sheet
        assert 20 < sheet.bf16 * 1000 / sheet.bandwidth < 450, sheet  # FLOPs per byte
    assert {"", "auto", *hardware.CARDS} == set(settings_of(TrainConfig)["rehearse"].metadata["choices"])
    assert all(hardware.data_sheet(card.name) for card in hardware.CARDS.values())


def test_the_peak_is_the_data_sheets_and_is_measured_where_the_table_lacks_the_device(cuda, monkeypatch):
    cuda()
    for dtype, column, tflops in (("bfloat16", "bf16", 989), ("float16", "fp16", 989), ("float32", "tf32", 495)):
        peak = hardware.Peak(tflops * 1e12, f"NVIDIA H100 data sheet, SXM, dense {column}")
        assert hardware.peak_flops(CUDA, getattr(torch, dtype)) == peak
    monkeypatch.setattr(hardware, "measure_flops", lambda device, dtype: 5e12)
    cuda("NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    measured = hardware.peak_flops(CUDA, torch.bfloat16).source
    assert measured.endswith("bfloat16 matmul peak of NVIDIA A100-SXM4-40GB MIG 1g.5gb")


def test_what_is_measured_by_a_clock_on_which_everything_takes_two_seconds(monkeypatch):
    """The best of three matmuls, unless the next takes too long. A copy counts what is read and what is written."""
    seconds = iter(range(0, 10**6, 2))
    monkeypatch.setattr("train.hardware.time.perf_counter", lambda: next(seconds))
    assert hardware.measure_flops(CPU, torch.float32, budget=20) == 2 * 1024**3 / 2
    assert hardware.measure_flops(CPU, torch.float32, budget=10) == 2 * 256**3 / 2
    assert hardware.measure_bandwidth(CPU, budget=20, size=4096) == 2 * 4096 / 2


@pytest.mark.parametrize(
    ("gpus", "mac", "named", "refused", "expected"),
    [
        (0, False, {"auto": "cpu", "cpu": "cpu"}, "cuda", "auto, cpu$"),
        (2, False, {"auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu"}, "cuda:2", ".*cuda:1, cpu"),
        (0, True, {"auto": "mps", "mps": "mps"}, "cuda", "auto, mps, cpu"),
    ],
)
def test_devices(cuda, monkeypatch, gpus, mac, named, refused, expected):
    cuda(count=gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mac)
    monkeypatch.setattr(hardware, "unused_gpu", lambda: "")
    assert {name: str(hardware.resolve_device(name)) for name in named} == named
    with pytest.raises(UserError, match=f"device: got '{refused}', expected one of: {expected}"):
        hardware.resolve_device(refused)


def test_a_gpu_that_cannot_be_used_is_said(monkeypatch):
    """Too old for this torch, or, where torch has no CUDA, any."""
    said = "CUDA error: no kernel image is available for execution on the device"
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock(side_effect=RuntimeError(f"{said}\nand more")))
    with pytest.raises(UserError, match=f"device: cuda:0 cannot be used: {said}; --device=cpu runs"):
        hardware.use_device(CUDA)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")
    for version, gpu_unused in (("13.0", False), (None, True)):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(UserError) as refused:
            hardware.resolve_device("cuda:99")
        assert ("was built without CUDA, cannot use this machine's NVIDIA GPU" in str(refused.value)) == gpu_unused


@pytest.mark.parametrize(
    ("device", "fast", "offered", "refused"),
    [
        ("cuda:0", True, "bfloat16, float16, float32", "float64"),
        ("cuda:0", False, "float16, float32", "bfloat16"),
        ("cpu", True, "bfloat16, float32", "float16"),
        ("cpu", False, "float32, bfloat16", "float16"),
        ("mps", False, "float32", "bfloat16"),
    ],
)
def test_dtypes(cuda, monkeypatch, device, fast, offered, refused):
    """auto is the first that a device offers. fast: whether it has instructions for bfloat16."""
    cuda(capability=(8, 0) if fast else (7, 5))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    names = offered.split(", ")
    for name, dtype in zip(("auto", *names), (names[0], *names), strict=True):
        assert hardware.resolve_dtype(name, torch.device(device)) == getattr(torch, dtype)
    with pytest.raises(UserError, match=f"dtype: got '{refused}', expected one of: auto, {offered}"):
        hardware.resolve_dtype(refused, torch.device(device))


def test_the_residual_streams_dtype() -> None:
    for name, dtype, device, expected in (
        ("auto", torch.bfloat16, "cuda", torch.bfloat16),
        ("auto", torch.float16, "cuda", torch.float32),  # whose range a stream may leave
        ("auto", torch.bfloat16, "cpu", torch.float32),
        ("float32", torch.bfloat16, "cuda", torch.float32),
    ):
        assert hardware.resolve_stream(name, dtype, device) == expected


FAULTS = """
import resource, torch
from train.hardware import use_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        for size in (2**24, 2**25):
            torch.ones(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
use_device(torch.device("cpu"))
faults()  # what is kept must first be there
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_a_run_on_a_cpu_keeps_the_memory_that_it_frees() -> None:
    """Pages come from the system once, not for every tensor."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    if before < 1000:
        pytest.skip("pages are huge here: there is little to keep")
    assert after < before / 10
