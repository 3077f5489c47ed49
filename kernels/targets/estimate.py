"""How fast a compiled kernel could run: its main loop's instructions against issue rates, its bytes against the memory.

An estimate, to find what to simplify before a GPU is at hand: it knows no latencies, no bank conflicts, no caches.
"""

from collections import Counter
from dataclasses import dataclass

from kernels.targets import sass
from kernels.targets.architectures import WARP
from kernels.targets.budgets import Plan
from kernels.targets.compiled import Access, Compiled, tensor_of


@dataclass(frozen=True)
class Estimate:
    """Clocks are a multiprocessor's, for one element; of a matmul, for one tile."""

    instructions: dict[str, float]  # a thread's, for one element (a matmul: a warp's, for one tile), by pipe
    busy: dict[str, float]  # clocks that each pipe, the issue slots ("issue") and the tensor cores are held
    dram: float  # clocks that the memory takes
    in_flight: float  # bytes that all resident warps can have under way, over those that hide the memory's latency
    exposed: float = 0.0  # of a matmul: clocks of a tile's end that no other block hides

    @property
    def bound(self) -> str:
        """What takes longest: "dram", "issue", or a pipe."""
        return max({**self.busy, "dram": self.dram}.items(), key=lambda item: item[1])[0]

    @property
    def bandwidth(self) -> float:
        """The share of the memory's bandwidth that the other limits leave."""
        return self.dram / max(self.dram, *self.busy.values())

    @property
    def tensor(self) -> float:
        """The share of the tensor cores' rate that the other limits leave."""
        return self.busy.get("tensor", 0.0) / (max(self.dram, *self.busy.values()) + self.exposed)


def estimate(plan: Plan, compiled: Compiled) -> Estimate | None:
    """None where no access to the launch's large tensors is found: there is nothing to count by."""
    tensors = {name: tensor_of(argument) for name, argument in compiled.launch.args.items()}
    sizes = {name: tensor.numel() for name, tensor in tensors.items() if tensor is not None}
    touched = {(access.pointer, access.store) for access in compiled.accesses if access.pointer in sizes}
    if not touched:
        return None
    elements = plan.elements or max(sizes[name] for name, _ in touched)
    moved = plan.bytes or sum(sizes[name] * tensors[name].element_size() for name, _ in touched)
    dram = moved / compiled.architecture.dram
    if compiled.mma:
        return _matmul(plan, compiled, dram) if plan.matmul else None
    bulk = [x for x in compiled.accesses if x.width and sizes.get(x.pointer, 0) * 8 >= elements]
    fill = plan.fill(compiled.launch)
    instructions, busy, loaded = Counter(), Counter(), 0.0
    regions, rounds = _regions(compiled, bulk)
    for region, lines in regions:
        inside = [x for x in bulk if x.index in region and x.line in lines]
        lanes = _elements(inside, tensors) * WARP * fill  # elements that one warp handles in one pass
        code = [compiled.code.instructions[i] for i in sorted(region)]
        for instruction in code:
            instructions[sass.pipe(instruction)] += WARP / lanes
        held = sass.cycles(code, compiled.architecture)
        moves = [compiled.code.instructions[x.index] for x in compiled.accesses if x.index in region]
        held["lsu"] -= (1 - fill) * sass.cycles(moves, compiled.architecture)["lsu"]  # masked lanes move nothing
        for name, clocks in held.items():
            busy[name] += clocks / lanes
        loaded = max(loaded, sass.bytes_under_way(code, rounds) * WARP * fill)
    if not busy:
        return None
    in_flight = loaded * compiled.resident_warps / compiled.architecture.in_flight
    return Estimate(dict(instructions), dict(busy), dram / elements, in_flight)


def _elements(accesses: list[Access], tensors: dict) -> float:
    """Elements that a thread handles in one pass over these accesses."""
    by_statement = Counter()
    for x in accesses:
        by_statement[x.pointer, x.store, x.line] += x.width / tensors[x.pointer].element_size()
    return max(by_statement.values())


def _regions(compiled: Compiled, bulk: list[Access]) -> tuple[list[tuple[frozenset[int], frozenset[str]]], int]:
    """The loops that touch the large tensors, each with the lines that do, and 2; or all the code, and 1.

    A loop's lines are not those of loops inside it: what is left of them there is a remainder of an unrolled loop. Of
    several versions of one loop, it is the longest, which does most. 2 and 1: how often what follows itself is run
    through to see it as it is when running.
    """
    found: dict[frozenset[str], frozenset[int]] = {}
    taken: frozenset[int] = frozenset()
    for loop in sass.loops(compiled.code):  # the shortest first
        within = {line for lines, inner in found.items() if inner <= loop for line in lines}
        lines = frozenset(x.line for x in bulk if x.index in loop - taken and x.line not in within)
        if lines:
            found[lines] = loop - taken
            taken |= loop
    if found:
        return [(region, lines) for lines, region in found.items()], 2
    everything = frozenset(range(len(compiled.code.instructions)))
    return [(everything, frozenset(x.line for x in bulk))] if bulk else [], 1


def _matmul(plan: Plan, compiled: Compiled, dram: float) -> Estimate | None:
    """The product's steps and the epilogue of one tile. Without a loop that multiplies: None."""
    code, matmul, architecture = compiled.code, plan.matmul(compiled.launch), compiled.architecture
    steps, tile = sass.steps_of_product(code)
    if not steps:
        return None
    rounds = matmul.flops / (sass.flops([code.instructions[i] for i in steps]) * compiled.warps or matmul.step_flops)
    instructions, busy = Counter(), Counter()
    for indices, times in ((steps, rounds), (tile, 1)):
        part = [code.instructions[i] for i in indices]
        for instruction in part:
            instructions[sass.pipe(instruction)] += times
        for name, clocks in sass.cycles(part, architecture).items():
            busy[name] += clocks * times * compiled.warps
    busy["tensor"] = matmul.flops / architecture.tensor
    alone = compiled.resident_warps <= compiled.warps  # no other block multiplies while this one finishes its tile
    epilogue = sass.cycles([code.instructions[i] for i in tile], architecture)
    return Estimate(
        dict(instructions),
        dict(busy),
        dram / matmul.tiles,
        in_flight=0.0,
        exposed=max(epilogue.values()) * compiled.warps if alone else 0.0,
    )
