"""Reading SASS: what the text says, where it loops, which pipe works. The texts are those of toy kernels, cut short."""

import pytest

from kernels.targets import sass
from kernels.targets.architectures import ARCHITECTURES, resident_warps

STRAIGHT = """
	.type           copy_kernel,@function
copy_kernel:
.text.copy_kernel:
	//## File "/somewhere/toys.py", line 18
        /*0000*/                   S2R R0, SR_TID.X                           &wr=0x0          ?trans1;
        /*0010*/                   IMAD.SHL.U32 R0, R0, 0x8, RZ               &req={0}         ?WAIT4_END_GROUP;
	//## File "/somewhere/toys.py", line 19
        /*0020*/                   LDG.E R10, desc[UR4][R10.64]               &wr=0x1          ?trans1;
        /*0030*/              @!P0 LDG.E.128 R4, desc[UR4][R8.64] ;
        /*0040*/                   FMUL R15, R10.reuse, R4 ;
	//## File "/somewhere/helpers/store.py", line 3
        /*0050*/              @UP0 UMOV UR4, 0x400 ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R16 ;
        /*0070*/                   EXIT ;
.L_x_0:
        /*0080*/                   BRA `(.L_x_0);
"""


def instructions(*lines: str) -> tuple[sass.Instruction, ...]:
    return sass.parse("\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))).instructions


def code(text: str) -> sass.Code:
    """Code from lines that are labels or instructions."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return sass.parse(
        "\n".join(line if line.endswith(":") else f"/*{i:04x}*/ {line} ;" for i, line in enumerate(lines))
    )


def loops(text: str) -> list[list[str]]:
    """The opcodes of each loop's instructions."""
    parsed = code(text)
    return [[parsed.instructions[i].opcode for i in sorted(loop)] for loop in sass.loops(parsed)]


def test_parse() -> None:
    parsed = sass.parse(STRAIGHT)
    assert [x.name for x in parsed.instructions] == [
        "S2R", "IMAD.SHL.U32", "LDG.E", "LDG.E.128", "FMUL", "UMOV", "STG.E.128", "EXIT", "BRA",
    ]  # fmt: skip
    assert [x.guard for x in parsed.instructions[2:6]] == ["", "@!P0", "", "@UP0"]
    assert parsed.instructions[1].operands == "R0, R0, 0x8, RZ"  # not the scheduling notes after it
    assert parsed.instructions[1].source == ("toys.py", 18)
    assert parsed.instructions[4].source == ("toys.py", 19)
    assert parsed.instructions[6].source == ("store.py", 3)
    assert parsed.labels == {".L_x_0": 8}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("LDG.E R1, desc[UR4][R2.64]", (False, "global", 4)),
        ("LDG.E.U16 R1, desc[UR4][R2.64]", (False, "global", 2)),
        ("LDG.E.S8 R1, [R2.64]", (False, "global", 1)),
        ("@P1 LDG.E.EF.64 R4, desc[UR4][R2.64+0x800]", (False, "global", 8)),
        ("LDG.E.128.CONSTANT R4, [R2.64]", (False, "global", 16)),
        ("LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64]", (False, "global", 32)),
        ("LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]", (False, "global", 16)),
        ("STG.E.128 desc[UR4][R2.64], R4", (True, "global", 16)),
        ("UTMALDG.2D [UR8], [UR4]", (False, "global", 0)),
        ("UTMASTG.2D [UR8], [UR4]", (True, "global", 0)),
        ("LDS.128 R4, [R2]", (False, "shared", 16)),
        ("STL.64 [R1+0x8], R4", (True, "local", 8)),
        ("LDL R4, [R1]", (False, "local", 4)),
        ("LDC.64 R2, c[0x0][0x210]", None),
        ("IMAD.WIDE R8, R13, 0x2, R2", None),
    ],
)
def test_access(line: str, expected: tuple[bool, str, int] | None) -> None:
    (instruction,) = instructions(line)
    assert sass.access(instruction) == (None if expected is None else sass.Access(*expected))


@pytest.mark.parametrize(
    ("line", "pipe", "clocks"),  # of one warp, on sm_80 and sm_90
    [
        ("FFMA R0, R1, R2, R3", "fma", (0.5, 0.25)),
        ("FADD.FTZ R0, R1, R2", "fma", (0.5, 0.25)),
        ("FFMA2 R0, R2, R4, R6", "fma", (1.0, 0.5)),
        ("IMAD.WIDE R8, R13, 0x2, R2", "fma", (0.5, 0.5)),
        ("HFMA2.MMA.BF16_V2 R5, -R5, 1, 1, RZ", "fma", (0.25, 0.25)),
        ("F2FP.BF16.F32.PACK_AB R16, R0, R15", "alu", (0.5, 0.5)),
        ("LOP3.LUT R0, R0, 0x3f8, RZ, 0xc0, !PT", "alu", (0.5, 0.5)),
        ("FMNMX R0, R1, R2, PT", "alu", (0.5, 0.5)),
        ("MUFU.EX2 R0, R1", "sfu", (2.0, 2.0)),
        ("I2F.S16 R0, R1", "sfu", (2.0, 2.0)),
        ("LDG.E.128 R4, [R2.64]", "lsu", (4.0, 4.0)),
        ("LDS.64 R4, [R2]", "lsu", (2.0, 2.0)),
        ("STG.E.U16 [R2.64], R4", "lsu", (1.0, 1.0)),
        ("SHFL.BFLY PT, R0, R1, 0x10, 0x1f", "lsu", (1.0, 1.0)),
    ],
)
def test_pipe(line: str, pipe: str, clocks: tuple[float, float]) -> None:
    (instruction,) = instructions(line)
    assert sass.pipe(instruction) == pipe
    for capability, expected in zip((80, 90), clocks, strict=True):
        busy = sass.cycles([instruction] * 3, ARCHITECTURES[capability])
        assert busy.pop("issue") == pytest.approx(0.75)
        assert busy == pytest.approx({"fma": 0, "alu": 0, "sfu": 0, "lsu": 0, pipe: 3 * expected})


@pytest.mark.parametrize(
    "line", ["UIADD3 UR4, UR4, 0x1, URZ", "BAR.SYNC 0x0", "LDC R1, c[0x0][0x28]", "UTMALDG.2D [UR8], [UR4]"]
)
def test_nothing_but_issue(line: str) -> None:
    assert {name: clocks for name, clocks in sass.cycles(instructions(line), ARCHITECTURES[90]).items() if clocks} == {
        "issue": 0.25
    }


def test_tensor_cores_are_timed_by_their_flops() -> None:
    multiply = instructions("HMMA.16816.F32.BF16 R4, R8, R12, R4", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24")
    assert [sass.pipe(x) for x in multiply] == ["tensor", "tensor"]
    assert sass.cycles(multiply, ARCHITECTURES[90])["issue"] == 0.5
    assert sass.flops(multiply[:1]) == 2 * 16 * 8 * 16
    assert 4 * sass.flops(multiply[1:]) == 2 * 64 * 256 * 16  # four warps do one together
    assert sass.flops(instructions("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0")) == 0


def test_no_loop() -> None:
    assert loops("MOV R0, RZ\n @P0 BRA `(.L_1)\n LDG.E R1, [R2.64]\n .L_1:\n STG.E [R2.64], R1\n EXIT") == []


def test_loops_within_loops_come_first() -> None:
    assert loops("""
        MOV R0, RZ
        .L_outer:
        LDS R1, [R2]
        .L_inner:
        LDG.E R4, [R2.64]
        @P1 BRA `(.L_inner)
        STG.E [R2.64], R4
        BRA.U UP0, `(.L_outer)
        EXIT
    """) == [["LDG", "BRA"], ["LDS", "LDG", "BRA", "STG", "BRA"]]


def test_a_loop_left_in_the_middle_and_one_that_waits() -> None:
    assert loops("""
        .L_0:
        @P0 BRA `(.L_1)
        LDG.E R4, [R2.64]
        BRA `(.L_0)
        .L_1:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3
        @!P0 BRA `(.L_1)
        EXIT
    """) == [["SYNCS", "BRA"], ["BRA", "LDG", "BRA"]]


def test_code_behind_the_end_that_jumps_back_makes_no_loop() -> None:
    assert (
        loops("""
        @!P0 BRA `(.L_slow)
        .L_back:
        STG.E [R2.64], R4
        EXIT
        .L_slow:
        MUFU.RCP R4, R4
        BRA `(.L_back)
    """)
        == []
    )


def test_code_behind_the_end_belongs_to_the_loop_that_it_returns_to() -> None:
    assert loops("""
        .L_0:
        LDG.E R4, [R2.64]
        @!P0 BRA `(.L_slow)
        .L_back:
        STG.E [R2.64], R4
        @P1 BRA `(.L_0)
        EXIT
        .L_slow:
        MUFU.RCP R4, R4
        BRA `(.L_back)
    """) == [["LDG", "BRA", "STG", "BRA", "MUFU", "BRA"]]


def test_divergent_paths_rejoin_inside_the_loop() -> None:
    assert loops("""
        .L_0:
        BSSY B0, `(.L_join)
        @P0 BRA `(.L_else)
        FADD R0, R1, R2
        BSYNC B0
        .L_else:
        FMUL R0, R1, R2
        BSYNC B0
        .L_join:
        STG.E [R2.64], R0
        @P1 BRA `(.L_0)
        EXIT
    """) == [["BSSY", "BRA", "FADD", "BSYNC", "FMUL", "BSYNC", "STG", "BRA"]]


def test_a_path_behind_the_end_rejoins_too() -> None:
    assert loops("""
        .L_0:
        BSSY B0, `(.L_join)
        @P0 BRA `(.L_cold)
        FADD R0, R1, R2
        .L_join:
        STG.E [R2.64], R0
        @P1 BRA `(.L_0)
        EXIT
        .L_cold:
        FMUL R0, R1, R2
        BSYNC B0
        .L_trap:
        BRA `(.L_trap)
    """) == [["BSSY", "BRA", "FADD", "STG", "BRA", "FMUL", "BSYNC"]]


PRODUCT = """
    S2R R0, SR_CTAID.X
    .L_step:
    LDGSTS.E.BYPASS.128 [R9], [R2.64]
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    @P0 BRA `(.L_next)
    FADD R4, R4, R5
    STG.E.128 [R2.64], R4
    .L_next:
    IADD3 R0, R0, 0x1, RZ
    @P1 BRA `(.L_step)
    EXIT
"""


def names(parsed: sass.Code, indices: list[int]) -> list[str]:
    return [parsed.instructions[i].opcode for i in indices]


def test_steps_of_a_product_merged_with_its_tiles() -> None:
    parsed = code(PRODUCT)
    steps, tile = sass.steps_of_product(parsed)
    assert names(parsed, steps) == ["LDGSTS", "HMMA", "BRA", "IADD3", "BRA"]
    assert names(parsed, tile) == ["FADD", "STG"]


def test_steps_of_a_product_inside_its_tiles() -> None:
    parsed = code("""
        .L_tile:
        MOV R4, RZ
        .L_step:
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        @P0 BRA `(.L_step)
        STG.E.128 [R2.64], R4
        @P1 BRA `(.L_tile)
        EXIT
    """)
    steps, tile = sass.steps_of_product(parsed)
    assert names(parsed, steps) == ["HMMA", "BRA"]
    assert names(parsed, tile) == ["MOV", "STG", "BRA"]


def test_no_product() -> None:
    assert sass.steps_of_product(sass.parse(STRAIGHT)) == ([], [])


def test_spills() -> None:
    spilled = code("STL.64 [R1], R4\n FADD R4, R2, R3\n LDL.64 R4, [R1]\n LDS R5, [R2]\n STG.E [R2.64], R4")
    assert sass.spills(spilled) == 2
    assert sass.spills(code("STL.64 [R1], RZ\n UTMALDG.2D [UR8], [UR4]\n STG.E [R2.64], R4")) == 0


def test_bytes_under_way() -> None:
    together = ("LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "FADD R0, R4, R8")
    one_by_one = ("LDG.E.128 R4, [R2.64]", "FADD R0, R7, R0", "LDG.E.128 R8, [R2.64+0x10]", "FADD R0, R8, R0")
    ahead = ("FADD R0, R4, R0", "LDG.E.128 R4, [R2.64]", "LDG.E.64 R8, [R2.64+0x10]", "FADD R9, R10, R10")
    assert sass.bytes_under_way(instructions(*together), 1) == 32
    assert sass.bytes_under_way(instructions(*one_by_one), 1) == 16
    assert sass.bytes_under_way(instructions(*one_by_one), 2) == 16
    assert sass.bytes_under_way(instructions("FADD R0, R4, R0", "LDG.E.128 R4, [R2.64]"), 2) == 16
    assert sass.bytes_under_way(instructions(*ahead), 2) == 24
    assert sass.bytes_under_way(instructions("LDG.E R4, [R2.64]", "LDG.E R8, [R2.64]"), 2) == 8  # again, not anew
    assert sass.bytes_under_way(instructions("STG.E.128 [R2.64], R4", "LDS.128 R4, [R8]"), 1) == 0


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "expected"),  # the last as the CUDA occupancy calculator has it
    [
        (90, 4, 32, 0, 64),  # the limit on warps
        (86, 4, 32, 0, 48),
        (90, 4, 128, 0, 16),  # registers
        (90, 4, 129, 0, 12),  # in units of 8 a thread
        (90, 8, 255, 0, 8),
        (90, 4, 153, 0, 12),
        (80, 16, 64, 0, 32),
        (90, 1, 32, 0, 32),  # the limit on blocks
        (86, 1, 32, 0, 16),
        (90, 4, 32, 48 * 1024, 16),  # shared memory, with 1 KB for the system: 4 blocks of 49 KB
        (80, 4, 32, 48 * 1024, 12),
        (120, 4, 32, 99 * 1024, 4),
        (120, 4, 32, 99 * 1024 + 16, 0),  # more than a block may take
        (100, 32, 80, 0, 0),  # one block needs more registers than there are
    ],
)
def test_resident_warps(capability: int, warps: int, registers: int, shared: int, expected: int) -> None:
    assert resident_warps(ARCHITECTURES[capability], warps, registers, shared) == expected


def test_tensor_memory_limits_too() -> None:
    assert resident_warps(ARCHITECTURES[100], 4, 32, 0, tensor_memory=256) == 8


DATA_SHEETS = {80: (312, 19.5), 86: (71, 35.6), 89: (165, 82.6), 90: (989, 67), 100: (2250, 75), 120: (209.5, 104.8)}


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_rates_are_those_of_the_card(capability: int) -> None:
    """Lanes, clock and multiprocessors against the data sheet's dense bf16 and float32 TFLOP/s."""
    architecture, (bf16, fp32) = ARCHITECTURES[capability], DATA_SHEETS[capability]
    per_second = architecture.clock * architecture.multiprocessors
    assert architecture.tensor * per_second == pytest.approx(bf16 * 1e12, rel=0.01)
    assert 2 * architecture.fma * per_second == pytest.approx(fp32 * 1e12, rel=0.1)  # at a higher clock, on some
