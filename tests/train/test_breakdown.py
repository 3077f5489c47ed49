"""The table of a profile: times that add up, floors in their rows, names that nobody knows."""

from collections import Counter

import pytest

from model.config import GPTConfig
from model.work import MATMULS, step_work
from train.breakdown import Bounds, Row, breakdown, report
from train.ceilings import Ceilings
from train.kernel_names import COMPILED, COPIES, ELEMENTWISE, GELU_BACKWARD, GELU_FORWARD, IDLE, OTHER
from train.timeline import Timeline

GPT2 = GPTConfig(vocab_size=50304, bias=False)
SETTINGS = dict(accumulation=2, compute=2, stream=4, gradients=4)
CEILINGS = Ceilings(flops=800e12, bandwidth=3e12)
BOUNDS = Bounds(CEILINGS, GPT2, 4, **SETTINGS)
WORK, FUSED = (step_work(GPT2, 4, **SETTINGS, fused_gelu=fused) for fused in (False, True))
OWN = (
    "attention forward",
    "attention backward",
    "LayerNorm forward",
    "LayerNorm backward",
    "cross-entropy",
    "optimizer",
)
PARTS = [part for part in WORK]
EVERY_ROW = ("matmuls", *OWN, "GELU forward", "GELU backward", "embeddings", ELEMENTWISE, COPIES)


def seconds(*parts: str) -> float:
    return sum(BOUNDS.seconds(WORK[part]) for part in parts)


def timeline(*rows: str, idle: float = 0) -> Timeline:
    """Ten milliseconds of each row, in one operation."""
    times = Counter(dict.fromkeys(rows, 10_000.0)) + Counter({IDLE: idle})
    return Timeline(times.total(), times, Counter({(row, f"{row}'s"): 10_000.0 for row in rows}))


def test_times_are_a_steps_and_add_up() -> None:
    rows = breakdown(timeline("matmuls", "optimizer", IDLE), 5, BOUNDS)
    assert [row.name for row in rows if row.seconds] == ["matmuls", "optimizer", IDLE]
    assert {row.seconds for row in rows if row.seconds} == {2e-3}
    assert sum(row.seconds for row in rows) == pytest.approx(6e-3)


def test_floors_stand_in_the_rows_that_do_their_work() -> None:
    floors = {row.name: row.floor for row in breakdown(timeline(*EVERY_ROW, OTHER, "communication"), 5, BOUNDS)}
    assert floors.pop("matmuls") == pytest.approx(seconds(*MATMULS))
    assert floors.pop("embeddings") == pytest.approx(seconds("embedding forward", "embedding backward"))
    assert floors.pop(ELEMENTWISE) == pytest.approx(seconds("accumulation"))
    assert floors.pop(COPIES) == pytest.approx(seconds("clearing"))
    assert floors.pop(OTHER) == floors.pop("communication") == 0
    assert floors == {part: pytest.approx(seconds(part)) for part in (*OWN, "GELU forward", "GELU backward")}


@pytest.mark.parametrize(
    ("seen", "elsewhere"), [(EVERY_ROW, ""), (("matmuls", COMPILED), COMPILED), (("matmuls",), OTHER)]
)
def test_no_floor_is_lost_where_a_row_was_not_seen(seen: tuple[str, ...], elsewhere: str) -> None:
    rows = breakdown(timeline(*seen), 1, BOUNDS)
    assert sum(row.floor for row in rows) == pytest.approx(seconds(*PARTS))
    if elsewhere:
        floors = {row.name: row.floor for row in rows}
        assert floors[elsewhere] == pytest.approx(seconds(*PARTS) - seconds(*MATMULS))


def test_gelu_in_the_epilogue_of_its_matmul() -> None:
    """The kernel's floor is its product's, or that of the bytes of both; the other two products stay with the rest."""
    seen = [row for row in EVERY_ROW if not row.startswith("GELU")]
    floors = {row.name: row.floor for row in breakdown(timeline(*seen, GELU_FORWARD, GELU_BACKWARD), 1, BOUNDS)}
    up, down = seconds("mlp up"), seconds("mlp down")
    assert floors[GELU_FORWARD] == pytest.approx(
        max(up / 3, (WORK["mlp up"].bytes / 3 + FUSED["GELU forward"].bytes) / 3e12)
    )
    assert floors[GELU_BACKWARD] == pytest.approx(down / 3)
    assert floors["matmuls"] == pytest.approx(seconds(*MATMULS) - up / 3 - down / 3)
    assert "GELU forward" not in floors
    assert OTHER not in floors


def test_the_report() -> None:
    rows = {"matmuls": 30_000.0, OTHER: 5_000.0, IDLE: 15_000.0}
    names = {("matmuls", "nvjet"): 30_000.0, (OTHER, "mystery"): 4_000.0, (OTHER, "x" * 100): 1_000.0}
    text = report(Timeline(50_000, Counter(rows), Counter(names)), 5, BOUNDS, host=2e-4)
    heading, _, *lines = text.splitlines()
    assert heading == (
        "profile: 5 steps of 10.000 ms; floors are for 800 TFLOP/s in a matmul, 3000 GB/s in a copy, as measured"
    )
    matmuls, total = 1e3 * seconds(*MATMULS), 1e3 * seconds(*PARTS)
    assert [line.split() for line in lines[:4]] == [
        ["matmuls", "6.000", "60.0%", f"{matmuls:.3f}", f"{matmuls / 6:.0%}"],
        ["other", "1.000", "10.0%", f"{total - matmuls:.3f}", f"{total - matmuls:.0%}"],
        ["idle", "3.000", "30.0%"],
        ["total", "10.000", "100.0%", f"{total:.3f}", f"{total / 10:.0%}"],
    ]
    assert lines[4] == "other: mystery 0.800 ms, " + "x" * 60 + " 0.200 ms"
    assert lines[5:] == ["host: 0.20 ms a step, 2.0% of it"]


def test_rows_that_must_take_time_but_took_none() -> None:
    assert Row(OTHER, 0.0, pytest.approx(seconds(*PARTS))) in breakdown(timeline(IDLE), 1, BOUNDS)
    assert "host" not in report(timeline(IDLE), 1, BOUNDS, host=None)
