"""Timing of steps: nothing is timed that trains another model, nothing that was measured is lost."""

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import rules, steps
from bench.results import Step
from bench.variants import Setting, Variant, Workload, nanogpt, ours, reference, variants
from kernels import FUSED
from kernels.launch import INTERPRETED
from model import GPTConfig
from tests.bench.made import fake
from tests.clock import Clock
from tests.train.test_golden import TRACES, golden_batch, golden_model, recorded, relative

CPU = torch.device("cpu")
SMALL = Workload("small", GPTConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=16, bias=True), 2, 2)
TINY = Workload("tiny", GPTConfig(block_size=4, vocab_size=17, n_layer=1, n_head=2, n_embd=16), 1)
DROPOUT = replace(SMALL, config=replace(SMALL.config, dropout=0.2))
EAGER = reference(compile=False, float32=True)
CHECKOUT = """
from dataclasses import make_dataclass
import model

GPTConfig = make_dataclass("GPTConfig", "block_size vocab_size n_layer n_head n_embd dropout bias".split())

class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(model.GPTConfig(**vars(config)))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("a line that nobody wants to see")
        return super().configure_optimizers(weight_decay, FAULT * learning_rate, betas, device_type)
"""


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TURN", 0.0)


def checkout(folder: Path, fault: float = 1.0) -> str:
    """A stand-in for nanoGPT's: its interface over our own model. fault: multiplies its learning rate."""
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(CHECKOUT.replace("FAULT", str(fault)))
    return str(folder)


def measure(*variants: Variant, workload: Workload = SMALL, dtype: torch.dtype = torch.float32) -> list[Step]:
    return steps.measure(workload, list(variants), CPU, dtype, seconds=0.0)


def test_every_variant_is_checked_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    theirs = nanogpt(checkout(tmp_path), compile=False, float32=True)
    wrong = nanogpt(checkout(tmp_path / "wrong", fault=3.0), compile=False, float32=True)
    *rows, faulty = measure(theirs, EAGER, ours("ours eager"), ours("a rung", compares=False), wrong)
    assert [row.variant for row in rows] == ["nanoGPT eager", "reference eager", "ours eager", "a rung"]
    assert [row.compares for row in rows] == [True, True, True, False]
    for row in rows:
        assert row.skipped == ""
        assert row.losses == pytest.approx(rows[0].losses, rel=1e-5)
        assert len(row.losses) == steps.CHECKED
        assert len(row.seconds) == steps.LEAST * row.turn
        assert min(row.seconds) > 0
        assert (row.workload, row.dtype, row.tokens) == ("small", "float32", 2 * 2 * 8)
        assert row.flops["nanogpt"] > row.flops["6n"] > 0
        assert row.shape.accumulation == 2
    assert faulty.skipped.startswith("wrong: its losses are off by ")  # it trains at another rate
    assert capsys.readouterr().out == ""
    autocast = reference(compile=False, float32=False)
    lower = measure(EAGER, autocast, ours("ours eager"), dtype=torch.bfloat16)  # may differ by what it costs
    assert [row.dtype for row in lower] == ["float32", "bfloat16", "bfloat16"]
    assert all(row.seconds for row in lower)
    assert lower[0].losses not in (lower[1].losses, lower[2].losses)


def test_the_first_iteration_after_another_variant_had_its_turn_is_not_counted(monkeypatch, clock: Clock) -> None:
    """It takes as long as thirty of the others here."""
    monkeypatch.setattr(steps, "TURN", 0.25)
    last = ""

    def nap(name: str, call: int) -> float:
        nonlocal last
        clock.let_pass(0.005 if last == name else 0.15)
        last = name
        return 1.0

    for row in measure(*(fake(name, partial(nap, name)) for name in ("one", "two"))):
        assert row.turn > 1
        assert row.seconds == pytest.approx([0.005] * len(row.seconds))


def unbuilt(setting: Setting) -> None:
    raise RuntimeError("\nno such kernel\non this device")


def out_of_memory(call: int) -> float:
    if call > 5:  # under the clock
        raise torch.OutOfMemoryError("CUDA out of memory")
    return 1.0


def test_what_is_wrong_is_not_timed_and_the_others_are() -> None:
    wrong = {
        "wrong: its losses are off by 1.0e-03, expected 1e-04": fake("another", lambda call: 1.001),
        "wrong: its losses are off by nan": fake("overflows", lambda call: float("nan") if call == 3 else 1.0),
        "no such kernel": fake("unbuilt", built=unbuilt),
        "CUDA out of memory": fake("fails", out_of_memory),
    }
    first, *others, last = measure(fake("reference"), *wrong.values(), fake("ours"))
    for row, skipped in zip(others, wrong, strict=True):
        assert row.skipped.startswith(skipped)
        assert row.seconds == []
    assert first.seconds
    assert last.seconds


def test_dropout_is_off_where_losses_are_compared_and_on_where_they_are_timed() -> None:
    seen = []
    measure(fake("watched", built=lambda setting: seen.append(setting.workload.config.dropout)), workload=DROPOUT)
    assert seen == [0.0, 0.2]


def test_an_interruption_keeps_what_was_measured() -> None:
    def interrupt(call: int) -> float:
        if call == 20:  # some turns later
            raise KeyboardInterrupt
        return 1.0

    rows = []
    with pytest.raises(KeyboardInterrupt):
        steps.measure(SMALL, [fake("one"), fake("two", interrupt)], CPU, torch.float32, seconds=1e3, into=rows)
    assert [bool(row.seconds) for row in rows] == [True, True]


def test_the_reference_in_this_tree_trains_as_nanogpt_does() -> None:
    """Held to a trace that nanoGPT computed."""
    case = TRACES["accumulate_4"]
    workload = Workload("", GPTConfig(**case["config"]), case["batch_size"], case["gradient_accumulation_steps"])
    given = {key: case[key] for key in ("learning_rate", "weight_decay", "grad_clip")} | {"betas": tuple(case["betas"])}
    step = EAGER.build(Setting(workload, golden_model(case).state_dict(), CPU, torch.float32, **given))
    losses = torch.stack([step(golden_batch(case, i)) for i in range(len(case["loss"]))]).double()
    assert relative(losses, recorded(case).loss) < 2e-5


@pytest.mark.skipif("NANOGPT_DIR" not in os.environ, reason="NANOGPT_DIR names no nanoGPT checkout")
def test_a_checkout_of_nanogpt_gives_the_same_losses() -> None:
    first, second = measure(nanogpt(os.environ["NANOGPT_DIR"], compile=False, float32=True), EAGER)
    assert second.losses == pytest.approx(first.losses, rel=1e-6)


def test_the_variants_begin_with_the_reference_and_end_with_ours(tmp_path: Path) -> None:
    every = variants(CPU, torch.bfloat16, checkout(tmp_path))
    modes = [f"{of} {mode}" for mode in ("eager", "compiled") for of in ("nanoGPT", "reference")]
    autocast = [mode.replace(" ", " autocast ") for mode in modes]
    assert [variant.name for variant in every] == [*modes, *autocast, "ours eager", "ours compiled"]
    assert [variant.name for variant in every if not variant.compares] == autocast
    assert [variant.name for variant in every if variant.float32] == modes
    assert not any("autocast" in variant.name for variant in variants(CPU, torch.float32))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """The variants of a GPU."""
    monkeypatch.setattr("bench.variants.select", lambda name, device: FUSED)
    return variants(torch.device("cuda"), torch.bfloat16)


def test_a_gpu_has_rungs_between_the_reference_and_ours(on_a_gpu: list[Variant]) -> None:
    rungs = ["flat state, no casts", "attention", "LayerNorm", "cross-entropy", "GELU", "embedding"]
    first, last = ["reference eager", "reference compiled"], ["ours compiled", "ours compiled + graphed"]
    assert [variant.name for variant in on_a_gpu] == [*first, "ours eager", "ours graphed", *rungs, *last]
    assert [variant.name for variant in on_a_gpu if not variant.compares] == rungs


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="fused kernels run on a CPU only in Triton's interpreter")
def test_every_variant_of_a_gpu_trains_as_the_reference_does(
    on_a_gpu: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those in graphs: tests/rehearsal captures them."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="eager"))
    monkeypatch.setattr(steps, "LEAST", 1)
    rows = measure(*(each for each in on_a_gpu if "graphed" not in each.name), workload=TINY, dtype=torch.bfloat16)
    assert {row.variant: row.skipped for row in rows if row.skipped} == {}


# What is called compiled


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each graph that Inductor would be given, whether it is for one shape alone."""
    found = []

    def compiler(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        found.append(not any(isinstance(x, torch.SymInt) for x in inputs))
        return graph

    real = torch.compile  # another backend takes none of Inductor's options
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=compiler))
    return found


def test_every_compiled_step_runs_code_made_for_its_shape(graphs: list[bool]) -> None:
    """More often than torch compiles one function, and after another shape."""
    theirs, own = reference(compile=True, float32=True), ours("rung", compile=True)
    other = replace(SMALL, config=replace(SMALL.config, block_size=6))
    with torch._dynamo.config.patch(recompile_limit=1):  # 8 unless somebody says so
        rows = [*measure(theirs, workload=other), *measure(theirs, own)]
    assert [(row.skipped, bool(row.seconds)) for row in rows] == [("", True)] * 3
    assert graphs == [True] * 3


def test_what_is_not_compiled_code_alone_is_not_timed(graphs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    function = torch.compile(lambda x, n: x * n)

    def restless(call: int) -> float:  # it compiles under the clock, after the warm-up, whatever the clock says
        function(torch.ones(2), float(call // 6))
        return 1.0

    first, second = measure(fake("steady"), fake("restless", restless))
    assert first.seconds
    assert second.skipped == "wrong: it was compiled again while it was timed"
    assert second.seconds == second.host_seconds == []
    monkeypatch.setattr(rules, "LIMIT", 1)  # with dropout it needs two compilations
    assert "limit" in measure(EAGER, ours("compiled", compile=True), workload=DROPOUT)[1].skipped
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    first, *others = measure(EAGER, reference(compile=True, float32=True), ours("compiled", compile=True))
    assert first.seconds
    assert {row.skipped for row in others} == {"torch.compile left it as Python"}


# Variants that do not fit into memory together


class Memory:
    """Of one step."""


class Alive:
    """A device that holds `room` steps at a time."""

    def __init__(self, room: int) -> None:
        self.room, self.built = room, []
        self.steps: weakref.WeakSet = weakref.WeakSet()

    def variant(self, name: str, **fields: bool) -> Variant:
        def built(setting: Setting) -> Memory:
            if len(self.steps) == self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.built.append(name)
            self.steps.add(memory := Memory())
            return memory

        return fake(name, built=built, **fields)


@pytest.mark.parametrize("crowded", [False, True])
def test_what_does_not_fit_waits_for_the_next_group_and_the_reference_takes_part_in_all(monkeypatch, crowded) -> None:
    """crowded: there is memory to hold another variant, but none for a step of all."""
    alive = Alive(100 if crowded else 3)
    if crowded:
        monkeypatch.setattr(steps, "spare_memory", lambda device: -1 if len(alive.steps) > 3 else 2**40)
    every = [alive.variant("reference eager"), *(alive.variant(f"ours {i}", compares=i > 0) for i in range(4))]
    rows = measure(*every)
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
    first, *others = measure(*(alive.variant(name) for name in ("reference eager", "ours 1", "ours 2")))
    assert first.seconds
    assert [row.skipped for row in others] == ["CUDA out of memory"] * 2
