"""What the targets of `kernels.targets` can hold and how fast they issue: the yardsticks of its table.

Limits and issue rates are those of the CUDA C++ Programming Guide 13.0: "Technical Specifications per Compute
Capability" and "Throughput of Native Arithmetic Instructions" (results a clock a multiprocessor). Which instruction
runs in which pipe is told by the Nsight Compute documentation, "Pipelines".
"""

from dataclasses import dataclass

WARP = 32  # threads
REGISTERS = 65536  # 32-bit registers a multiprocessor, on every target
REGISTER_UNIT = 256  # registers are given to a warp in units of so many (CUDA occupancy calculator)
WARP_UNIT = 4  # and to warps four at a time, one for each of the four schedulers
SHARED_RESERVED = 1024  # bytes of shared memory that the system takes from each block
SHARED_UNIT = 128  # bytes
TENSOR_MEMORY_COLUMNS = 512  # sm_100's, a multiprocessor (PTX ISA, tcgen05.alloc)
ISSUE = 4  # warp instructions a clock: one for each scheduler
LSU_BYTES = 128  # bytes a clock between registers and the first-level cache or shared memory
DRAM_LATENCY = 700e-9  # seconds, loaded, of a read that misses the caches: the order of magnitude on all targets


@dataclass(frozen=True)
class Architecture:
    """One target: limits a multiprocessor, lanes (results a clock), and a typical card."""

    capability: int
    max_warps: int
    max_blocks: int
    shared: int  # bytes a multiprocessor
    fma: int  # lanes of FFMA, FADD, FMUL
    imad: int  # lanes of IMAD, in the same pipe
    half2: int  # lanes of HFMA2 and its like, two results each
    alu: int  # lanes of integer, logic, compare, select, move, and packing to 16 bits
    sfu: int  # lanes of MUFU and of the other conversions
    tensor: int  # dense bf16 FLOPs a clock, summed in float32
    card: str
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes a second

    @property
    def shared_block(self) -> int:
        """Bytes of shared memory that a block may take."""
        return self.shared - SHARED_RESERVED

    @property
    def dram(self) -> float:
        """Bytes a clock that the card's memory gives each multiprocessor."""
        return self.bandwidth / self.clock / self.multiprocessors

    @property
    def in_flight(self) -> float:
        """Bytes that each multiprocessor must have under way to keep the memory busy (Little's law)."""
        return self.bandwidth * DRAM_LATENCY / self.multiprocessors


KB = 1024

# tensor: the data sheet's dense bf16 FLOP/s over multiprocessors and clock. The H100's and B200's clock is the one that
# figure implies; under little load they boost higher. sm_120 doubles integer throughput by its white paper; what
# compilers reach of that is not settled, so it counts as Ada's.
ARCHITECTURES = {
    architecture.capability: architecture
    for architecture in (
        # capability, warps, blocks, shared; fma, imad, half2, alu, sfu, tensor; card, SMs, clock, bandwidth
        # NVIDIA A100 data sheet and white paper
        Architecture(80, 64, 32, 164 * KB, 64, 64, 128, 64, 16, 2048, "A100 SXM 80 GB", 108, 1.41e9, 2.039e12),
        # NVIDIA Ampere GA102 white paper
        Architecture(86, 48, 16, 100 * KB, 128, 64, 128, 64, 16, 512, "RTX 3090", 82, 1.695e9, 0.936e12),
        # NVIDIA Ada GPU architecture white paper
        Architecture(89, 48, 24, 100 * KB, 128, 64, 64, 64, 16, 512, "RTX 4090", 128, 2.52e9, 1.008e12),
        # NVIDIA H100 data sheet and white paper
        Architecture(90, 64, 32, 228 * KB, 128, 64, 128, 64, 16, 4096, "H100 SXM", 132, 1.83e9, 3.35e12),
        # NVIDIA Blackwell data sheet, HGX B200
        Architecture(100, 64, 32, 228 * KB, 128, 64, 128, 64, 16, 8192, "B200", 148, 1.85e9, 7.7e12),
        # NVIDIA RTX Blackwell GPU architecture white paper
        Architecture(120, 48, 24, 100 * KB, 128, 64, 64, 64, 16, 512, "RTX 5090", 170, 2.407e9, 1.792e12),
    )
}


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def resident_warps(architecture: Architecture, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """Warps of a kernel that a multiprocessor holds at once; 0 where not even one block fits.

    warps: a block's; registers: a thread's; shared: bytes a block; tensor_memory: columns a block.
    """
    by_registers = REGISTERS // _up(max(registers, 1) * WARP, REGISTER_UNIT) // WARP_UNIT * WARP_UNIT
    blocks = [
        architecture.max_blocks,
        architecture.max_warps // warps,
        by_registers // warps,
        architecture.shared // _up(shared + SHARED_RESERVED, SHARED_UNIT),
    ]
    if tensor_memory:
        blocks.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(blocks) * warps
