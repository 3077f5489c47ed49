"""What compiled kernels must keep, and what is compiled to find out."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kernels.launch import Device, Launch
from kernels.targets.compiled import Compiled

FULL_WIDTH = 16  # bytes, of a thread's access


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel must keep.

    warps: at least so many on a multiprocessor at once, or as many blocks as a target's limit lets be; one_wave: the
    whole grid is there at once, as programs need that loop until all is done; narrow: pointers, by the name on the
    source line or by that of the kernel's parameter, whose accesses may be narrower than 16 bytes a thread: how many
    bytes they are at least, and why; spills: instructions that move registers to or from memory; mma: the kind of
    tensor-core instruction, by target; exceptions: on one target, other values for these, and why.
    """

    warps: int
    one_wave: bool = False
    narrow: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    spills: int = 0
    mma: Mapping[int, str] = field(default_factory=dict)
    exceptions: Mapping[int, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    def on(self, capability: int) -> "Budget":
        """The budget on sm_<capability>."""
        _, changes = self.exceptions.get(capability, ("", {}))
        return replace(self, exceptions={}, **changes)


@dataclass(frozen=True)
class Matmul:
    """What a launch of a matmul kernel computes, tile by tile, each in steps over the inner dimension."""

    tiles: int
    flops: int  # of one tile
    step_flops: int  # of one step of it


@dataclass(frozen=True)
class Plan:
    """One kernel in one regime. `launches` plans it for a device; the rest is what the code alone does not tell.

    fill: the share of a block's lanes that hold elements; elements, bytes: of one launch, where they are not those of
    its tensors, the largest one's elements and what is read once and written once; matmul: where it multiplies.
    """

    name: str
    launches: Callable[[Device], list[Launch]]
    budget: Budget
    fill: Callable[[Launch], float] = lambda launch: 1.0
    elements: int | None = None
    bytes: int | None = None
    matmul: Callable[[Launch], Matmul] | None = None


def broken_budgets(budget: Budget, compiled: Compiled) -> Iterator[str]:
    """One line for each part of the budget, of this target, that the compiled kernel does not keep."""
    architecture = compiled.architecture
    if compiled.spills > budget.spills:
        yield (
            f"spills {compiled.local} bytes a thread in {compiled.spills} instructions, budget {budget.spills}; "
            f"it takes {compiled.registers} registers"
        )
    narrow: Counter[tuple[str, str, str, int]] = Counter()
    for access in compiled.accesses:
        least, _ = budget.narrow.get(access.written) or budget.narrow.get(access.pointer, (FULL_WIDTH, ""))
        if 0 < access.width < least:
            narrow[access.pointer, access.line, access.name, 8 * least] += 1
    for (pointer, line, name, bits), count in narrow.items():
        yield f"{pointer}, {line}: {count} x {name}, budget {bits} bits"
    most = architecture.max_warps // compiled.warps * compiled.warps
    if compiled.shared > architecture.shared_block:
        yield f"takes {compiled.shared} bytes of shared memory a block, the target has {architecture.shared_block}"
    elif compiled.resident_warps < max(compiled.warps, min(budget.warps, most)):
        yield (
            f"{compiled.resident_warps} warps a multiprocessor, budget {min(budget.warps, most)}: blocks of "
            f"{compiled.warps} warps, {compiled.registers} registers a thread, {compiled.shared} bytes shared"
        )
    elif budget.one_wave and (waves := compiled.waves or 0.0) > 1:
        yield (
            f"{waves:.2f} waves, budget 1: a multiprocessor holds {compiled.resident_warps} warps, in blocks of "
            f"{compiled.warps}, at {compiled.registers} registers a thread and {compiled.shared} bytes shared"
        )
    mma = budget.mma.get(architecture.capability, compiled.mma)
    if compiled.mma != mma:
        yield f"multiplies with {compiled.mma or 'no tensor cores'}, budget {mma}"
