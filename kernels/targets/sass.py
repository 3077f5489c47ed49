"""Reading SASS, the machine code of NVIDIA GPUs: instructions, loops, memory accesses, pipes.

`disassemble` turns a cubin into the text of `nvdisasm -c -g`; everything else works on that text:

    //## File "layer_norm.py", line 104                 what follows came from that line
    .L_x_1:                                             a label
        /*0110*/  @!P0 LDG.E.128 R4, desc[UR22][R2.64] ;    address, guard, opcode.modifiers, operands
"""

import re
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

from kernels.targets.architectures import ISSUE, LSU_BYTES, WARP, Architecture


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "LDG"
    modifiers: tuple[str, ...]  # ("E", "128")
    operands: str
    guard: str  # "@!P0", or ""
    source: tuple[str, int] | None  # file name without its folder, line

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, in order, and where its labels stand: label -> index of the instruction after it."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclass(frozen=True)
class Access:
    """One load or store, a thread's share of it."""

    store: bool
    space: str  # "global", "shared" or "local"; local is where registers spill to
    width: int  # bytes; 0: a whole tile at once, moved by the tensor memory accelerator


def disassemble(cubin: bytes) -> str:
    """The text of a cubin, with source lines."""
    return _tool(triton.knobs.nvidia.nvdisasm.path, ["-c", "-g"], cubin)


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says a kernel takes: {"REG": registers a thread, "STACK": bytes of local memory a thread, ...}."""
    text = _tool(triton.knobs.nvidia.cuobjdump.path, ["-res-usage"], cubin)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text.split("Function", 1)[1])}


def _tool(path: str, flags: list[str], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([path, *flags, str(file)], check=True, capture_output=True, text=True).stdout


_SOURCE = re.compile(r'//## File "(.*)", line (\d+)')
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([A-Z]\w*)([\w.]*)\s*([^;&?]*)")


def parse(text: str) -> Code:
    """The instructions of nvdisasm's text, which holds one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = None
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            guard, opcode, modifiers, operands = match.groups(default="")
            modifiers = tuple(part for part in modifiers.split(".") if part)
            instructions.append(Instruction(opcode, modifiers, operands.strip(), guard.strip(), source))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _SOURCE.search(line):
            source = (Path(match[1]).name, int(match[2]))
    return Code(tuple(instructions), labels)


def access(instruction: Instruction) -> Access | None:
    """What an instruction moves between memory and registers or shared memory; None where it does not."""
    found = _ACCESSES.get(instruction.opcode)
    if found is None:
        return None
    store, space = found
    if instruction.opcode.startswith("U"):
        return Access(store, space, 0)
    return Access(store, space, next((_WIDTHS[m] for m in instruction.modifiers if m in _WIDTHS), 4))


_ACCESSES = {  # opcode: (store, space)
    "LDG": (False, "global"), "LD": (False, "global"), "LDGSTS": (False, "global"), "UTMALDG": (False, "global"),
    "UBLKCP": (False, "global"), "STG": (True, "global"), "ST": (True, "global"), "UTMASTG": (True, "global"),
    "RED": (True, "global"), "REDG": (True, "global"), "ATOM": (True, "global"), "ATOMG": (True, "global"),
    "LDS": (False, "shared"), "LDSM": (False, "shared"), "STS": (True, "shared"), "STSM": (True, "shared"),
    "LDL": (False, "local"), "STL": (True, "local"),
}  # fmt: skip
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

MMA = ("UTCHMMA", "UTCQMMA", "UTCOMMA", "UTCIMMA", "HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "OMMA", "IMMA")

PIPES = ("fma", "alu", "sfu", "lsu", "tensor", "other")
_FMA = {"IMAD", "IMUL", "IDP", "HFMA2", "HADD2", "HMUL2"}
_SFU = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"}
_LSU = {"SHFL", "MATCH", "REDUX", "CREDUX", "S2R"}
_OTHER = {  # control flow, barriers, constants, and what holds no pipe for long
    "BAR", "BRA", "BRX", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "EXIT", "NOP", "WARPSYNC", "DEPBAR", "LDGDEPBAR",
    "LDC", "LDCU", "ULDC", "SYNCS", "WARPGROUP", "FENCE", "MEMBAR", "ERRBAR", "CCTL", "NANOSLEEP", "ELECT", "ACQBULK",
    "CGAERRBAR", "ENDCOLLECTIVE", "PREEXIT", "YIELD", "KILL", "BPT", "ARRIVES", "LEPC", "LDTM", "STTM", "S2UR", "R2UR",
}  # fmt: skip


def pipe(instruction: Instruction) -> str:
    """Which of PIPES an instruction keeps busy."""
    opcode = instruction.opcode
    if opcode in MMA:
        return "tensor"
    if opcode in _FMA or re.fullmatch(r"F(FMA|ADD|MUL)(2|32I)?", opcode):
        return "fma"
    if opcode in _SFU:
        return "sfu"
    if opcode in _LSU or (opcode in _ACCESSES and not opcode.startswith("U")):
        return "lsu"
    if opcode in _OTHER or opcode.startswith("U"):  # U…: the uniform datapath, once a warp
        return "other"
    return "alu"


def cycles(instructions: Iterable[Instruction], architecture: Architecture) -> dict[str, float]:
    """Clocks for which one warp's run through the instructions holds each pipe of a multiprocessor, and the issue.

    The tensor cores' time is not in an instruction's name: not counted here.
    """
    busy = dict.fromkeys(("fma", "alu", "sfu", "lsu", "issue"), 0.0)
    for instruction in instructions:
        busy["issue"] += 1 / ISSUE
        name = pipe(instruction)
        if name == "fma":
            if instruction.opcode.startswith("I"):
                busy[name] += WARP / architecture.imad
            elif instruction.opcode.startswith("H"):
                busy[name] += WARP / architecture.half2
            else:  # FFMA2, FADD2, FMUL2: two results
                busy[name] += (2 if instruction.opcode.endswith("2") else 1) * WARP / architecture.fma
        elif name == "alu":
            busy[name] += WARP / architecture.alu
        elif name == "sfu":
            busy[name] += WARP / architecture.sfu
        elif name == "lsu":
            moved = access(instruction)
            busy[name] += max(1.0, moved.width * WARP / LSU_BYTES) if moved else 1.0
    return busy


def loops(code: Code) -> list[frozenset[int]]:
    """The natural loops, each as the indices of its instructions, inner loops included, inner ones first.

    A backward jump alone makes no loop: compilers also put what is rarely run behind the end and jump back from there.
    """
    starts, successors = _blocks(code)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}  # header -> blocks
    for block, targets in enumerate(successors):
        for header in targets:
            if dominators[block] >> header & 1:
                body, stack = bodies.setdefault(header, {header}), [block]
                while stack:
                    if (inside := stack.pop()) not in body:
                        body.add(inside)
                        stack.extend(p for p, after in enumerate(successors) if inside in after and dominators[p])
    ends = [*starts[1:], len(code.instructions)]
    found = [frozenset(i for block in body for i in range(starts[block], ends[block])) for body in bodies.values()]
    return sorted(found, key=len)


def spills(code: Code) -> int:
    """Instructions that move registers to local memory or back.

    0 where nothing is loaded back: some compilers (sm_120, CUDA 12.9) store a zero there before each bulk load.
    """
    local = [x.opcode for x in code.instructions if (moved := access(x)) and moved.space == "local"]
    return len(local) if "LDL" in local else 0


def bytes_under_way(instructions: Iterable[Instruction], rounds: int) -> int:
    """The most bytes that a thread's global loads can have under way at once, in so many runs through instructions.

    A load is over, at the latest, when an instruction names one of its registers: there the thread waits for it.
    """
    most, waiting = 0, []  # (registers, bytes)
    for instruction in list(instructions) * rounds:
        named = {int(register) for register in re.findall(r"\bR(\d+)", instruction.operands)}
        waiting = [load for load in waiting if not load[0] & named]
        moved = access(instruction)
        if instruction.opcode == "LDG" and moved and (to := re.match(r"R(\d+)", instruction.operands)):
            registers = range(int(to[1]), int(to[1]) + max(1, moved.width // 4))
            waiting.append((frozenset(registers), moved.width))
            most = max(most, sum(width for _, width in waiting))
    return most


def flops(instructions: Iterable[Instruction]) -> float:
    """FLOPs of one warp's run through the tensor-core instructions whose name tells their size; else 0.

    HMMA.16816: a warp multiplies 16x16 by 16x8; HGMMA.64xNx16: four warps together 64x16 by 16xN.
    """
    total = 0.0
    for instruction in instructions:
        sizes = [m for m in instruction.modifiers if re.fullmatch(r"1688|16816|64x\d+x\d+", m)]
        if instruction.opcode == "HMMA" and sizes:
            total += {"1688": 2 * 16 * 8 * 8, "16816": 2 * 16 * 8 * 16}[sizes[0]]
        elif instruction.opcode == "HGMMA" and sizes:
            m, n, k = map(int, sizes[0].split("x"))
            total += 2 * m * n * k / 4
    return total


def steps_of_product(code: Code) -> tuple[list[int], list[int]]:
    """The instructions of a matmul's inner loop, and those around it that a persistent kernel runs once for each tile.

    Compilers merge the two loops into one, in which the end of a tile is under a condition: what the inner loop runs
    every time is what every way from its head back to it passes.
    """
    multiplying = [i for i, instruction in enumerate(code.instructions) if instruction.opcode in MMA]
    around = [loop for loop in loops(code) if any(i in loop for i in multiplying)]
    if not around:
        return [], []
    inner = around[0]
    starts, successors = _blocks(code)
    dominators = _dominators(successors)
    block_of = {i: bisect_right(starts, i) - 1 for i in inner}
    header = next(b for b in set(block_of.values()) if all(dominators[o] >> b & 1 for o in block_of.values()))
    back = [block for block in set(block_of.values()) if header in successors[block]]
    always = [i for i in sorted(inner) if all(dominators[block] >> block_of[i] & 1 for block in back)]
    return always, sorted(around[-1] - set(always))


def _target(code: Code, instruction: Instruction) -> int | None:
    match = re.search(r"\.L_\w+", instruction.operands)
    return code.labels.get(match[0]) if match else None


def _blocks(code: Code) -> tuple[list[int], list[list[int]]]:
    """The basic blocks: the index of each one's first instruction, and which blocks may follow each."""
    size = len(code.instructions)
    jumps = {"BRA", "BRX", "JMP", "BSYNC", "EXIT", "RET", "KILL"}
    cuts = {0, *code.labels.values()} | {i + 1 for i, x in enumerate(code.instructions) if x.opcode in jumps}
    starts = sorted(cut for cut in cuts if cut < size)
    block_at = {start: block for block, start in enumerate(starts)}
    successors: list[list[int]] = []
    rejoin: dict[str, int | None] = {}  # barrier register -> where BSYNC goes on
    for block, start in enumerate(starts):
        end = starts[block + 1] if block + 1 < len(starts) else size
        for x in code.instructions[start:end]:
            if x.opcode == "BSSY":
                rejoin[x.operands.split(",")[0]] = _target(code, x)
        last, after = code.instructions[end - 1], {end}
        if last.opcode in jumps:
            to = rejoin.get(last.operands) if last.opcode == "BSYNC" else _target(code, last)
            conditional = last.guard not in ("", "@PT", "@UPT") or (last.opcode == "BRA" and "," in last.operands)
            after = ({end} if conditional or (last.opcode == "BSYNC" and to is None) else set()) | {to}
        successors.append([block_at[i] for i in after if i in block_at])
    return starts, successors


def _dominators(successors: list[list[int]]) -> list[int]:
    """For each block, as bits, the blocks that every way to it passes, itself included; 0 where nothing leads to it."""
    predecessors: list[list[int]] = [[] for _ in successors]
    reached, stack = {0}, [0]
    while stack:
        block = stack.pop()
        for target in successors[block]:
            predecessors[target].append(block)
            if target not in reached:
                reached.add(target)
                stack.append(target)
    every = (1 << len(successors)) - 1
    dominators = [every if block in reached else 0 for block in range(len(successors))]
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = every
            for predecessor in predecessors[block]:
                common &= dominators[predecessor]
            if (common := common | 1 << block) != dominators[block]:
                dominators[block], changed = common, True
    return dominators
