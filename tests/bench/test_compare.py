"""Two commits of a device: equal ones compare as equal though the machine drifts, a step slowed by 5 % is found."""

import re
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from bench import compare
from bench.compare import Rounds, Verdict, quiet_rounds, verdict
from bench.digest import Run
from bench.results import Commit, Results, Step
from tests.bench.made import cpu, h100
from train.errors import UserError

TURN = 6
EITHER = pytest.mark.parametrize(("within", "busy"), [(0.1, 0.15), (0.5, 0.03)])  # a CPU, a GPU


def run(
    rng: np.random.Generator, slower: float = 0.0, *, pace: float = 0.0, busy: float = 0.15, rounds: int = 90
) -> Rounds:
    """A run with two references. Now and then all slows down by `busy` for a while, and there are spikes.

    slower, pace: what ours alone, and everything, takes more. All in logarithms.
    """
    state, states = rng.random() < 0.5, np.zeros(rounds)
    for i in range(rounds):
        state ^= rng.random() < 0.1
        states[i] = busy * state

    def times(offset: float) -> np.ndarray:
        own = 0.02 * rng.standard_normal((rounds, TURN))
        spikes = (rng.random((rounds, TURN)) < 0.05) * rng.exponential(0.3, (rounds, TURN))
        return offset + pace + states[:, None] + own + spikes

    return Rounds(times(np.log(0.05) + slower), {"one": times(np.log(0.1)), "two": times(np.log(0.09))})


def told(a: list[Rounds] | Rounds, b: list[Rounds] | Rounds, within: float = 0.1, rows: int = 1) -> Verdict | None:
    a, b = ([side] if isinstance(side, Rounds) else side for side in (a, b))
    quiet = quiet_rounds(a + b, set(a[0].references), within)
    enough = min(map(len, quiet)) >= compare.LEAST
    return verdict(quiet[: len(a)], quiet[len(a) :], rows) if enough else None


def width(found: Verdict) -> float:
    return np.log(found.high / found.low)


@EITHER
def test_two_runs_of_one_commit_are_no_different(within: float, busy: float) -> None:
    """Of 40 pairs, 95 % are expected to be equal."""
    rng = np.random.default_rng(1)
    words = [told(run(rng, busy=busy), run(rng, busy=busy), within).words for _ in range(40)]
    assert words.count("no difference") >= 37


@EITHER
def test_a_step_slowed_by_five_per_cent_is_found_and_its_inverse(within: float, busy: float) -> None:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(20):
        equal, other = run(rng, busy=busy), run(rng, np.log(1.05), busy=busy)
        slower, faster = told(equal, other, within, rows=2), told(other, equal, within, rows=2)
        found += slower.words.startswith("slower by ") and faster.words.startswith("faster by ")
        assert slower.low < 1.05 < slower.high
    assert found >= 18


def test_a_long_table_of_equals_stays_one() -> None:
    rng = np.random.default_rng(2)
    pairs = [(run(rng, busy=0.03), run(rng, busy=0.03)) for _ in range(60)]
    assert {told(a, b, rows=60).words for a, b in pairs} == {"no difference"}
    assert width(told(*pairs[0], rows=60)) > 1.3 * width(told(*pairs[0]))


def test_rounds_that_resemble_their_neighbours_are_not_taken_for_independent() -> None:
    rng = np.random.default_rng(12)
    drift = np.repeat(0.05 * rng.standard_normal(30), 10)[:, None]
    alike, shuffled = Rounds(drift, {}), Rounds(rng.permutation(drift), {})
    assert width(told(alike, alike, 0.5)) > 1.5 * width(told(shuffled, shuffled, 0.5))


def test_a_machine_that_changed_pace_is_told_by_what_is_not_ours() -> None:
    """All of the second run is 4 % slower, the references too: no verdict on ours. Without them, there is one."""
    rng = np.random.default_rng(4)
    a, b = run(rng, busy=0.0), run(rng, pace=0.04, busy=0.0)
    assert told(a, b).words == "no difference"
    assert told(Rounds(a.own, {}), Rounds(b.own, {})).words.startswith("slower by 4.")
    assert told(a, run(rng, pace=0.1, busy=0.0)) is None  # nobody knows what so much does to ours


def test_what_suffers_more_than_the_references_from_other_work_is_not_called_slower() -> None:
    """Ours take 30 % more while another is at work, the references 15: that was longer in the second run."""
    rng = np.random.default_rng(6)

    def shared(busy_rounds: int) -> Rounds:
        still = run(rng, busy=0.0)
        states = (np.arange(90) < busy_rounds)[:, None]
        return Rounds(still.own + 0.3 * states, {k: control + 0.15 * states for k, control in still.references.items()})

    assert told(shared(20), shared(70)).words == "no difference"


def test_several_runs_of_a_side_count_together() -> None:
    rng = np.random.default_rng(10)
    a, b = ([run(rng, slower, busy=0.0, rounds=12) for _ in range(4)] for slower in (0.0, 0.02))
    many, one = told(a, b), told(a[0], b[0])
    assert many.ratio == pytest.approx(1.02, rel=0.01)
    assert width(many) < 0.6 * width(one)


def test_the_verdict_is_the_same_every_time_and_says_by_how_much() -> None:
    rng = np.random.default_rng(7)
    a, b = run(rng), run(rng)
    assert told(a, b) == told(a, b)
    assert told(a, Rounds(b.own[:-1], b.references)).words == "no difference"  # it was stopped within a round
    assert Verdict(1.031, 1.022, 1.04).words == "slower by 3.1 % (2.2–4.0)"
    assert Verdict(0.969, 0.96, 0.978).words == "faster by 3.1 % (2.2–4.0)"
    assert Verdict(0.99, 0.97, 1.0).words == "no difference"


def test_few_rounds_get_no_verdict_and_some_a_wide_one() -> None:
    rng = np.random.default_rng(14)
    assert told(run(rng, rounds=7), run(rng)) is None
    pairs = [[Rounds(0.05 * rng.standard_normal((8, 1)), {}) for _ in range(2)] for _ in range(100)]
    assert [told(a, b, 0.5).words for a, b in pairs].count("no difference") >= 90


# Files


def compared(**runs: Results) -> str:
    return compare.report([Run(Path(f"{name}.json"), results) for name, results in runs.items()])


def slowed(results: Results, times: float, variant: str = "") -> Results:
    """Another commit's, some or all of its steps `times` slower."""
    steps = [
        replace(step, seconds=[times * s for s in step.seconds]) if variant in ("", step.variant) else step
        for step in results.steps
    ]
    return replace(results, steps=steps, commit=Commit("feedbeefcafe", clean=True))


def interval(said: str) -> float:
    """How wide the interval of gpt2's compiled step is."""
    line = next(line for line in said.splitlines() if line.startswith("gpt2 ours compiled bfloat16"))
    low, high = re.search(r"(\d\.\d+)–(\d\.\d+)", line).groups()
    return float(high) - float(low)


def test_equal_commits_and_one_slowed_step() -> None:
    equal = compared(a=h100(), b=h100(7))
    ours = [*(s for s in h100().steps if s.ours), *(k for k in h100().kernels if k.variant == "fused")]
    assert equal.count("no difference") == len(ours)
    short = [replace(h, kernels=[], steps=[h.steps[1], h.steps[9]]) for h in (h100(), h100(7))]  # ours compiled alone
    assert interval(compared(a=short[0], b=short[1])) < 0.9 * interval(equal)  # of one row, not of many at once
    said = compared(a=h100(), b=slowed(h100(7), 1.05, "ours compiled"))
    lines = [line for line in said.splitlines() if "slower" in line or "faster" in line]
    names = [line.split("bfloat16")[0].strip() for line in lines]
    assert names == ["gpt2 ours compiled", "shakespeare_char ours compiled"]
    assert all(" slower by " in line for line in lines)
    assert said.startswith("A: a.json (H100 80GB HBM3, commit 0123456789ab, 2026-11-22)\nB: b.json")


def test_several_files_are_grouped_by_their_commits_and_what_one_side_lacks_is_said() -> None:
    new = [slowed(cpu(seed), 0.8, "ours compiled") for seed in (5, 6)]
    fewer = [replace(each, steps=[s for s in each.steps if s.variant != "ours eager"]) for each in new]
    said = compared(a=cpu(3), c=fewer[0], b=cpu(4), d=fewer[1])
    first, second = said.splitlines()[:2]
    assert ("a.json" in first, "b.json" in first, "c.json" in second, "d.json" in second) == (True,) * 4
    (line,) = (line for line in said.splitlines() if "faster" in line)
    assert line.startswith("cpu ours compiled")
    assert " of 80 and 80 " in line
    assert "Steps only in A: cpu ours eager bfloat16" in said


@pytest.mark.parametrize(("results", "words"), [(cpu(), "no difference"), (h100(), "slower by 1")])
def test_half_of_a_turn_counts_on_a_gpu_and_not_on_a_cpu(results: Results, words: str) -> None:
    """What else runs on a CPU can only add to a time."""
    steps = [replace(step, turn=4) for step in results.steps]
    half = [
        replace(step, seconds=[1.3 * x if i % 4 < 2 else x for i, x in enumerate(step.seconds)])
        if step.variant == "ours compiled"
        else step
        for step in steps
    ]
    a, b = (replace(results, steps=each, kernels=[]) for each in (steps, half))
    lines = [line for line in compared(a=a, b=b).splitlines() if " ours compiled bfloat16 " in line]
    assert lines
    assert all(words in line for line in lines)


def test_rounds_of_another_group_and_references_of_another_workload_tell_nothing() -> None:
    """The second group's rounds were 4 % slower in A, for all that took part."""
    rng = np.random.default_rng(0)

    def step(variant: str, *stretches: tuple[float, float], first: int = 0) -> Step:
        seconds = [t for at, pace in stretches for t in (at * pace * (1 + 1e-3 * rng.standard_normal(30))).tolist()]
        like = next(each for each in h100().steps if each.workload == "gpt2")
        return replace(like, variant=variant, compares=True, seconds=seconds, host_seconds=[], first_round=first)

    def grouped(pace: float) -> Results:
        other = replace(step("reference eager", (1.0, 1 / pace)), workload="shakespeare_char")
        found = [
            step("reference compiled", (1.0, 1.0), (1.0, pace)),
            step("ours eager", (0.5, 1.0)),
            step("ours compiled", (0.4, pace), first=30),
        ]
        return replace(h100(), steps=[*found, other], kernels=[])

    assert compared(a=grouped(1.04), b=grouped(1.0)).count("no difference") == 2


def test_references_of_other_software_tell_nothing_of_the_pace() -> None:
    """A new torch made all of it 5 % faster: so are ours, and the references do not take that out."""
    new = slowed(cpu(5), 1 / 1.05)
    said = compared(a=cpu(), b=replace(new, software=replace(new.software, torch="2.14.0")))
    assert "They differ in torch." in said
    assert said.count("faster by 4.") == 2
    assert compared(a=cpu(), b=new).count("no difference") == 2


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
        compared(**{f"run{i}": each for i, each in enumerate(runs)})


def test_names_of_files_do_nothing_to_a_terminal() -> None:
    said = compared(**{"a\x1b[31m": cpu(), "b\nc": cpu(5)})
    assert r"a\x1b[31m.json" in said
    assert r"b\nc.json" in said
    assert said.replace("\n", "").isprintable()
