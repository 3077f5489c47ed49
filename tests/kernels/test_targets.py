"""`python -m kernels.targets`: every kernel keeps its budget on every target, and a budget can be broken."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.targets.architectures import ARCHITECTURES, DRAM_LATENCY

ROOT = Path(__file__).parents[2]
Run = subprocess.CompletedProcess[str]
Row = dict[str, Any]
Toys = tuple[Run, dict[tuple[str, int], Row]]


def compiling(*arguments: str, **environment: str) -> Run:
    """Python with these arguments, without the interpreter that the tests run kernels in."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """What the command makes of `toys.py` on sm_80 and sm_90, and its rows by (name, target)."""
    file = tmp_path_factory.mktemp("targets") / "toys.json"
    command = "import sys; from kernels.targets.command import main; sys.exit(main(sys.argv[1:], 'tests.kernels.toys'))"
    done = compiling("-c", command, "--target", "80", "--target", "90", "--json", str(file))
    assert not done.stderr
    return done, {(row["name"], row["target"]): row for row in json.loads(file.read_text())}


@pytest.mark.slow
def test_every_kernel_keeps_its_budget_on_every_target(tmp_path: Path) -> None:
    done = compiling("-m", "kernels.targets", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout.split("\n\n")[-1] + done.stderr
    assert done.stdout.endswith("All budgets are kept.\n")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert not any(row["broken"] or row["spills"] for row in rows)
    targets_of: dict[str, set[int]] = {}
    for row in rows:
        targets_of.setdefault(row["kernel"], set()).add(row["target"])
    assert set(targets_of) == kernels_in_source()
    assert all(targets == set(ARCHITECTURES) for targets in targets_of.values())
    assert {row["mma"] for row in rows if row["kernel"].startswith("linear_gelu") and row["target"] == 90} == {"HGMMA"}
    assert all(row["estimate"] is not None for row in rows)
    lines = done.stdout.splitlines()
    for row in rows:
        assert sum(re.match(rf"  {re.escape(row['name'])} +{row['target']} ", line) is not None for line in lines) == 1


def kernels_in_source() -> set[str]:
    """The functions in kernels/ that are named as kernels are."""
    functions = [
        node
        for file in (ROOT / "kernels").glob("*.py")  # not its folders: they hold none
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    return {
        function.name
        for function in functions
        if function.name.endswith("_kernel") and any("jit" in ast.unparse(mark) for mark in function.decorator_list)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["copy", "copy, half the lanes", "loop", "twice over rows", "matmul", "allowed to be narrow"],
)
def test_a_kept_budget(toys: Toys, name: str) -> None:
    done, rows = toys
    assert [rows[name, target]["broken"] for target in (80, 90)] == [[], []]
    assert not [line for line in done.stdout.splitlines() if line.startswith((f"! {name} ", f"{name}, sm_"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("narrow", 80, "8 x LDG.E.U16, budget 128 bits"),
        ("narrow", 90, "8 x LDG.E.U16, budget 128 bits"),
        ("narrow on one target", 80, "8 x LDG.E.U16, budget 128 bits"),
        ("spills", 90, " instructions, budget 0; it takes "),
        ("too few warps", 90, "20 warps a multiprocessor, budget 64: blocks of 4 warps, 96 registers a thread"),
        ("two waves", 80, "8.00 waves, budget 1"),
        ("too large", 80, "bytes of shared memory a block, the target has 166912"),
        ("too large", 90, "bytes of shared memory a block, the target has 232448"),
        ("another tensor core", 80, "multiplies with HMMA, budget HGMMA"),
        ("crash", 90, "does not compile: the compiler crashed"),
        ("refused", 90, "does not compile: CompileTimeAssertionFailure: refused on purpose"),
    ],
)
def test_a_broken_budget(toys: Toys, name: str, target: int, expected: str) -> None:
    done, rows = toys
    assert any(expected in line for line in rows[name, target]["broken"])
    assert any(line.startswith(f"{name}, sm_{target}: ") and expected in line for line in done.stdout.splitlines())
    assert any(line.startswith(f"! {name} ") and f" {target} " in line for line in done.stdout.splitlines())
    assert done.returncode == 1


@pytest.mark.slow
def test_what_breaks_a_budget_is_said_with_its_line(toys: Toys) -> None:
    source = (ROOT / "tests/kernels/toys.py").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "tl.load(x_ptr + o, mask=o < n).to(tl.float32)" in text)
    assert toys[1]["narrow", 90]["broken"] == [f"x_ptr, toys.py:{line}: 8 x LDG.E.U16, budget 128 bits"]


@pytest.mark.slow
def test_an_exception_holds_on_its_target_alone(toys: Toys) -> None:
    _, rows = toys
    assert rows["narrow on one target", 80]["broken"]
    assert not rows["narrow on one target", 90]["broken"]
    assert rows["another tensor core", 90]["broken"] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_what_is_read(toys: Toys, target: int) -> None:
    _, rows = toys
    copied = rows["copy", target]
    assert copied["loads"] == {"128": 1, "32": 1}
    assert copied["stores"] == {"128": 1}
    assert (copied["warps"], copied["shared"], copied["spills"], copied["mma"]) == (4, 0, 0, "")
    assert 16 <= copied["registers"] <= 40
    assert rows["spills", target]["spills"] > 100
    assert rows["matmul", target]["mma"] == {80: "HMMA", 90: "HGMMA"}[target]
    assert rows["matmul", target]["shared"] >= 3 * 2 * 128 * 64 * 2  # stages of two tiles of bfloat16
    assert rows["loop", target]["waves"] < 1 < rows["two waves", target]["waves"]


ESTIMATES: dict[str, Callable[[Row], bool]] = {
    # 8 elements a thread: a 16-byte load and a store, whatever the compiler unrolls
    "loop": lambda e: e["instructions"]["lsu"] == 2 / 8,
    # the first loop loads, the second one loads and stores
    "twice over rows": lambda e: e["instructions"]["lsu"] == 3 / 8,
    # besides them: a scalar, and the thread's and the block's number
    "copy": lambda e: e["instructions"]["lsu"] == 5 / 8 and 0 < e["busy"]["issue"] < e["dram"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("target", [80, 90])
def test_estimate(toys: Toys, name: str, target: int) -> None:
    """Instructions are counted to the last one; all these kernels read 2 bytes an element and write 2."""
    estimate = toys[1][name, target]["estimate"]
    assert ESTIMATES[name](estimate)
    card = ARCHITECTURES[target]
    assert estimate["dram"] == pytest.approx(4 * card.multiprocessors * card.clock / card.bandwidth, rel=1e-4)


@pytest.mark.slow
def test_masked_lanes_cost_instructions(toys: Toys) -> None:
    whole, half = (toys[1][name, 90]["estimate"] for name in ("copy", "copy, half the lanes"))
    assert half["instructions"] == pytest.approx({pipe: 2 * count for pipe, count in whole["instructions"].items()})
    assert half["busy"]["issue"] == pytest.approx(2 * whole["busy"]["issue"])
    assert half["busy"]["lsu"] < 1.5 * whole["busy"]["lsu"]  # but they move nothing
    assert half["dram"] == whole["dram"]


@pytest.mark.slow
def test_bytes_in_flight(toys: Toys) -> None:
    row, card = toys[1]["loop", 90], ARCHITECTURES[90]
    needed = card.bandwidth * DRAM_LATENCY / card.multiprocessors
    one_load_a_thread = 16 * 32 * row["resident_warps"] / needed
    assert row["estimate"]["in_flight"] in [pytest.approx(n * one_load_a_thread) for n in (1, 2, 3, 4)]


@pytest.mark.slow
def test_estimate_of_a_product(toys: Toys) -> None:
    flops = 2 * 128 * 128 * 4096  # of a tile, by 4 warps
    on_80, on_90 = (toys[1]["matmul", target]["estimate"] for target in (80, 90))
    assert on_80["instructions"]["tensor"] == flops / 4 / (2 * 16 * 8 * 16)
    assert on_90["instructions"]["tensor"] == flops / (2 * 64 * 128 * 16)
    assert on_80["busy"]["tensor"] == flops / 2048
    assert on_90["busy"]["tensor"] == flops / 4096


@pytest.mark.slow
def test_one_target_and_one_kernel() -> None:
    done = compiling("-m", "kernels.targets", "--target", "89", "--kernel", "bias_gelu forward, tanh")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "bias_gelu" in line]
    assert len(rows) == 1
    assert " 89 " in rows[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target", "75"], "error: --target: got 75, expected one of 80, 86, 89, 90, 100, 120\n"),
        (["--target", "hopper"], "error: argument --target: invalid int value: 'hopper'\n"),
        (["--kernel", "flash"], "error: --kernel: got 'flash', expected part of a kernel's name, such as 'gelu'\n"),
        (["--json", "no/such/folder.json"], "error: --json: got no/such/folder.json, expected a file in a folder"),
        (["--fast"], "error: unrecognized arguments: --fast\n"),
    ],
)
def test_bad_arguments(arguments: list[str], expected: str) -> None:
    done = compiling("-m", "kernels.targets", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1


def test_under_the_interpreter() -> None:
    done = compiling("-m", "kernels.targets", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: TRITON_INTERPRET: got 1, expected it unset")
    assert done.stderr.count("\n") == 1
