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
from bench.variants import WORKLOADS, Setting, Variant, Workload
from model import GPTConfig
from tests.bench.made import h100
from train.data import Batch

CPU = torch.device("cpu")


SMALL = Workload("small", GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=1, n_embd=8, bias=False), 2)


class Alive:
    """A device that holds `room` steps at a time."""

    def __init__(self, room: int) -> None:
        self.steps: weakref.WeakSet = weakref.WeakSet()
        self.room, self.built = room, []

    def variant(self, name: str, **fields: bool) -> Variant:
        def build(setting: Setting) -> Callable[[Batch], torch.Tensor]:
            def step(batch: Batch) -> torch.Tensor:
                return torch.ones(())

            if len(self.steps) == self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.steps.add(step)
            self.built.append(name)
            return step

        return Variant(name, build, **fields)


@pytest.mark.parametrize("estimated", [False, True])
def test_what_does_not_fit_waits_for_the_next_group_and_the_reference_takes_part_in_all(monkeypatch, estimated) -> None:
    """estimated: there is memory for another step to be held, but none for the step of one of them."""
    monkeypatch.setattr(steps, "TURN", 0.0)
    alive = Alive(100 if estimated else 3)
    if estimated:
        monkeypatch.setattr(steps, "free_memory", lambda device: 0 if len(alive.steps) > 3 else 2**40)
    every = [alive.variant("reference eager"), *(alive.variant(f"ours {i}", compares=i > 0) for i in range(4))]
    rows = steps.measure(SMALL, every, CPU, torch.float32, seconds=0.0)
    assert [row.variant for row in rows] == [variant.name for variant in every]
    assert [row.skipped for row in rows] == [""] * 5
    assert alive.built.count("reference eager") == 2  # without dropout, and as it is timed: never again
    control, rung, *others = rows
    assert (control.first_round, len(control.seconds)) == (0, 2 * steps.LEAST)
    assert [row.first_round for row in (*others, rung)] == [0, 0, steps.LEAST, steps.LEAST]  # a rung comes last
    assert control.beside(others[0]) == control.seconds[: steps.LEAST]
    assert control.beside(rung) == control.seconds[steps.LEAST :]
    assert rung.beside(others[0]) == []


def test_what_does_not_fit_beside_the_reference_alone_is_left_out() -> None:
    alive = Alive(1)
    first, *others = steps.measure(
        SMALL,
        [alive.variant(name) for name in ("reference eager", "ours 1", "ours 2")],
        CPU,
        torch.float32,
        seconds=0.0,
    )
    assert first.seconds
    assert [row.skipped for row in others] == ["CUDA out of memory"] * 2


def row(variant: str, seconds: list[float], first_round: int = 0, turn: int = 1) -> Step:
    flops, shape = {"nanogpt": 1.0, "6n": 1.0}, WORKLOADS["gpt2"].shape
    return Step("gpt2", variant, True, "bfloat16", 1, flops, shape, seconds, turn, first_round)


def test_a_speed_up_is_over_the_reference_of_the_same_rounds() -> None:
    """In the second group the machine was half as fast."""
    control = row("reference compiled", [1.0] * 20 + [2.0] * 20, turn=2)
    rows = [control, row("ours eager", [0.5] * 10), row("ours compiled", [0.5] * 30, first_round=10, turn=3)]
    (found,) = Run(Path("a.json"), replace(h100(), steps=rows)).steps
    assert [found.speedup(row) for row in found.rows] == [1.0, 2.0, 4.0]
