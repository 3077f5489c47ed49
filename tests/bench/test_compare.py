"""Two commits of a device: equal ones compare as equal though the machine drifts, a step slowed by 5 % is found."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from bench import compare, report, results
from bench.compare import Rounds, Verdict, quiet_rounds, verdict
from bench.digest import Run
from bench.results import Commit, Results, Step
from tests.bench.made import cpu, h100
from train.errors import UserError

ROUNDS, TURN = 90, 6


def run(rng: np.random.Generator, slower: float = 0.0, busy: float = 0.15) -> Rounds:
    """A run with two references. Now and then all slows down by `busy` for a while, and there are spikes.

    slower: what ours alone takes more. All in logarithms.
    """
    states = busy * ((rng.integers(2) + np.cumsum(rng.random(ROUNDS) < 0.1)) % 2)

    def times(offset: float) -> np.ndarray:
        own = 0.02 * rng.standard_normal((ROUNDS, TURN))
        spikes = (rng.random((ROUNDS, TURN)) < 0.05) * rng.exponential(0.3, (ROUNDS, TURN))
        return offset + states[:, None] + own + spikes

    return Rounds(times(np.log(0.05) + slower), {"one": times(np.log(0.1)), "two": times(np.log(0.09))})


def told(a: Rounds, b: Rounds) -> Verdict:
    return verdict(*quiet_rounds([[a], [b]], within=0.1), rows=1)


def width(found: Verdict) -> float:
    return np.log(found.high / found.low)


def test_equal_runs_are_no_different_and_a_step_slowed_by_five_per_cent_is_found_and_its_inverse() -> None:
    """Of 40 pairs, 95 % are expected to be equal."""
    rng = np.random.default_rng(1)
    assert [told(run(rng), run(rng)).words for _ in range(40)].count("no difference") >= 37
    found = 0
    for _ in range(20):
        equal, other = run(rng), run(rng, np.log(1.05))
        slower, faster = told(equal, other), told(other, equal)
        found += slower.words.startswith("slower by ") and faster.words.startswith("faster by ")
        assert slower.low < 1.05 < slower.high
    assert found >= 18
    stopped = Rounds(equal.own[:-1], equal.references | {"two": equal.references["two"][:-2]})  # within a round
    assert told(equal, stopped) == told(equal, stopped)
    assert told(equal, stopped).words == "no difference"
    assert Verdict(0.969, 0.96, 0.978).words == "faster by 3.1 % (2.2–4.0)"


def test_intervals() -> None:
    rng = np.random.default_rng(12)
    alike = np.repeat(0.05 * rng.standard_normal(30), 10)  # rounds that resemble their neighbours
    shuffled = rng.permutation(alike)
    assert width(verdict([alike], [alike], rows=1)) > 1.5 * width(verdict([shuffled], [shuffled], rows=1))
    a, b = ([at + 0.02 * rng.standard_normal(12) for _ in range(4)] for at in (0.0, 0.02))  # several runs of a side
    many, one = verdict(a, b, rows=1), verdict(a[:1], b[:1], rows=1)
    assert many.ratio == pytest.approx(1.02, rel=0.01)
    assert width(many) < 0.6 * width(one)
    assert width(verdict(a, b, rows=20)) > 1.4 * width(many)  # 20 intervals that hold at once are wider
    few = 0.05 * rng.standard_normal((100, 2, compare.LEAST))
    assert [verdict([a], [b], rows=1).words for a, b in few].count("no difference") >= 90


def test_what_suffers_more_than_the_references_from_other_work_is_not_called_slower() -> None:
    """Ours take 30 % more while another is at work, the references 15: that was longer in the second run."""
    rng = np.random.default_rng(6)

    def shared(busy_rounds: int) -> Rounds:
        still = run(rng, busy=0.0)
        states = (np.arange(90) < busy_rounds)[:, None]
        return Rounds(still.own + 0.3 * states, {k: control + 0.15 * states for k, control in still.references.items()})

    assert told(shared(20), shared(70)).words == "no difference"


# Files


def compared(*runs: Results) -> str:
    return compare.report([Run(Path(f"{name}.json"), each) for name, each in zip("abcd", runs, strict=False)])


def slowed(results: Results, times: float, variant: str = "") -> Results:
    """Another commit's, some or all of its steps `times` slower."""
    steps = [
        replace(step, seconds=[times * s for s in step.seconds]) if variant in ("", step.variant) else step
        for step in results.steps
    ]
    return replace(results, steps=steps, commit=Commit("feedbeefcafe", clean=True))


def line_of(said: str, words: str) -> str:
    (line,) = (line for line in said.splitlines() if words in line)
    return line


def test_the_command_compares_equal_commits_and_one_slowed_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    equal = compared(h100(), h100(7))
    assert equal.count("no difference") == len([row for row in (*h100().steps, *h100().kernels) if row.ours])
    paths = [tmp_path / name for name in ("a\x1b[31m.json", "b\nc.json")]
    for path, made in zip(paths, (h100(), slowed(h100(7), 1.05, "ours compiled")), strict=True):
        results.write(path, made)
    assert report.main(["--compare", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert line_of(said, " slower by ").startswith("gpt2 ours compiled bfloat16")
    assert " faster by " not in said
    assert said.startswith(r"A: a\x1b[31m.json (H100 80GB HBM3, commit 0123456789ab, 2026-11-22)" "\n" r"B: b\nc.json")


def test_several_files_are_grouped_by_their_commits_and_what_one_side_lacks_is_said() -> None:
    new = [slowed(cpu(seed), 0.8, "ours compiled") for seed in (5, 6)]
    c, d = (replace(each, steps=[s for s in each.steps if s.variant != "ours eager"]) for each in new)
    said = compared(cpu(3), c, cpu(4), d)
    first, second = said.splitlines()[:2]
    assert ("a.json" in first, "c.json" in first, "b.json" in second, "d.json" in second) == (True,) * 4
    assert line_of(said, "faster").startswith("cpu ours compiled")
    assert " of 80 and 80 " in line_of(said, "faster")
    assert "Steps only in A: cpu ours eager bfloat16" in said


@pytest.mark.parametrize(("results", "words"), [(cpu(), "no difference"), (h100(), "slower by 1")])
def test_half_of_a_turn_counts_on_a_gpu_and_not_on_a_cpu(results: Results, words: str) -> None:
    """What else runs on a CPU can only add to a time."""
    steps, halves = [replace(step, turn=4) for step in results.steps], [1.3, 1.3, 1.0, 1.0] * 10
    slower = [
        replace(step, seconds=np.multiply(step.seconds, halves).tolist()) if step.variant == "ours compiled" else step
        for step in steps
    ]
    a, b = (replace(results, steps=each, kernels=[]) for each in (steps, slower))
    assert words in line_of(compared(a, b), " ours compiled bfloat16 ")


def test_rounds_of_another_group_and_references_of_another_workload_tell_nothing() -> None:
    """The second group's rounds were 4 % slower in A, for all that took part."""
    rng = np.random.default_rng(0)

    def step(variant: str, *stretches: float, first: int = 0) -> Step:
        seconds = [t for pace in stretches for t in (pace * (1 + 1e-3 * rng.standard_normal(30))).tolist()]
        return replace(h100().steps[0], variant=variant, seconds=seconds, host_seconds=[], first_round=first)

    def grouped(pace: float) -> Results:
        other = replace(step("reference eager", 1 / pace), workload="shakespeare_char")
        ours = step("ours eager", 0.5), step("ours compiled", 0.4 * pace, first=30)
        return replace(h100(), steps=[step("reference compiled", 1.0, pace), *ours, other], kernels=[])

    assert compared(grouped(1.04), grouped(1.0)).count("no difference") == 2


def test_references_of_other_software_tell_nothing_of_the_pace() -> None:
    """A new torch made all of it 5 % faster: so are ours, and the references do not take that out."""
    new = slowed(cpu(5), 1 / 1.05)
    said = compared(cpu(), replace(new, software=replace(new.software, torch="2.14.0")))
    assert "They differ in torch." in said
    assert said.count("faster by 4.") == 2
    assert compared(cpu(), new).count("no difference") == 2
    too_slow = compared(cpu(), slowed(cpu(5), 1.1))  # nobody knows what so much does to ours
    assert too_slow.count("too few quiet rounds, expected 8 in each run") == 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (
            (cpu(), replace(cpu(), device=replace(cpu().device, threads=4))),
            "got results of AMD EPYC 9B14, 2 threads and AMD EPYC 9B14, 4 threads, expected one device",
        ),
        ((cpu(), replace(cpu(), steps=[])), "got nothing of ours that both have measured"),
        (
            (cpu(), replace(cpu(), steps=[replace(s, shape=replace(s.shape, n_layer=6)) for s in cpu().steps])),
            "cpu is of another shape in each, expected one",
        ),
        ((cpu(),), "got 1 results file of 1 commit, expected two files, or files of two commits"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs: tuple[Results, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"compare: {message}"):
        compared(*runs)
