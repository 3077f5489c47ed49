"""`python -m kernels.targets`: every kernel keeps its budget on every target, and a budget can be broken."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.cases import BUDGETS, Budget
from kernels.targets import ARCHITECTURES, LOADS, STORES, Compiled, broken, resident_warps, spills, widths

ROOT = Path(__file__).parents[2]
GOOD = Compiled(
    registers=64, spills=0, shared=0, warps=4, resident_warps=32, waves=1.0, loads={16: 4}, stores={16: 1}, mma="HGMMA"
)


@pytest.mark.slow
def test_every_kernel_keeps_its_budget_on_every_target() -> None:
    """Without the interpreter that the tests run kernels in."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    argv = [sys.executable, "-m", "kernels.targets"]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout.split("\n\n")[-1] + done.stderr
    rows = re.findall(r" (\w+_kernel) +(\d+) .* (\S+)$", done.stdout, re.MULTILINE)
    assert {int(target) for _, target, _ in rows} == set(ARCHITECTURES)
    assert {kernel for kernel, _, _ in rows} == set(BUDGETS)
    assert {mma for kernel, target, mma in rows if "linear_gelu" in kernel and target == "90"} == {"HGMMA"}


def test_every_kernel_has_a_budget() -> None:
    sources = [path.read_text() for path in (ROOT / "kernels" / "fused").glob("*.py")]
    assert set(BUDGETS) == set(re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", "\n".join(sources), re.MULTILINE))


def test_a_budget_that_is_broken() -> None:
    budget, hopper = Budget(warps=32, one_wave=True, mma=True), ARCHITECTURES[90]
    assert list(broken(budget, GOOD, hopper)) == []
    for changes, said in [
        ({"spills": 3}, "3 instructions spill, budget 0"),
        ({"loads": {4: 16}}, "20% of the bytes move 16 at a time, budget 90%"),
        ({"resident_warps": 28}, "28 warps at once, budget 32"),
        ({"shared": 300_000, "resident_warps": 0}, "300000 bytes of shared memory a block"),
        ({"waves": 1.5}, "1.50 waves, budget 1"),
        ({"mma": "HMMA"}, "multiplies with HMMA, budget HGMMA"),
    ]:
        (fault,) = broken(budget, replace(GOOD, **changes), hopper)
        assert fault.startswith(said)


def test_machine_code_is_read() -> None:
    code = """
        /*0010*/                   LDG.E.128 R4, desc[UR22][R2.64] ;
        /*0020*/             @!P0  LDG.E R8, desc[UR22][R6.64] ;
        /*0030*/                   LDG.E.U16 R8, desc[UR22][R6.64] ;
        /*0040*/             @P1   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0050*/                   LDS.128 R4, [R8] ;
        /*0060*/                   UTMALDG.2D [UR8], [UR4] ;
    """
    assert widths(code, LOADS) == {16: 1, 4: 1, 2: 1, 0: 1}
    assert widths(code, STORES) == {8: 1}
    assert spills(code) == 0
    assert spills(code + "        /*0070*/   STL [R1], R6 ;\n        /*0080*/   @P0 LDL.LU R6, [R1] ;\n") == 2
    assert spills(code + "        /*0070*/   STL.64 [R1], RZ ;\n") == 0  # nothing is loaded back


def test_warps_at_once() -> None:
    assert resident_warps(ARCHITECTURES[90], warps=4, registers=32, shared=0) == 64  # by its limit
    assert resident_warps(ARCHITECTURES[90], warps=4, registers=33, shared=0) == 48  # registers come in units of 256
    assert resident_warps(ARCHITECTURES[90], warps=8, registers=168, shared=114_712) == 8  # by shared memory
    assert resident_warps(ARCHITECTURES[86], warps=8, registers=32, shared=0) == 48
