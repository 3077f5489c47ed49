"""Compile every kernel for GPUs that need not be there, and compare the machine code with the kernel's budget.

    python -m kernels.targets [--target 90] [--kernel NAME]

Each case of `cases.py` runs on meta tensors, at its first GPT shape in bfloat16, forward and backward. Triton compiles
the launches; this needs no GPU. Registers, spills, shared memory, access widths and the kind of matrix instruction are
read from the machine code. A line whose budget is broken begins with "!".
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.cases import BUDGETS, CASES, Budget, Case, Shape
from kernels.check import outputs_and_gradients
from kernels.launch import INTERPRETED, Device, Launch, recording, specialised

WARP = 32  # threads
WIDE = 16  # bytes: a thread's widest access
SYSTEM = 1024  # bytes of shared memory


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor can hold, by the CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute
    Capability", and the multiprocessors of a typical card. mma: the newest tensor-core instruction's name."""

    max_warps: int
    max_blocks: int
    shared: int  # bytes, of which the system takes SYSTEM for each block
    mma: str
    multiprocessors: int


ARCHITECTURES = {
    80: Architecture(64, 32, 164 * 1024, "HMMA", 108),  # A100 SXM
    86: Architecture(48, 16, 100 * 1024, "HMMA", 82),  # RTX 3090
    89: Architecture(48, 24, 100 * 1024, "HMMA", 128),  # RTX 4090
    90: Architecture(64, 32, 228 * 1024, "HGMMA", 132),  # H100 SXM
    100: Architecture(64, 32, 228 * 1024, "UTCHMMA", 148),  # B200
    120: Architecture(48, 24, 100 * 1024, "HMMA", 170),  # RTX 5090
}


@dataclass(frozen=True)
class Compiled:
    """A launch as it was compiled for one architecture."""

    registers: int  # a thread
    spills: int  # instructions that move registers to or from local memory
    shared: int  # bytes a block
    warps: int  # a block; more than launched with, where the compiler adds some to load
    resident_warps: int  # a multiprocessor holds at once; 0 where a block is too large
    waves: float  # blocks of the grid, over those that the architecture's card holds at once
    loads: dict[int, int]  # bytes a thread (0: a tile by the tensor memory accelerator) -> instructions
    stores: dict[int, int]
    mma: str  # the kind of tensor-core instruction; "" for none

    @property
    def wide(self) -> float:
        """Of the bytes that its loads and stores name, the share that moves WIDE bytes a thread or a whole tile."""
        widths = Counter(self.loads) + Counter(self.stores)
        if widths[0]:
            return 1.0
        moved = {width: width * count for width, count in widths.items()}
        return sum(moved[width] for width in moved if width >= WIDE) / max(sum(moved.values()), 1)

    def __str__(self) -> str:
        loads, stores = (
            " ".join(f"{n}x{8 * width or 'tile'}" for width, n in of.items()) or "-" for of in (self.loads, self.stores)
        )
        usage = f"{self.registers:4} {self.spills:5} {self.shared:6} {self.resident_warps:5} {self.waves:6.1f}"
        return f"{usage} {loads:<16} {stores:<14} {self.mma or '-'}"


def resident_warps(of: Architecture, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """Warps of a kernel that a multiprocessor holds at once; 0 where not even one block fits.

    warps: a block's; registers: a thread's, given to a warp in units of 256; shared: bytes a block; tensor_memory: of
    sm_100's 512 columns, those that a block takes.
    """
    by_registers = 65536 // (-(-max(registers, 1) * WARP // 256) * 256) // 4 * 4  # warps come four at a time
    blocks = [of.max_blocks, of.max_warps // warps, by_registers // warps]
    blocks.append(of.shared // (-(-(shared + SYSTEM) // 128) * 128))
    if tensor_memory:
        blocks.append(512 // tensor_memory)
    return min(blocks) * warps


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for sm_<capability>. Triton's just-in-time compiler does it, from the launch's own arguments.
    Only the driver is replaced. No other thread may launch kernels meanwhile."""
    absent = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, WARP),
        get_current_device=lambda: capability,  # kernels are kept by device: one for each target
        get_current_stream=lambda device: 0,
    )
    driver.set_active(absent)
    try:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        binary = launch.kernel.warmup(grid=launch.grid, **launch.args, **options)
    finally:
        driver.set_active(None)  # the next who asks gets the machine's own
    registers, code = read_machine_code(binary.asm["cubin"])
    of, metadata = ARCHITECTURES[capability], binary.metadata
    columns = getattr(metadata, "tmem_size", None) or 0
    held = resident_warps(of, metadata.num_warps, registers, metadata.shared, columns)
    blocks = held // metadata.num_warps * of.multiprocessors
    return Compiled(
        registers=registers,
        spills=spills(code),
        shared=metadata.shared,
        warps=metadata.num_warps,
        resident_warps=held,
        waves=prod(launch.grid) / blocks if blocks else float("inf"),
        loads=widths(code, LOADS),
        stores=widths(code, STORES),
        mma=next((kind for kind in MMA if re.search(rf"\b{kind}\b", code)), ""),
    )


# Machine code ---------------------------------------------------------------------------------------------------------

LOADS, STORES, TILES = "LDG|LD|LDGSTS", "STG|ST", {"LDG|LD|LDGSTS": "UTMALDG|UBLKCP", "STG|ST": "UTMASTG"}
MMA = ("UTCHMMA", "UTCQMMA", "HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # else 4


def read_machine_code(cubin: bytes) -> tuple[int, str]:
    """A kernel's registers a thread, and its instructions, a line each:
    `/*0110*/  @!P0 LDG.E.128 R4, desc[UR22][R2.64] ;`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        tools = [triton.knobs.nvidia.cuobjdump.path, "-res-usage"], [triton.knobs.nvidia.nvdisasm.path, "-c"]
        usage, code = (
            subprocess.run([*tool, str(file)], check=True, capture_output=True, text=True).stdout for tool in tools
        )
    instructions = [line for line in code.splitlines() if re.match(r"\s*/\*[0-9a-f]+\*/\s+\S", line)]
    return int(re.search(r"\bREG:(\d+)", usage.split("Function", 1)[1]).group(1)), "\n".join(instructions)


def widths(code: str, opcodes: str) -> dict[int, int]:
    """How many instructions of these opcodes move how many bytes a thread; by 0 bytes, how many move a whole tile."""
    names = re.findall(rf"\*/\s+(?:@!?\w+\s+)?(?:{opcodes})((?:\.\w+)*)\s", code)
    counts = Counter(next((WIDTHS[part] for part in name.split(".") if part in WIDTHS), 4) for name in names)
    counts[0] = len(re.findall(rf"\*/\s+(?:@!?\w+\s+)?(?:{TILES[opcodes]})\b", code))
    return {width: counts[width] for width in sorted(counts, reverse=True) if counts[width]}


def spills(code: str) -> int:
    """Instructions that move registers to local memory or back. 0 where nothing is loaded back: for sm_120, CUDA 12.9's
    compiler stores a zero there before each bulk load."""
    local = re.findall(r"\*/\s+(?:@!?\w+\s+)?(LDL|STL)\b", code)
    return len(local) if "LDL" in local else 0


# Budgets --------------------------------------------------------------------------------------------------------------


def broken(budget: Budget, compiled: Compiled, of: Architecture) -> Iterator[str]:
    """One line for each part of the budget that the compiled kernel does not keep."""
    if compiled.spills > budget.spills:
        yield f"{compiled.spills} instructions spill, budget {budget.spills}: {compiled.registers} registers"
    if compiled.wide < budget.wide:
        yield f"{compiled.wide:.0%} of the bytes move {WIDE} at a time, budget {budget.wide:.0%}"
    most = of.max_warps // compiled.warps * compiled.warps
    if compiled.shared > of.shared - SYSTEM:
        yield f"{compiled.shared} bytes of shared memory a block, it has {of.shared - SYSTEM}"
    elif compiled.resident_warps < max(compiled.warps, min(budget.warps, most)):
        least = min(budget.warps, most)
        yield f"{compiled.resident_warps} warps at once, budget {least}: {compiled.registers} registers"
    elif budget.one_wave and compiled.waves > 1:
        yield f"{compiled.waves:.2f} waves, budget 1: {compiled.resident_warps} warps at once"
    if budget.mma and compiled.mma != of.mma:
        yield f"multiplies with {compiled.mma or 'no tensor cores'}, budget {of.mma}"


def launches(case: Case, shape: Shape, dtype: torch.dtype, device: Device) -> list[Launch]:
    """What the case launches, forward and backward: one of each that Triton compiles separately."""
    found = {}
    for more in case.compiled_with:
        with recording(device) as recorded:
            outputs_and_gradients(case.fused, case.make_inputs(shape, dtype, torch.device("meta")) | more)
        found |= {specialised(launch): launch for launch in recorded}
    return list(found.values())


def inspect(index: int, target: int, wanted: str) -> list[tuple[str, list[str]]]:
    """The kernels of CASES[index] with `wanted` in a name, compiled for sm_<target> and compared with their budgets: of
    each a line of the table, and what is wrong with it."""
    case, of, found = CASES[index], ARCHITECTURES[target], []
    for launch in launches(case, case.gpt_shapes[0], torch.bfloat16, Device(target, of.multiprocessors)):
        kernel = launch.kernel.fn.__name__
        if wanted not in case.name and wanted not in kernel:
            continue
        try:
            compiled = compile_launch(launch, target)
            usage, faults = str(compiled), list(broken(BUDGETS[kernel], compiled, of))
        except Exception as error:  # of any type: from the compiler
            *_, reason = str(error).strip().splitlines() or [type(error).__name__]
            usage, faults = "", [f"does not compile: {reason}"]
        start = f"{'!' if faults else ' '} {case.name:<44} {kernel:<28} {target:3}"
        found.append((f"{start} {usage}", [f"{case.name}, {kernel}, sm_{target}: {fault}" for fault in faults]))
    return found


# The command ----------------------------------------------------------------------------------------------------------

HEAD = f"  {'case':<44} {'kernel':<28}  sm regs spill shared warps  waves loads            stores         mma"


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a budget is broken; 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m kernels.targets", description=__doc__.split("\n\n")[0])
    help = "compute capability, such as 90; default: all"
    parser.add_argument("--target", type=int, action="append", choices=list(ARCHITECTURES), help=help)
    parser.add_argument("--kernel", default="", help="only cases and kernels whose name contains this")
    options = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET: got 1, expected it unset: the interpreter takes the compiler's place")
    jobs = [(i, target, options.kernel) for i in range(len(CASES)) for target in options.target or ARCHITECTURES]
    context = multiprocessing.get_context("spawn")  # a fork would leave torch's threads behind
    kernels, faults = 0, []
    print(HEAD)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        for text, wrong in chain.from_iterable(pool.map(inspect, *zip(*jobs, strict=True))):
            print(text, flush=True)
            kernels += 1
            faults += wrong
    if not kernels:
        print(f"--kernel: got {options.kernel!r}, which no case or kernel is called", file=sys.stderr)
        return 2
    print("\n" + ("\n".join(faults) if faults else "All budgets are kept."))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
