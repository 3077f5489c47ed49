"""python -m bench: what one part loses, the others keep; what was measured is in the file, whatever happens."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

import bench.__main__ as command
from bench import results, steps
from bench.results import WRONG, Ceiling, Results
from bench.rules import NO_TIME, TimeBudget
from bench.variants import WORKLOADS, Variant, Workload, variants
from kernels.cases import CASES
from model import GPTConfig
from tests.bench.made import cpu, fake
from tests.clock import Clock
from train import hardware
from train.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, an empty one. No peak is measured."""
    monkeypatch.setattr(results, "peak_flops", lambda device, dtype: hardware.Peak(1.0, "made up"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new_run(**settings: Any) -> command.Bench:
    return command.Bench(command.BenchConfig(**settings), CPU, torch.float32)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`python -m bench` on a CPU, with these arguments."""
    monkeypatch.setattr(sys, "argv", ["bench", "--device=cpu", *arguments])
    return command.main()


@pytest.fixture
def run() -> command.Bench:
    """A run whose parts do next to nothing."""
    run = new_run()
    run.ceilings = lambda seconds: run.add(ceilings=[Ceiling("copy", "float32", [1e10])])
    run.tests = run.kernels = run.steps = lambda seconds: None
    return run


def measured(run: command.Bench, parts: tuple[str, ...] = command.PARTS) -> tuple[int, list[Results]]:
    """(exit status, what was written, one after the other)"""
    written = []
    run.write = lambda: written.append(run.results)
    return run.measure(parts), written


def test_the_file_is_written_after_every_part_and_complete_at_the_end(run: command.Bench) -> None:
    shares = []
    run.tests = run.kernels = run.steps = shares.append
    status, written = measured(run)
    assert status == 0
    assert [each.complete for each in written] == [False] * 4 + [True]
    assert written[0].ceiling("copy") == 1e10
    assert 0 < shares[0] < shares[1] < shares[2] <= 60 * 8.0  # of what is left
    run.steps = lambda seconds: run.add(steps=[replace(cpu().steps[-1], seconds=[], skipped=f"{WRONG}its losses")])
    status, written = measured(run)
    assert (status, written[-1].complete) == (1, False)  # a row that is wrong is a failure


@pytest.mark.parametrize(
    ("error", "status", "said", "others"),
    [
        (RuntimeError("\nthe driver has gone\nfar away"), 1, "the driver has gone", 1),
        (KeyboardInterrupt(), 130, "interrupted", 0),
    ],
)
def test_what_ends_a_part_is_recorded_and_what_was_measured_is_kept(
    run: command.Bench, error: BaseException, status: int, said: str, others: int
) -> None:
    """After an error the other parts go on, after Ctrl-C they do not."""

    def failing(seconds: float) -> None:
        raise error

    run.tests, seen = failing, []
    run.steps = seen.append
    ended, written = measured(run)
    assert (ended, len(seen), written[-1].complete) == (status, others, False)
    assert [(failure.part, failure.error) for failure in written[-1].failures] == [("tests", said)]
    assert written[-1].ceiling("copy") == 1e10


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--parts=ceilings,step", "parts: got 'step', expected some of: ceilings, tests, kernels, steps"),
        ("--workloads=gpt3", "workloads: got 'gpt3', expected some of: cpu, shakespeare_char, "),
        ("--nanogpt_dir=/nowhere", "nanogpt_dir: got '/nowhere', expected a nanoGPT checkout"),
        ("--out=results", "out: results cannot be written: it is a folder, expected a regular file"),
        ("--out=pipe", "out: pipe cannot be written: it is a device or a pipe"),
        ("--out=mine.json", "out: mine.json is there, and is no results file; name another file"),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    argument: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "results").mkdir()
    (here / "mine.json").write_text("weights")
    os.mkfifo(here / "pipe")
    monkeypatch.setattr(command.Bench, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError) as caught:
        call(monkeypatch, argument)
    assert message in str(caught.value)
    assert sorted(path.name for path in here.iterdir()) == ["mine.json", "pipe", "results"]
    assert (here / "mine.json").read_text() == "weights"


def test_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Few samples of eager steps, in a minute: how long a compilation takes is the machine's to say."""
    small = Workload("cpu", GPTConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=16, bias=False), 2)
    monkeypatch.setitem(WORKLOADS, "cpu", small)
    eager = [each for each in variants(CPU, torch.float32) if not each.compiled]
    monkeypatch.setattr(command, "variants", lambda *asked: eager)
    measure = steps.measure
    monkeypatch.setattr(steps, "measure", lambda *given, **options: measure(*given, **options | {"seconds": 0.0}))
    assert call(monkeypatch, "--parts=ceilings,steps", "--minutes=1", "--dtype", "float32", "--out", "a/b.json") == 0
    found = results.read(Path("a/b.json"))
    assert [row.variant for row in found.steps if row.seconds] == ["reference eager", "ours eager"]
    matmul, copy = found.ceilings
    assert len(matmul.rates) == len(copy.rates) == 3
    assert found.peak.flops == max(matmul.rates)  # the best that was seen, since no data sheet gives it
    assert found.ceiling("copy") == max(copy.rates) != found.peak.flops
    assert found.command == "python -m bench --minutes=1.0 --parts=ceilings,steps --device=cpu --dtype=float32"
    out, err = capsys.readouterr()
    assert out.endswith("written to a/b.json\n")
    assert [line.partition(" ")[0] for line in err.splitlines()] == ["ceilings", "steps"]  # no bar without a terminal


RUNGS = [f"rung {i}" for i in range(4)]


@pytest.mark.parametrize(("compiling", "skipped"), [(6.0, RUNGS[2:]), (20.0, [*RUNGS, "ours compiled"])])
def test_the_time_is_kept_by_leaving_out_rungs_first(
    compiling: float, skipped: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 90 seconds of the clock; a compilation takes `compiling` of them, a step half a second. Only the first
    compilation is begun without knowing how long it takes."""
    config = dataclasses.replace(WORKLOADS["cpu"].config, dropout=0.1)  # every variant is built, and compiled, twice
    for name in ("cpu", "other"):
        monkeypatch.setitem(WORKLOADS, name, dataclasses.replace(WORKLOADS["cpu"], name=name, config=config))

    def slow(name: str, build: float, **fields: bool) -> Variant:
        return fake(name, lambda call: clock.let_pass(0.5) or 1.0, lambda setting: clock.let_pass(build), **fields)

    compiled = ["reference compiled", *RUNGS, "ours compiled"]
    every = [slow(name, compiling, compiled=True, compares=name not in RUNGS) for name in compiled]
    every.insert(0, slow("reference eager", 1.0))
    monkeypatch.setattr(command, "variants", lambda *settings: every)
    status, written = measured(new_run(minutes=1.5, workloads="cpu"), ("steps",))
    rows = written[-1].steps
    assert (status, clock() <= 90.0) == (0, True)
    assert all(row.skipped or len(row.seconds) >= steps.LEAST * row.turn for row in rows)
    assert {row.variant: row.skipped for row in rows if not row.seconds} == dict.fromkeys(skipped, NO_TIME)
    _, written = measured(new_run(minutes=1.5, workloads="cpu,other"), ("steps",))
    assert {row.workload for row in written[-1].steps if row.seconds} == {"cpu", "other"}


def test_a_part_of_the_time_knows_how_long_tasks_took(clock: Clock) -> None:
    whole = TimeBudget(100.0)
    with whole.task("compiled"):
        clock.let_pass(30.0)
    part = whole.part(20.0)
    assert (part.left, part.fits("compiled"), whole.part(1000.0).left) == (20.0, False, 70.0)
    with part.task("compiled"):
        clock.let_pass(10.0)
    assert not whole.fits("compiled", more=31.0)  # the slowest counts, and 60 seconds are left


def test_gpu_tests_run_in_a_process_of_their_own(here: Path) -> None:
    marks = {"one": "", "two": "<skipped/>", "three": "<failure/>", "four": "<error/>"}
    cases = "".join(f'<testcase classname="a" name="{name}">{mark}</testcase>' for name, mark in marks.items())
    (here / "run.py").write_text(f"import sys; open(sys.argv[-1][11:], 'w').write('<testsuite>{cases}</testsuite>')")
    found = command.run_tests(60.0, (str(here / "run.py"),))
    assert (found.passed, found.failed, found.skipped, found.failures) == (1, 2, 1, ["a::three", "a::four"])
    with pytest.raises(RuntimeError, match=r"pytest ended with status 1: .*No module named nowhere"):
        command.run_tests(60.0, ("-m", "nowhere"))
    with pytest.raises(RuntimeError, match="did not end within 0 s"):
        command.run_tests(0.01, ("-c", "import time; time.sleep(60)"))


@pytest.mark.slow
def test_the_smoke_set_is_small_and_whole() -> None:
    """Few enough to end, yet every kernel, a step and a resume."""
    argv = [sys.executable, *command.SMOKE, "--collect-only", "-vv"]  # a line a test
    done = subprocess.run(argv, cwd=command.ROOT, capture_output=True, text=True, timeout=120)
    ids = [line for line in done.stdout.splitlines() if "<Function" in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(ids) < 40
    for name in [*(f"test_one_regime[{case.name}]" for case in CASES), "test_resume", "[one sequence-fused]"]:
        assert any(name in test for test in ids), name


def test_a_second_measurement_of_a_day_keeps_the_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [call(monkeypatch, "--parts=tests") for _ in range(2)] == [0, 0]
    first, second = sorted(path.stem for path in (here / "bench" / "results").iterdir())
    assert second == f"{first}-2"


@pytest.mark.parametrize("when", ["ceilings", "tests"])
def test_a_result_that_cannot_be_stored_is_printed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, when: str
) -> None:
    """The disk is full, or the folder is gone, after the first part or the last."""
    path = here / "folder" / "out.json"

    def part(run: command.Bench, name: str) -> None:
        run.add(ceilings=[*run.results.ceilings, Ceiling("copy", "float32", [1e10])])
        if name == when:
            path.unlink(missing_ok=True)
            path.mkdir()

    for name in ("ceilings", "tests"):
        monkeypatch.setattr(command.Bench, name, lambda run, seconds, name=name: part(run, name))
    assert call(monkeypatch, f"--out={path}", "--parts=ceilings,tests") == 1
    out, err = capsys.readouterr()
    assert f"out: {path} cannot be written: it is a folder" in err
    (here / "printed.json").write_text(out[out.index("{\n") :])
    assert len(results.read(here / "printed.json").ceilings) == 2
