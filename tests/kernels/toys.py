"""Small kernels that keep their budgets, and some that break them, each in one way: what `test_targets.py` compiles."""

import multiprocessing
import os
import signal

import triton
import triton.language as tl

from kernels.launch import Device, Launch
from kernels.targets.budgets import Budget, Matmul, Plan
from kernels.targets.plans import BF16, FP32, meta

N = 1 << 24  # elements
BLOCK = 1024  # 8 a thread of 4 warps: 16 bytes of bfloat16


@triton.jit
def copy_kernel(x_ptr, scale_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + o, mask=o < n).to(tl.float32) * tl.load(scale_ptr)
    tl.store(y_ptr + o, y.to(y_ptr.dtype.element_ty), mask=o < n)


@triton.jit
def loop_kernel(x_ptr, y_ptr, n, passes, BLOCK: tl.constexpr):
    for i in range(passes):
        o = (i * tl.num_programs(0) + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + o, -tl.load(x_ptr + o, mask=o < n), mask=o < n)


@triton.jit
def _load(address, mask):
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def centre_kernel(x_ptr, C, rows, BLOCK: tl.constexpr):
    """Each row of x less its mean, in place: in a loop, one that reads, and one that reads again and writes."""
    for i in range(rows):
        row = x_ptr + (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * C
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, C, BLOCK):
            o = start + tl.arange(0, BLOCK)
            total += _load(row + o, o < C)
        mean = tl.sum(total) / C
        for start in range(0, C, BLOCK):
            o = start + tl.arange(0, BLOCK)
            x = _load(row + o, o < C)
            tl.store(row + o, (x - mean).to(x_ptr.dtype.element_ty), mask=o < C)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + o_m * K + k + tl.arange(0, BLOCK_K)[None, :])
        b = tl.load(b_ptr + (k + tl.arange(0, BLOCK_K)[:, None]) * N + o_n)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + o_m * N + o_n, acc.to(c_ptr.dtype.element_ty))


@triton.jit
def refused_kernel(x_ptr):
    tl.static_assert(False, "refused on purpose")


def copy(*, aligned: bool = True, block: int = BLOCK, num_warps: int = 4) -> list[Launch]:
    x = meta(N, dtype=BF16) if aligned else meta(N + 1, dtype=BF16)[1:]
    args = dict(x_ptr=x, scale_ptr=meta(1, dtype=FP32), y_ptr=meta(N, dtype=BF16), n=N)
    return [Launch(copy_kernel, (N // block,), args, dict(BLOCK=block), num_warps)]


def loop(programs: int) -> list[Launch]:
    args = dict(x_ptr=meta(N, dtype=BF16), y_ptr=meta(N, dtype=BF16), n=N, passes=N // BLOCK // programs)
    return [Launch(loop_kernel, (programs,), args, dict(BLOCK=BLOCK))]


def centre(block: int, num_warps: int = 4) -> list[Launch]:
    args = dict(x_ptr=meta(1024, 16384, dtype=BF16), C=16384, rows=8)
    return [Launch(centre_kernel, (128,), args, dict(BLOCK=block), num_warps)]


def matmul(block_n: int = 128, block_k: int = 64) -> list[Launch]:
    args = dict(zip(("a_ptr", "b_ptr", "c_ptr"), (meta(4096, 4096, dtype=BF16) for _ in range(3)), strict=True))
    constants = dict(BLOCK_M=128, BLOCK_N=block_n, BLOCK_K=block_k)
    args |= dict(M=4096, N=4096, K=4096)
    return [Launch(matmul_kernel, (32, 4096 // block_n), args, constants, num_warps=4, num_stages=4)]


def crash(device: Device) -> list[Launch]:
    """Ends a process that compiles for sm_90 as a compiler's fault would."""
    if device.capability == 90 and multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return copy()


MATMUL = Matmul(tiles=32 * 32, flops=2 * 128 * 128 * 4096, step_flops=2 * 128 * 128 * 64)
SCALAR = {"scale_ptr": (4, "a scalar")}
KEPT = Budget(warps=48, narrow=SCALAR)

PLANS = (
    Plan("copy", lambda device: copy(), KEPT),
    Plan("copy, half the lanes", lambda device: copy(), KEPT, fill=lambda launch: 0.5),
    Plan("loop", lambda device: loop(4 * device.multiprocessors), Budget(warps=48, one_wave=True)),
    Plan("twice over rows", lambda device: centre(BLOCK), Budget(warps=32)),
    Plan("matmul", lambda device: matmul(), Budget(warps=0), matmul=lambda launch: MATMUL),
    Plan(
        "allowed to be narrow", lambda device: copy(aligned=False), Budget(48, narrow=SCALAR | {"x_ptr": (2, "a test")})
    ),
    Plan("narrow", lambda device: copy(aligned=False), KEPT),
    Plan("spills", lambda device: centre(16384, num_warps=1), Budget(warps=0)),
    Plan("too few warps", lambda device: copy(block=16384), Budget(warps=64, narrow=SCALAR)),
    Plan("two waves", lambda device: loop(128 * device.multiprocessors), Budget(warps=48, one_wave=True)),
    Plan("too large", lambda device: matmul(256, 128), Budget(warps=0)),
    Plan("another tensor core", lambda device: matmul(), Budget(warps=0, mma={80: "HGMMA", 90: "HGMMA"})),
    Plan("refused", lambda device: [Launch(refused_kernel, (1,), dict(x_ptr=meta(1, dtype=FP32)))], Budget(warps=0)),
    Plan(
        "narrow on one target",
        lambda device: copy(aligned=False),
        Budget(48, narrow=SCALAR, exceptions={90: ("a test", {"narrow": SCALAR | {"x_ptr": (2, "a test")}})}),
    ),
    Plan("crash", crash, Budget(warps=0)),
)
