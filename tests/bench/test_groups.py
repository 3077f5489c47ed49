"""Variants in groups that fit into memory: the reference in each, and nothing compared across them."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from bench import steps
from bench.digest import Run
from bench.results import Step
from bench.variants import WORKLOADS, Footprint, Setting, Variant, Workload, footprint, groups, ours, reference
from kernels import FUSED, REFERENCE
from model import GPTConfig
from tests.bench.made import h100
from train.data import Batch

CPU = torch.device("cpu")


def named(name: str, **fields: bool) -> Variant:
    return Variant(name, lambda setting: lambda batch: torch.ones(()), **fields)


REFERENCES = [named("reference eager"), named("reference compiled", compiled=True)]
OURS = [named("eager", ours=True), named("rung", ours=True, compares=False), named("graphed", ours=True, graphed=True)]


def names(plan: list[list[Variant]]) -> list[list[str]]:
    return [[variant.name for variant in group] for group in plan]


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (None, [["eager", "rung", "graphed"]]),
        (88, [["eager", "rung", "graphed"]]),
        (87, [["eager", "graphed"], ["rung"]]),
        (85, [["eager", "rung"], ["graphed"]]),
    ],
)
def test_as_many_as_fit_and_the_references_with_each(room: int | None, expected: list[list[str]]) -> None:
    """Each holds 2, the graphed one 50 for good; in its turn the eager reference takes 30 more, others 10."""

    def size(variant: Variant) -> Footprint:
        if variant.graphed:
            return Footprint(50, 0)
        return Footprint(2, 30 if variant.name == "reference eager" else 10)

    both = ["reference eager", "reference compiled"]
    assert names(groups([*REFERENCES, *OURS], size, room)) == [both + group for group in expected]


def test_where_not_all_references_fit_the_last_one_stays() -> None:
    plan = groups([*REFERENCES, *OURS], lambda variant: Footprint(25, 10), 70)
    assert names(plan) == [["reference compiled", other] for other in ("reference eager", "eager", "graphed", "rung")]
    assert names(groups([*REFERENCES, OURS[0]], lambda variant: Footprint(25, 10), 1)) == [
        ["reference compiled", "reference eager"],
        ["reference compiled", "eager"],
    ]  # too small by the estimate; whether it runs is seen then


def test_gpt2_does_not_fit_an_h100_at_once() -> None:
    setting = Setting(WORKLOADS["gpt2"], {}, CPU, torch.bfloat16)
    every = [
        *(reference(compile=compile, float32=False) for compile in (False, True)),
        ours("ours eager", ops=FUSED),
        ours("ours graphed", ops=FUSED, graphed=True),
        *(ours(f"rung {i}", ops=REFERENCE, compile=True, compares=False) for i in range(6)),
        ours("ours compiled", ops=FUSED, compile=True),
        ours("ours compiled + graphed", ops=FUSED, compile=True, graphed=True),
    ]
    sizes = {variant.name: footprint(variant, setting) for variant in every}
    state = 16 * 124e6
    assert sizes["reference eager"].held == pytest.approx(state, rel=0.01)
    assert sizes["reference eager"].beside > 25e9
    assert sizes["ours graphed"] == (sum(sizes["ours eager"]), 0)
    plan = groups(every, lambda variant: sizes[variant.name], int(0.9 * 84.5e9))
    assert len(plan) == 2
    assert all(group[:2] == every[:2] for group in plan)
    assert sorted(v.name for group in plan for v in group[2:]) == sorted(v.name for v in every[2:])


# Measured in groups

SMALL = Workload("small", GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=1, n_embd=8, bias=False), 2)


class Alive:
    """How many steps there are, and the most there were."""

    def __init__(self) -> None:
        self.steps: weakref.WeakSet = weakref.WeakSet()
        self.most, self.built = 0, []

    def variant(self, name: str, **fields: bool) -> Variant:
        def build(setting: Setting) -> Callable[[Batch], torch.Tensor]:
            def step(batch: Batch) -> torch.Tensor:
                return torch.ones(())

            self.steps.add(step)
            self.built.append(name)
            self.most = max(self.most, len(self.steps))
            return step

        return Variant(name, build, **fields)


def test_a_group_is_given_up_before_the_next_and_the_reference_takes_part_in_all(monkeypatch) -> None:
    monkeypatch.setattr(steps, "TURN", 0.0)
    alive = Alive()
    every = [alive.variant("reference eager"), *(alive.variant(f"ours {i}", ours=True) for i in range(4))]
    sizes = {"footprint": lambda variant, setting: Footprint(10, 5), "room": 35}
    rows = steps.measure(SMALL, every, CPU, torch.float32, seconds=0.0, **sizes)
    assert [row.variant for row in rows] == [variant.name for variant in every]
    assert alive.most == 3
    assert alive.built.count("reference eager") == 2  # without dropout, and as it is timed: never again
    control, *others = rows
    assert (control.first_round, len(control.seconds)) == (0, 2 * steps.LEAST)
    assert [row.first_round for row in others] == [0, 0, steps.LEAST, steps.LEAST]
    assert control.beside(others[0]) == control.seconds[: steps.LEAST]
    assert control.beside(others[3]) == control.seconds[steps.LEAST :]
    assert others[3].beside(others[0]) == []


def row(variant: str, seconds: list[float], first_round: int = 0, turn: int = 1) -> Step:
    flops, shape = {"nanogpt": 1.0, "6n": 1.0}, WORKLOADS["gpt2"].shape
    return Step("gpt2", variant, True, "bfloat16", 1, flops, shape, seconds, turn, first_round)


def test_a_speed_up_is_over_the_reference_of_the_same_rounds() -> None:
    """In the second group the machine was half as fast."""
    control = row("reference compiled", [1.0] * 20 + [2.0] * 20, turn=2)
    rows = [control, row("ours eager", [0.5] * 10), row("ours compiled", [0.5] * 30, first_round=10, turn=3)]
    (found,) = Run(Path("a.json"), replace(h100(), steps=rows)).steps
    assert [found.speedup(row) for row in found.rows] == [1.0, 2.0, 4.0]
