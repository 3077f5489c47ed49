"""Two commits of a device: equal ones compare as equal though the machine drifts, a step slowed by 5 % is found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import schema
from bench.report import command as report
from bench.report.compare import Row, Verdict, student, verdicts
from bench.schema import Commit, Results
from tests.bench.made import cpu, h100
from train.errors import UserError


def drifting(rng: np.random.Generator, count: int, drift: float, memory: float, offset: float = 0.0) -> list[float]:
    """Samples about 50 ms: each its own noise, spikes of what else runs, and an autoregressive drift of the machine."""
    noise, drifts, now = 0.03 * rng.standard_normal(count), np.zeros(count), drift * rng.standard_normal()
    for i in range(count):
        now = memory * now + np.sqrt(1 - memory**2) * drift * rng.standard_normal()
        drifts[i] = now
    spikes = (rng.random(count) < 0.05) * rng.exponential(0.3, count)
    return list(0.05 * np.exp(noise + drifts + spikes + offset))


def row(a: list[float], b: list[float], *, control: bool = False) -> Row:
    return Row(("step",), [a], [b], control)


@pytest.mark.parametrize(("drift", "memory"), [(0.0, 0.0), (0.02, 0.9)])
def test_two_runs_of_one_commit_are_no_different(drift: float, memory: float) -> None:
    """Of 40 pairs, 95 % are expected to be equal; samples that were taken for independent would say so of half."""
    rng = np.random.default_rng(1)
    pairs = [[drifting(rng, 160, drift, memory) for _ in range(2)] for _ in range(40)]
    told = [verdicts([row(a, b)])[0].words for a, b in pairs]
    assert told.count("no difference") >= 36


def test_a_long_table_of_equals_stays_one() -> None:
    rng = np.random.default_rng(2)
    rows = [row(drifting(rng, 60, 0.0, 0.0), drifting(rng, 60, 0.0, 0.0)) for _ in range(60)]
    assert {verdict.words for verdict in verdicts(rows)} == {"no difference"}


def test_a_step_slowed_by_five_per_cent_is_found_and_its_inverse() -> None:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(20):
        a, b = (drifting(rng, 400, 0.01, 0.9) for _ in range(2))
        slower, faster = (verdicts([row(x, y)])[0] for x, y in ((a, [1.05 * s for s in b]), ([1.05 * s for s in a], b)))
        found += slower.words.startswith("slower by ") and faster.words.startswith("faster by ")
        assert slower.low < 1.05 * 1.03
        assert slower.high > 1.05 * 0.97
    assert found >= 18


def test_a_machine_that_changed_pace_is_told_by_what_is_not_ours() -> None:
    """All of the second run is 4 % slower, the references too: no verdict on ours. Without them, there is one."""
    rng = np.random.default_rng(4)
    runs = [[drifting(rng, 400, 0.0, 0.0, offset) for offset in (0.0, 0.04)] for _ in range(3)]
    rows = [row(*runs[0], control=True), row(*runs[1], control=True), row(*runs[2])]
    assert [verdict.words for verdict in verdicts(rows)] == ["no difference"] * 3
    assert verdicts([row(*runs[2])])[0].words.startswith("slower")


def test_the_verdict_is_the_same_every_time_and_says_by_how_much() -> None:
    rng = np.random.default_rng(5)
    rows = [row(drifting(rng, 100, 0.0, 0.0), [0.9 * s for s in drifting(rng, 100, 0.0, 0.0)])]
    assert verdicts(rows) == verdicts(rows)
    assert Verdict(1.031, 1.022, 1.04).words == "slower by 3.1 % (2.2–4.0)"
    assert Verdict(0.969, 0.96, 0.978).words == "faster by 3.1 % (2.2–4.0)"
    assert Verdict(0.99, 0.97, 1.0).words == "no difference"


def test_a_few_samples_get_no_verdict() -> None:
    rng = np.random.default_rng(6)
    few, many = drifting(rng, 4, 0, 0), drifting(rng, 40, 0, 0)
    assert verdicts([row(few, many), row(many, many)])[0] is None
    assert verdicts([row([0.05] * 5, [0.05] * 5)])[0].words == "no difference"
    assert verdicts([row([0.05] * 5, [0.06] * 5)])[0].words.startswith("slower by 20.0 %")


@pytest.mark.parametrize(
    ("quantile", "freedom", "value"), [(0.975, 9, 2.262), (0.975, 1e9, 1.960), (0.9995, 9, 4.781), (0.975, 4, 2.776)]
)
def test_student(quantile: float, freedom: float, value: float) -> None:
    """A table's values."""
    assert student(quantile, freedom) == pytest.approx(value, rel=0.02)


# The command


def compared(folder: Path, capsys: pytest.CaptureFixture, **runs: Results) -> str:
    for name, results in runs.items():
        schema.write(folder / f"{name}.json", results)
    assert report.main(["--compare", *(str(folder / f"{name}.json") for name in runs)]) == 0
    return capsys.readouterr().out


def slowed(results: Results, variant: str, times: float) -> Results:
    steps = [
        replace(step, seconds=[times * s for s in step.seconds]) if step.variant == variant else step
        for step in results.steps
    ]
    return replace(results, steps=steps, commit=Commit("feedbeefcafe", clean=True))


def test_equal_commits_and_one_slowed_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    equal = compared(tmp_path, capsys, a=h100(), b=h100(7))
    assert "faster" not in equal
    assert "slower" not in equal
    assert equal.count("no difference") == len(h100().steps) + len(h100().kernels)
    said = compared(tmp_path, capsys, a=h100(), b=slowed(h100(7), "ours compiled", 1.05))
    lines = [line for line in said.splitlines() if "slower" in line or "faster" in line]
    assert [line.split("bfloat16")[0].strip() for line in lines] == [
        "gpt2 ours compiled",
        "shakespeare_char ours compiled",
    ]
    assert all(" slower by " in line for line in lines)
    assert said.startswith("A: a.json (H100 80GB HBM3, commit 0123456789ab, 2026-11-22)\nB: b.json")


def test_several_files_are_grouped_by_their_commits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    new = [slowed(cpu(seed), "ours compiled", 0.8) for seed in (5, 6)]
    said = compared(tmp_path, capsys, a=cpu(3), c=new[0], b=cpu(4), d=new[1])
    first, second = said.splitlines()[:2]
    assert ("a.json" in first, "b.json" in first, "c.json" in second, "d.json" in second) == (True,) * 4
    (line,) = (line for line in said.splitlines() if "faster" in line)
    assert line.startswith("cpu ours compiled")


def test_what_only_one_has_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fewer = replace(cpu(), steps=cpu().steps[:-1])
    said = compared(tmp_path, capsys, a=cpu(), b=fewer)
    assert "Steps only in A: cpu ours compiled bfloat16" in said


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (h100(), cpu(), "compare: got results of H100 80GB HBM3 and AMD EPYC 9B14, 2 threads, expected one device"),
        (
            cpu(),
            replace(cpu(), device=replace(cpu().device, threads=4)),
            "compare: got results of AMD EPYC 9B14, 2 threads and AMD EPYC 9B14, 4 threads, expected one device",
        ),
        (
            replace(h100(), steps=[s for s in h100().steps if s.workload == "gpt2"]),
            replace(h100(), steps=[s for s in h100().steps if s.workload != "gpt2"]),
            "compare: got gpt2 and shakespeare_char, expected a workload that both have measured",
        ),
        (
            cpu(),
            replace(cpu(), steps=[replace(s, shape={**s.shape, "n_layer": 6}) for s in cpu().steps]),
            "compare: cpu is of another shape or another number of tokens in each, expected one",
        ),
        (cpu(), None, "compare: got 1 results file of 1 commit, expected two files, or files of two commits"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, a: Results, b: Results | None, message: str) -> None:
    names = []
    for name, results in (("a", a), ("b", b)):
        if results:
            schema.write(tmp_path / f"{name}.json", results)
            names.append(str(tmp_path / f"{name}.json"))
    with pytest.raises(UserError) as raised:
        report.main(["--compare", *names])
    assert (str(raised.value), raised.value.status) == (message, 2)
