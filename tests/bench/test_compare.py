"""Two commits of a device: equal ones compare as equal though the machine drifts, a step slowed by 5 % is found."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from bench import report
from bench.compare import Verdict, quiet_rounds, verdict
from bench.results import Commit, Results
from bench.tables import is_reference
from tests.bench.made import cpu, h100
from train.errors import UserError

ROUNDS, TURN = 90, 6  # two minutes'
EITHER = pytest.mark.parametrize(("within", "busy"), [(0.1, 0.15), (0.5, 0.03)])  # a CPU, a GPU


@dataclass
class Made:
    """One run: logarithms of seconds, (rounds, samples of a turn), of ours and of two references."""

    own: np.ndarray
    controls: list[np.ndarray]

    @property
    def alone(self) -> "Made":
        return Made(self.own, [])


def run(
    rng: np.random.Generator, slower: float = 0.0, *, pace: float = 0.0, busy: float = 0.15, rounds: int = ROUNDS
) -> Made:
    """Now and then all slows down by `busy` for a while, and there are spikes.

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

    return Made(times(np.log(0.05) + slower), [times(np.log(0.1)), times(np.log(0.09))])


def quiet(a: list[Made], b: list[Made], within: float = 0.1) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rounds = quiet_rounds([made.own for made in a + b], [made.controls for made in a + b], within)
    return rounds[: len(a)], rounds[len(a) :]


def told(a: Made, b: Made, within: float = 0.1, rows: int = 1) -> Verdict:
    return verdict(*quiet([a], [b], within), rows)


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


def test_on_a_busy_machine_medians_alone_would_be_wrong() -> None:
    rng = np.random.default_rng(1)
    pairs = [(run(rng), run(rng)) for _ in range(40)]
    assert sum(abs(np.log(told(a.alone, b.alone, 0.5).ratio)) > 0.02 for a, b in pairs) >= 20
    assert sum(abs(np.log(told(a, b).ratio)) > 0.02 for a, b in pairs) <= 2


def test_a_long_table_of_equals_stays_one() -> None:
    rng = np.random.default_rng(2)
    pairs = [(run(rng, busy=0.03), run(rng, busy=0.03)) for _ in range(60)]
    assert {told(a, b, rows=60).words for a, b in pairs} == {"no difference"}
    assert width(told(*pairs[0], rows=60)) > 1.3 * width(told(*pairs[0]))


def test_rounds_that_resemble_their_neighbours_are_not_taken_for_independent() -> None:
    rng = np.random.default_rng(12)
    drift = np.repeat(0.05 * rng.standard_normal(30), 10)[:, None]
    alike, shuffled = Made(drift, []), Made(rng.permutation(drift), [])
    assert width(told(alike, alike, 0.5)) > 1.5 * width(told(shuffled, shuffled, 0.5))


def test_what_else_runs_on_a_cpu_for_less_than_a_turn_does_not_count_and_on_a_gpu_it_does() -> None:
    rng = np.random.default_rng(13)
    a, b = run(rng, busy=0.0), run(rng, busy=0.0)
    b.own[:, : TURN // 2] += 0.2
    assert told(a, b, 0.1).words == "no difference"
    assert told(a, b, 0.5).words.startswith("slower by ")


def test_a_machine_that_changed_pace_is_told_by_what_is_not_ours() -> None:
    """All of the second run is 4 % slower, the references too: no verdict on ours. Without them, there is one."""
    rng = np.random.default_rng(4)
    a, b = run(rng, busy=0.0), run(rng, pace=0.04, busy=0.0)
    assert told(a, b).words == "no difference"
    assert told(a.alone, b.alone).words.startswith("slower by 4.")


def test_runs_that_were_never_as_quiet_as_each_other_get_no_verdict() -> None:
    """All of the second run is 10 % slower: nobody knows what that does to ours."""
    rng = np.random.default_rng(5)
    assert told(run(rng, busy=0.0), run(rng, pace=0.1, busy=0.0)) is None


def test_what_suffers_more_than_the_references_from_other_work_is_not_called_slower() -> None:
    """Ours take 30 % more while another is at work, the references 15: that was longer in the second run."""
    rng = np.random.default_rng(6)

    def shared(busy_rounds: int) -> Made:
        still = run(rng, busy=0.0)
        states = (np.arange(ROUNDS) < busy_rounds)[:, None]
        return Made(still.own + 0.3 * states, [control + 0.15 * states for control in still.controls])

    a, b = shared(20), shared(70)
    assert told(a, b).words == "no difference"
    assert [list(map(len, side)) for side in quiet([a], [b])] == [[70], [20]]


def test_several_runs_of_a_side_count_together() -> None:
    rng = np.random.default_rng(10)
    a, b = ([run(rng, slower, busy=0.0) for _ in range(4)] for slower in (0.0, 0.02))
    many, one = verdict(*quiet(a, b), 1), told(a[0], b[0])
    assert many.ratio == pytest.approx(1.02, rel=0.01)
    assert width(many) < 0.6 * width(one)


def test_the_verdict_is_the_same_every_time_and_says_by_how_much() -> None:
    rng = np.random.default_rng(7)
    a, b = run(rng), run(rng)
    assert told(a, b) == told(a, b)
    assert Verdict(1.031, 1.022, 1.04).words == "slower by 3.1 % (2.2–4.0)"
    assert Verdict(0.969, 0.96, 0.978).words == "faster by 3.1 % (2.2–4.0)"
    assert Verdict(0.99, 0.97, 1.0).words == "no difference"


def test_a_few_quiet_rounds_get_no_verdict() -> None:
    rng = np.random.default_rng(8)
    few, many = run(rng, rounds=7), run(rng)
    assert told(few, many) is None
    still = [Made(np.full((8, 1), np.log(seconds)), []) for seconds in (0.05, 0.06)]
    assert told(still[0], still[0], 0.5).words == "no difference"
    assert told(*still, 0.5).words.startswith("slower by 20.0 %")


def test_a_few_rounds_have_wider_intervals_than_the_normal_distribution_gives() -> None:
    """Student's t at 7 degrees of freedom, a table's value, over what is only the rounds' own error."""
    rng = np.random.default_rng(14)
    a, b = (Made(0.5 * rng.standard_normal((8, 1)), []) for _ in range(2))
    few = told(a, b, 0.5)
    many = told(*(Made(np.tile(made.own, (8, 1)), []) for made in (a, b)), 0.5)
    assert width(few) / width(many) > np.sqrt(8) * 1.05


def test_a_run_that_was_stopped_within_a_round_is_cut_to_whole_ones() -> None:
    rng = np.random.default_rng(9)
    whole = run(rng)
    longer = Made(np.concatenate([whole.own, whole.own[:1] + 5]), whole.controls)
    assert told(whole, longer, 0.5) == told(whole, whole, 0.5)


# The command


def compared(folder: Path, capsys: pytest.CaptureFixture, **runs: Results) -> str:
    for name, results in runs.items():
        results.write(folder / f"{name}.json", results)
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
    ours = [*(s for s in h100().steps if not is_reference(s)), *(k for k in h100().kernels if k.variant == "fused")]
    assert equal.count("no difference") == len(ours)
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
    assert " of 80 and 80 " in line


@pytest.mark.parametrize(("results", "words"), [(cpu(), "no difference"), (h100(), "slower by 1")])
def test_half_of_a_turn_counts_on_a_gpu_and_not_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture, results: Results, words: str
) -> None:
    steps = [replace(step, turn=4) for step in results.steps]
    half = [
        replace(step, seconds=[1.3 * x if i % 4 < 2 else x for i, x in enumerate(step.seconds)])
        if step.variant == "ours compiled"
        else step
        for step in steps
    ]
    a, b = (replace(results, steps=each, kernels=[]) for each in (steps, half))
    lines = compared(tmp_path, capsys, a=a, b=b).splitlines()
    assert all(words in line for line in lines if " ours compiled bfloat16 " in line)
    assert any(words in line for line in lines)


def test_what_only_one_has_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fewer = replace(cpu(), steps=cpu().steps[:-1])
    said = compared(tmp_path, capsys, a=cpu(), b=fewer)
    assert "Steps only in A: cpu ours compiled bfloat16" in said


def test_the_references_of_another_workload_tell_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    slow = [
        replace(step, seconds=[1.5 * s for s in step.seconds]) if step.workload == "shakespeare_char" else step
        for step in h100(7).steps
    ]
    said = compared(tmp_path, capsys, a=replace(h100(), kernels=[]), b=replace(h100(7), steps=slow, kernels=[]))
    assert said.count("too few quiet rounds, expected 8 in each run") == said.count("no difference") > 0


def test_references_of_other_software_tell_nothing_of_the_pace(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A new torch made all of it 5 % faster: so are ours, and the references do not take that out."""
    new = cpu(5)
    faster = [replace(step, seconds=[s / 1.05 for s in step.seconds]) for step in new.steps]
    renewed = replace(new, steps=faster, software=replace(new.software, torch="2.14.0"))
    said = compared(tmp_path, capsys, a=cpu(), b=renewed)
    assert "They differ in torch." in said
    assert said.count("faster by 4.") == 2
    said = compared(tmp_path, capsys, a=cpu(), b=replace(renewed, software=new.software))
    assert "They differ" not in said
    assert said.count("no difference") == 2


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
            replace(h100(), steps=[s for s in h100().steps if s.workload != "gpt2"], kernels=[]),
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
            results.write(tmp_path / f"{name}.json", results)
            names.append(str(tmp_path / f"{name}.json"))
    with pytest.raises(UserError) as raised:
        report.main(["--compare", *names])
    assert (str(raised.value), raised.value.status) == (message, 2)
