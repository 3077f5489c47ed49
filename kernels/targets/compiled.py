"""A launch, compiled for a GPU that is not there and read back."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.launch import Launch
from kernels.targets import sass
from kernels.targets.architectures import ARCHITECTURES, WARP, Architecture, resident_warps
from kernels.targets.pointers import UNKNOWN, pointers_of, tensor_of


@dataclass(frozen=True)
class Access:
    """A load from or store to device memory in the compiled code."""

    written: str  # the first name in its address on the source line
    pointer: str  # the kernel's parameter that it comes from
    line: str  # "layer_norm.py:104"
    name: str  # "LDG.E.128"
    store: bool
    width: int  # bytes a thread; 0: a tile by the tensor memory accelerator
    index: int  # in the code


@dataclass(frozen=True)
class Compiled:
    launch: Launch
    architecture: Architecture
    registers: int  # a thread
    local: int  # bytes of local memory a thread: what registers spill to
    shared: int  # bytes a block
    tensor_memory: int  # columns a block
    warps: int  # a block; more than launched with, where the compiler adds some to load
    code: sass.Code

    @property
    def threads(self) -> int:
        return WARP * self.warps

    @property
    def resident_warps(self) -> int:
        """Warps that a multiprocessor holds at once; 0 where a block is too large."""
        return resident_warps(self.architecture, self.warps, self.registers, self.shared, self.tensor_memory)

    @property
    def waves(self) -> float | None:
        """Blocks of the grid, over those that the architecture's card holds at once; None where none fits."""
        blocks = self.resident_warps // self.warps * self.architecture.multiprocessors
        return prod(self.launch.grid) / blocks if blocks else None

    @cached_property
    def spills(self) -> int:
        return sass.spills(self.code)

    @cached_property
    def mma(self) -> str:
        """The kind of tensor-core instruction: HMMA, HGMMA, UTCHMMA, ...; "" where there is none."""
        return next((kind for kind in sass.MMA if any(x.opcode == kind for x in self.code.instructions)), "")

    @cached_property
    def accesses(self) -> tuple[Access, ...]:
        return tuple(self._accesses())

    def _accesses(self) -> Iterator[Access]:
        scalars: set[tuple[tuple[str, int] | None, str]] = set()
        for index, instruction in enumerate(self.code.instructions):
            moved = sass.access(instruction)
            if moved is None or moved.space != "global":
                continue
            source = instruction.source
            *others, chosen = pointers_of(self.launch, source, moved.store) or [(UNKNOWN, UNKNOWN)]
            for pair in others:  # on one line: a scalar's access is as wide as the scalar, and there is one
                tensor = tensor_of(self.launch.args.get(pair[1]))
                is_scalar = tensor is not None and tensor.numel() == 1 and tensor.element_size() == moved.width
                if is_scalar and (source, pair[1]) not in scalars:
                    scalars.add((source, pair[1]))
                    chosen = pair
                    break
            line = "{}:{}".format(*source) if source else UNKNOWN
            yield Access(*chosen, line, instruction.name, moved.store, moved.width, index)


@dataclass(frozen=True)
class _AbsentDriver:
    """What Triton's just-in-time compiler asks a driver before it compiles."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device: one for each target

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile what `launch.kernel[launch.grid](...)` would on sm_<capability>: Triton's own just-in-time compiler does,
    from the same arguments, but for a driver that is not there. No other thread may launch kernels meanwhile."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    driver.set_active(_AbsentDriver(capability))
    try:
        binary = launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.constants, **options)
    finally:
        driver.set_active(None)  # the next who asks gets the machine's own
    cubin = binary.asm["cubin"]
    usage = sass.resources(cubin)
    return Compiled(
        launch=launch,
        architecture=ARCHITECTURES[capability],
        registers=usage["REG"],
        local=usage["STACK"] + usage["LOCAL"],
        shared=binary.metadata.shared,
        tensor_memory=getattr(binary.metadata, "tmem_size", None) or 0,
        warps=binary.metadata.num_warps,
        code=sass.parse(sass.disassemble(cubin)),
    )
