"""python -m bench: what one part loses, the others keep; what was measured is in the file, whatever happens."""

import io
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as command
from bench import schema, steps, tests
from bench.budget import NO_TIME
from bench.clock import Clock
from bench.progress import Progress
from bench.schema import Ceiling, Peak, Results
from bench.variants import Setting, Variant
from bench.workloads import WORKLOADS, Workload
from model import GPTConfig
from train.data import Batch
from train.errors import UserError

CPU = torch.device("cpu")
PLAIN = Progress(60.0, io.StringIO())


def fail(seconds: float) -> None:
    raise RuntimeError("\nthe driver has gone\nfar away")


def interrupt(seconds: float) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def run() -> command.Bench:
    """A run whose parts do next to nothing."""
    run = command.Bench(command.BenchConfig(), CPU, torch.float32, PLAIN)
    run.ceilings = lambda seconds: run.add(ceilings=[Ceiling("copy", "float32", [1e10])])
    run.tests = run.kernels = run.steps = lambda seconds: None
    return run


def measured(run: command.Bench, parts: tuple[str, ...] = command.PARTS) -> tuple[int, list[Results]]:
    """(exit status, what was written, one after the other)"""
    written = []
    return command.measure(run, list(parts), written.append), written


def test_all_parts(run: command.Bench) -> None:
    status, written = measured(run)
    assert status == 0
    assert len(written) == len(command.PARTS) + 1
    assert written[0].ceiling("copy") == 1e10
    assert not written[-2].complete
    assert written[-1].complete
    assert written[-1].failures == []


def test_a_measured_peak_is_the_best_matmul_that_was_seen() -> None:
    run = command.Bench(command.BenchConfig(), CPU, torch.float32, PLAIN)
    run.add(peak=replace(run.results.peak, flops=1.0))
    run.ceilings(0.6)
    assert run.results.peak.flops == run.results.ceiling("matmul")
    run.add(peak=replace(run.results.peak, flops=1e18))
    run.ceilings(0.6)
    assert run.results.peak.flops == 1e18


def test_a_run_of_some_parts_is_complete_with_them(run: command.Bench) -> None:
    status, written = measured(run, ("ceilings",))
    assert status == 0
    assert [results.complete for results in written] == [False, True]


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(run: command.Bench) -> None:
    run.tests, seen = fail, []
    run.steps = seen.append
    status, written = measured(run)
    assert status == 1
    assert [(failure.part, failure.error) for failure in written[-1].failures] == [("tests", "the driver has gone")]
    assert len(seen) == 1
    assert not written[-1].complete


def test_an_interruption_keeps_what_was_measured(run: command.Bench) -> None:
    run.tests, seen = interrupt, []
    run.steps = seen.append
    status, written = measured(run)
    assert status == 130
    assert written[-1].ceiling("copy") == 1e10
    assert written[-1].failures[0].error == "interrupted"
    assert seen == []


def test_a_wrong_step_is_a_failure(run: command.Bench) -> None:
    row = schema.Step("cpu", "ours eager", True, "float32", 1, skipped=schema.WRONG + "its losses are off by 1")
    run.steps = lambda seconds: run.add(steps=[row])
    status, written = measured(run)
    assert status == 1
    assert not written[-1].complete


def test_each_part_has_its_share_of_the_time_that_is_left(run: command.Bench) -> None:
    shares = {}
    for part in ("tests", "kernels", "steps"):
        setattr(run, part, lambda seconds, part=part: shares.__setitem__(part, seconds))
    measured(run)
    whole = 60 * run.config.minutes
    assert 0 < shares["tests"] < shares["kernels"] < shares["steps"] <= whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts=ceilings,step"], "parts: got 'step', expected some of: ceilings, tests, kernels, steps"),
        (["--workloads=gpt3"], "workloads: got 'gpt3', expected some of: cpu, shakespeare_char, "),
        (["--minutes=0"], "minutes: got 0"),
        (["--device=tpu"], "device: got 'tpu'"),
        (["--nanogpt_dir=/nowhere"], "nanogpt_dir: got '/nowhere', expected a nanoGPT checkout"),
        (["results.json"], "'results.json': not a setting"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--device=cpu", *arguments])
    with pytest.raises(UserError) as caught:
        command.main()
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    small = Workload("cpu", GPTConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=16, bias=False), 2)
    monkeypatch.setitem(WORKLOADS, "cpu", small)
    monkeypatch.chdir(tmp_path)
    arguments = ["--parts=ceilings,steps", "--minutes=0.4", "--device=cpu", "--dtype=float32", "--out=a/b.json"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert command.main() == 0
    results = schema.read(Path("a/b.json"))
    names = ["reference eager", "reference compiled", "ours eager", "ours compiled"]
    assert [row.variant for row in results.steps] == names
    assert all(row.seconds or row.skipped == NO_TIME for row in results.steps)  # compiling counts
    assert results.steps[0].seconds
    assert [len(ceiling.rates) for ceiling in results.ceilings] == [3, 3]
    assert results.command == "python -m bench --parts=ceilings,steps --minutes=0.4 --device=cpu --dtype=float32"
    out, err = capsys.readouterr()
    assert all(name in out for name in names)
    assert out.endswith("written to a/b.json\n")
    assert err.splitlines()[0].startswith("ceilings (0.4 minutes left)")


def slow(clock: Clock, name: str, build: float, **fields: bool) -> Variant:
    """A variant that takes `build` seconds to make and half a second a step, by a clock that is told."""

    def make(setting: Setting):
        clock.let_pass(build)

        def step(batch: Batch) -> torch.Tensor:
            clock.let_pass(0.5)
            return torch.tensor(1.0)

        return step

    return Variant(name, make, **fields)


def rungs_and_ends(clock: Clock, compiling: float) -> list[Variant]:
    return [
        slow(clock, "reference eager", 1.0),
        slow(clock, "reference compiled", compiling, compiled=True),
        *(slow(clock, f"rung {i}", compiling, compiled=True, compares=False) for i in range(4)),
        slow(clock, "ours compiled", compiling, compiled=True),
    ]


@pytest.mark.parametrize(
    ("compiling", "skipped"),
    [
        (2.0, []),
        (6.0, ["rung 2", "rung 3"]),
        (12.0, ["rung 0", "rung 1", "rung 2", "rung 3"]),
        (20.0, ["rung 0", "rung 1", "rung 2", "rung 3", "ours compiled"]),
        (70.0, ["reference compiled", "rung 0", "rung 1", "rung 2", "rung 3", "ours compiled"]),
    ],
)
def test_the_time_is_kept_by_leaving_out_rungs_first(
    compiling: float, skipped: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first compilation is begun without knowing how long it takes."""
    monkeypatch.setattr(command, "peak_flops", lambda device, dtype: Peak(1.0, "made up"))
    monkeypatch.setattr(command, "variants", lambda *settings: rungs_and_ends(clock, compiling))
    config = replace(WORKLOADS["cpu"].config, dropout=0.1)  # every variant is built, and compiled, twice
    monkeypatch.setitem(WORKLOADS, "cpu", replace(WORKLOADS["cpu"], config=config))
    run = command.Bench(command.BenchConfig(minutes=1.5, workloads="cpu"), CPU, torch.float32, PLAIN)
    status, written = measured(run, ("steps",))
    assert status == 0
    rows = written[-1].steps
    assert {row.variant: row.skipped for row in rows if not row.seconds} == dict.fromkeys(skipped, NO_TIME)
    assert clock() <= 90.0
    assert all(row.skipped or len(row.seconds) >= steps.LEAST * row.turn for row in rows)


def test_two_workloads_share_the_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "peak_flops", lambda device, dtype: Peak(1.0, "made up"))
    monkeypatch.setattr(command, "variants", lambda *settings: rungs_and_ends(clock, 2.0))
    run = command.Bench(command.BenchConfig(minutes=1.5, workloads="cpu,gpt2-small"), CPU, torch.float32, PLAIN)
    monkeypatch.setitem(WORKLOADS, "gpt2-small", replace(WORKLOADS["cpu"], name="gpt2-small"))
    _, written = measured(run, ("steps",))
    timed = [(row.workload, row.variant) for row in written[-1].steps if row.seconds]
    assert {name for name, _ in timed} == {"cpu", "gpt2-small"}
    assert clock() <= 90.0


JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="one"/><testcase classname="a" name="two"><skipped/></testcase>
<testcase classname="a" name="three"><failure/></testcase><testcase classname="b" name="four"><error/></testcase>
</testsuite></testsuites>"""


def test_a_junit_report() -> None:
    found = tests.parse(JUNIT, "pytest", 2.5)
    assert (found.passed, found.failed, found.skipped, found.seconds) == (1, 2, 1, 2.5)
    assert found.failures == ["a::three", "b::four"]


def test_tests_in_a_process_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    found = tests.run(120.0, ("-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)))
    assert (found.passed, found.failed) == (1, 1)
    with pytest.raises(RuntimeError, match=r"pytest ended with status 1: .*No module named nowhere"):
        tests.run(60.0, ("-m", "nowhere"))
    with pytest.raises(RuntimeError, match="did not end within 0 s"):
        tests.run(0.01, ("-c", "import time; time.sleep(60)"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_moves_on_a_terminal_and_is_plain_elsewhere() -> None:
    lines = {}
    for kind in (io.StringIO, Terminal):
        stream = kind()
        progress = Progress(60.0, stream)
        progress.part("kernels", 30.0)
        progress.at("gelu 4x4 forward")
        progress.tell("a word")
        progress.end()
        lines[kind] = stream.getvalue()
    assert lines[io.StringIO] == "kernels (0.5 minutes left)\na word\n"
    assert "kernels: gelu 4x4 forward" in lines[Terminal]
    assert lines[Terminal].count(os.linesep) == 2
