"""Peaks by device name, devices and dtypes by name, on machines with and without an accelerator; kept memory."""

import platform
import subprocess
import sys

import pytest
import torch

from train import hardware
from train.errors import UserError
from train.hardware import (
    DATA_SHEETS,
    Peak,
    measure_bandwidth,
    measure_ceilings,
    peak_flops,
    resolve_device,
    resolve_dtype,
    resolve_stream,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def cuda(monkeypatch):
    """Make torch see one CUDA device with this name and compute capability."""

    def pretend(name="NVIDIA H100 80GB HBM3", capability=(9, 0), count=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_every_data_sheet_is_plausible():
    """Finds sparse figures, wrong columns and wrong digits. Tensor cores double their rate at half the bits."""
    for sheet in DATA_SHEETS:
        assert sheet.source
        assert 200 < sheet.bandwidth < 10_000, sheet
        assert 1.9 < sheet.bf16 / sheet.tf32 < 2.1, sheet
        assert 20 < sheet.bf16 * 1000 / sheet.bandwidth < 450, sheet  # FLOPs per byte


@pytest.mark.parametrize(
    ("dtype", "column", "tflops"),
    [(torch.bfloat16, "bf16", 989), (torch.float16, "fp16", 989), (torch.float32, "tf32", 495)],
)
def test_peak_of_a_known_device(cuda, dtype, column, tflops):
    cuda()
    assert peak_flops(CUDA, dtype) == Peak(tflops * 1e12, f"NVIDIA H100 data sheet, SXM, dense {column}")


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100"])  # SXM or PCIe: it does not say
def test_a_device_that_the_table_lacks_is_measured(cuda, monkeypatch, name):
    cuda(name)
    monkeypatch.setattr(hardware, "measure_flops", lambda device, dtype: 5e12)
    assert peak_flops(CUDA, torch.bfloat16) == Peak(5e12, f"measured bfloat16 matmul peak of {name}")


def test_a_run_on_cuda_takes_tf32_so_that_inductor_can_still_ask(cuda):
    before = torch.get_float32_matmul_precision()
    cuda()
    try:
        hardware.use_device(CUDA)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_ceilings_are_what_computers_have():
    before = torch.random.get_rng_state()
    ceilings = measure_ceilings(CPU, torch.float32)
    assert 1e8 < ceilings.flops < 1e15
    assert 1e8 < ceilings.bandwidth < 1e13
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_copy_counts_what_is_read_and_what_is_written(monkeypatch):
    """With a clock on which every copy takes two seconds."""
    seconds = iter(range(0, 10**6, 2))
    monkeypatch.setattr("train.hardware.time.perf_counter", lambda: next(seconds))
    assert measure_bandwidth(CPU, budget=20, size=4096) == 2 * 4096 / 2


def test_devices_without_an_accelerator(no_accelerator):
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for name in ("cuda", "mps", ""):
        with pytest.raises(UserError, match=f"device: got '{name}', expected one of: auto, cpu$"):
            resolve_device(name)


def test_devices_with_two_gpus(cuda):
    cuda(count=2)
    assert resolve_device("auto") == resolve_device("cuda") == CUDA
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == CPU
    with pytest.raises(UserError, match=r"device: got 'cuda:2', expected one of: auto, cuda:0, cuda:1, .*cpu"):
        resolve_device("cuda:2")


def test_device_and_dtype_of_a_mac(no_accelerator, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("mps") == torch.device("mps")
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


def test_dtypes_of_gpus(cuda):
    cuda(capability=(8, 0))
    assert resolve_dtype("auto", CUDA) == resolve_dtype("bfloat16", CUDA) == torch.bfloat16
    assert resolve_dtype("float16", CUDA) == torch.float16
    cuda(capability=(7, 5))
    assert resolve_dtype("auto", CUDA) == torch.float16
    assert resolve_dtype("float32", CUDA) == torch.float32
    with pytest.raises(UserError, match="dtype: got 'bfloat16', expected one of: auto, float16, float32"):
        resolve_dtype("bfloat16", CUDA)


@pytest.mark.parametrize("fast", [True, False])
def test_dtypes_of_cpus(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match=r"dtype: got 'float16', expected one of: auto, .*float32"):
        resolve_dtype("float16", CPU)


@pytest.mark.parametrize(
    ("name", "dtype", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cuda", torch.bfloat16),
        ("auto", torch.float16, "cuda", torch.float32),  # whose range a stream may leave
        ("auto", torch.bfloat16, "cpu", torch.float32),
        ("float32", torch.bfloat16, "cuda", torch.float32),
        ("bfloat16", torch.float32, "cpu", torch.bfloat16),
    ],
)
def test_the_residual_streams_dtype(name: str, dtype: torch.dtype, device: str, expected: torch.dtype) -> None:
    assert resolve_stream(name, dtype, device) == expected


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
