"""The attention and the MLP of a run: the fastest that runs here and is correct, or the named one, or an error."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import FUSED, REFERENCE, Ops
from kernels.fused.mlp import ways
from kernels.timing import Timeable
from model import GPTConfig
from model.attention import BACKENDS
from tests.model import flash_packages
from tests.train.runs import logged, refusal, resume, run
from train import choices
from train.choices import MEASURED, Layer, cache_file, choose_attention, choose_mlp
from train.config import TrainConfig
from train.distributed import World
from train.errors import UserError
from train.settings import settings_of

CPU = torch.device("cpu")
LAYER = Layer(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8), 3, torch.float32, CPU)
MLP = Layer(GPTConfig(block_size=20, vocab_size=9, n_layer=1, n_head=2, n_embd=16), 1, torch.float16, CPU)


def changed(layer: Layer, **changes: Any) -> Layer:
    """The layer of a model with these changes."""
    return layer._replace(config=replace(layer.config, **changes))


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flash_packages.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def clock(*milliseconds: float):
    """A clock that runs the work and returns these times, one after the other."""
    times = iter(milliseconds)

    def clock(work: Timeable, device: torch.device) -> float:
        work()
        return next(times)

    return clock


# auto


@pytest.mark.parametrize(
    ("dropout", "times", "listed"),
    [
        (0.0, (3.0, 0.5, 1.25, 2.0), "flash_attn 0.50 ms, fa3 1.25 ms, fa4 2.00 ms, flash 3.00 ms"),
        (0.2, (1.0,), "flash_attn 1.00 ms"),
    ],
)
def test_auto_takes_the_fastest_that_runs_and_says_so(dropout: float, times: tuple[float, ...], listed: str) -> None:
    """cudnn and efficient do not run on a CPU."""
    backend, said = choose_attention("auto", changed(LAYER, dropout=dropout), World(), clock(*times))
    assert (backend, said) == ("flash_attn", f"flash_attn, fastest of {listed} a layer, forward and backward")


def test_where_none_runs_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_packages.remove(monkeypatch)
    said = f"torch's own choice; none of {', '.join(MEASURED)} runs here"
    assert choose_attention("auto", changed(LAYER, dropout=0.2), World(), clock()) == ("auto", said)


def test_measured_is_the_layer_that_the_run_computes() -> None:
    def clock(work: Timeable, device: torch.device) -> float:
        flash_packages.got.clear()
        work()
        assert [(x.shape, x.dtype) for x in flash_packages.got] == [((3, 8, 3, 2, 4), torch.float32)]
        return 1.0

    assert "1.00 ms" in choose_attention("auto", changed(LAYER, dropout=0.2), World(), clock)[1]
    assert len(flash_packages.dqkvs) > 0


def test_random_state_is_as_it_was() -> None:
    before = torch.get_rng_state()
    choose_attention("auto", LAYER, World(), clock(1, 2, 3, 4))
    assert choose_attention("math", changed(LAYER, dropout=0.2), World()) == ("math", "math, as set")
    choose_mlp(FUSED, MLP, World(), clock(*range(6)))
    assert torch.equal(torch.get_rng_state(), before)


def test_off_cuda_nothing_is_measured() -> None:
    assert choose_attention("auto", LAYER, World()) == ("auto", "")
    assert not flash_packages.got
    assert choose_mlp(FUSED, MLP, World()) == (FUSED, "")


# The MLP

Way = tuple[int, int]  # the tiles of an MLP, forward and backward; 0: cuBLAS
_, FIRST, SECOND = ways(torch.empty(0, dtype=MLP.dtype, device="cuda" if torch.cuda.is_available() else "cpu"))[0]


class Spied:
    """The fused bundle, with the reference's MLP, which is quicker here. It records its arguments. `spoil` can change
    the result of one way."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] | None = None, wrong: Way | None = None) -> None:
        self.seen: list[dict[str, Any]] = []
        self.spoil, self.wrong = spoil, wrong
        self.ops = replace(FUSED, mlp=self.mlp)

    def mlp(self, *, forward_tiles: int = 0, backward_tiles: int = 0, **given: Any) -> Tensor:
        self.way = (forward_tiles, backward_tiles)
        self.seen.append(given)
        y = REFERENCE.mlp(**given)
        return self.spoil(y) if self.way == self.wrong else y

    def taken(self, ops: Ops) -> Way:
        """The tiles that the bundle's MLP uses."""
        ops.mlp(**choices.mlp_inputs(MLP, 3))
        return self.way


def test_the_mlp_is_the_fastest_in_each_direction_and_says_so() -> None:
    spied = Spied()
    ops, said = choose_mlp(spied.ops, MLP, World(), clock(3.0, 0.5, 1.25, 2.0, 4.0, 3.0))
    assert spied.taken(ops) == (1, 0)
    assert said == (
        f"forward {FIRST}, fastest of {FIRST} 0.500 ms, {SECOND} 1.250 ms, cuBLAS 3.000 ms a layer; "
        f"backward cuBLAS, fastest of cuBLAS 2.000 ms, {SECOND} 3.000 ms, {FIRST} 4.000 ms a layer"
    )
    assert replace(ops, mlp=FUSED.mlp) == FUSED


def test_measured_is_the_mlp_that_the_run_computes() -> None:
    """In the backward direction the forward pass runs before the clock starts."""
    spied = Spied()
    asked = []

    def clock(work: Timeable, device: torch.device) -> float:
        spied.seen.clear()
        backward = isinstance(work, choices.Staged)
        made = work.prepare() if backward else work()
        (given,) = spied.seen
        parts = [given[name].shape for name in ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias")]
        assert parts == [(20, 16), (64, 16), (64,), (16, 64), (16,)]
        leaves = [x for x in given.values() if isinstance(x, Tensor)]
        assert all(x.requires_grad and x.dtype == torch.float16 for x in leaves)
        assert (given["approximate"], made.shape, made.requires_grad) == ("erf", (20, 16), True)
        if backward:
            assert [gradient.shape for gradient in work.work(made)] == [x.shape for x in leaves]
        asked.append((spied.way, backward))
        return 1.0

    choose_mlp(spied.ops, MLP, World(), clock)
    forward, backward = [(0, 0), (1, 0), (2, 0)], [(0, 0), (0, 1), (0, 2)]
    assert asked == [(way, False) for way in forward] + [(way, True) for way in backward]


def last_element(y: Tensor) -> Tensor:
    return torch.where((torch.arange(y.numel()) == y.numel() - 1).view(y.shape), torch.nan, y)


def gradient(y: Tensor) -> Tensor:
    y.register_hook(lambda dy: 1.05 * dy)
    return y


def raises(y: Tensor) -> Tensor:
    raise RuntimeError("out of registers\nand so on")


@pytest.mark.parametrize(
    ("spoil", "direction", "wrong", "best", "reason"),
    [
        (last_element, "forward", (1, 0), (2, 1), "output 0: 1 of 320 elements off"),
        (gradient, "backward", (0, 1), (1, 2), "d"),
        (raises, "backward", (0, 1), (1, 2), "out of registers"),
    ],
)
def test_what_is_wrong_is_neither_timed_nor_taken(
    spoil: Callable, direction: str, wrong: Way, best: Way, reason: str
) -> None:
    """Even if it would be the fastest."""
    spied = Spied(spoil, wrong)

    def clock(work: Timeable, device: torch.device) -> float:
        work()
        assert spied.way != wrong
        return {0: 2.0, 1: 1.0, 2: 1.5}[sum(spied.way)]

    ops, said = choose_mlp(spied.ops, MLP, World(), clock)
    assert spied.taken(ops) == best
    assert (
        f"{direction} {SECOND}, fastest of {SECOND} 1.500 ms, cuBLAS 2.000 ms a layer, "
        f"without {FIRST}, which is wrong: {reason}"
    ) in said
    assert "\n" not in said


def test_the_first_rows_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "CHECKED", 7)
    spied = Spied()
    assert choices.what_is_wrong(spied.mlp, MLP) == ""
    assert [given["x"].shape for given in spied.seen] == [(7, 16)]


@pytest.mark.parametrize(
    ("ops", "layer"),
    [
        (REFERENCE, MLP),
        (FUSED, MLP._replace(dtype=torch.float32)),
        (FUSED, changed(MLP, n_embd=24)),  # rows that do not begin at multiples of 16 elements
    ],
)
def test_where_there_is_one_way_nothing_is_measured(ops: Ops, layer: Layer) -> None:
    assert choose_mlp(ops, layer, World(), clock()) == (ops, "")


def test_every_rank_takes_rank_0s() -> None:
    told = iter([BACKENDS.index("fa3"), 2, 1])

    class Second(World):
        def from_master(self, value: int) -> int:
            return next(told)

    world, spied = Second(1, 1, 2), Spied()
    assert choose_attention("auto", LAYER, world, clock())[0] == "fa3"
    ops, _ = choose_mlp(spied.ops, MLP, world, clock())
    assert not spied.seen  # only rank 0 checks and measures
    assert spied.taken(ops) == (2, 1)


def test_the_mlp_is_the_models_own() -> None:
    inputs = choices.mlp_inputs(changed(MLP, bias=False, gelu="tanh"), 3)
    assert [inputs[name] for name in ("fc_bias", "proj_bias", "approximate")] == [None, None, "tanh"]


# Times that are kept


def test_the_next_run_takes_the_same_without_measuring() -> None:
    first = choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
    again = choose_attention("auto", LAYER, World(), clock())
    assert again == (first[0], f"{first[1]}, as an earlier run measured")
    spied = Spied()
    _, said = choose_mlp(spied.ops, MLP, World(), clock(3.0, 0.5, 1.25, 2.0, 4.0, 3.0))
    ops, later = choose_mlp(spied.ops, MLP, World(), clock())
    assert spied.taken(ops) == (1, 0)
    assert later == said.replace(" a layer", " a layer, as an earlier run measured")
    assert choose_attention("auto", LAYER, World(), clock()) == again  # neither overwrites the other


@pytest.mark.parametrize("change", ["shape", "device", "torch", "candidates"])
def test_times_of_something_else_are_not_taken(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
    layer = LAYER._replace(batch_size=2) if change == "shape" else LAYER
    if change == "device":
        monkeypatch.setattr(choices, "device_name", lambda device: "another card")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0")
    elif change == "candidates":
        flash_packages.remove(monkeypatch)
    backend, said = choose_attention("auto", layer, World(), clock(1.0, 2.0, 3.0, 4.0))
    assert backend == "flash"
    assert "earlier" not in said


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": {"flash": []}}'])
def test_a_file_that_is_damaged_is_made_again(damage: str) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(damage)
    assert choose_attention("auto", LAYER, World(), clock(1.0, 2.0, 3.0, 4.0))[0] == "flash"
    assert "earlier" in choose_attention("auto", LAYER, World(), clock())[1]


def test_where_times_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
    assert list((tmp_path / "cache").rglob("*.*")) == [cache_file()] == [tmp_path / "cache" / "nanofuse" / "times.json"]
    ((key, times),) = json.loads(cache_file().read_text()).items()
    assert times == {"flash": 3.0, "flash_attn": 0.5, "fa3": 1.25, "fa4": 2.0}
    assert f"torch {torch.__version__}" in key
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_file() == Path("/home/somebody/.cache/nanofuse/times.json")


@pytest.mark.parametrize("cache", ["is a folder", "has no home"])
def test_where_times_cannot_be_kept_they_are_measured_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if cache == "is a folder":
        cache_file().mkdir(parents=True)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        backend, said = choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
        assert backend == "flash_attn"
        assert "earlier" not in said
    assert sorted(tmp_path.rglob("*")) == before


# A name


def test_the_setting_names_the_models_backends() -> None:
    assert settings_of(TrainConfig)["attention"].metadata["choices"] == BACKENDS


@pytest.mark.parametrize(
    ("name", "dropout", "reason"),
    [
        ("cudnn", 0.0, "No viable backend for scaled_dot_product_attention was found"),
        ("flash", 0.2, "do not support non-zero dropout"),
        ("fa3", 0.2, "attention: fa3 has no dropout, got 0.2"),
    ],
)
def test_a_name_that_cannot_run(name: str, dropout: float, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_attention(name, changed(LAYER, dropout=dropout), World())
    message = str(caught.value)
    able = "auto, math, flash_attn" if dropout else "auto, flash, math, flash_attn, fa3, fa4"
    assert message.startswith(f"attention: got {name!r}, expected one of: {able} (on cpu): ")
    assert reason in message
    assert "\n" not in message


# Runs


def test_a_run_learns_the_same_by_another_and_chooses_again_when_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(dropout=0.0, max_iters=2)
    run(tmp_path / "auto", **settings)
    said = capsys.readouterr().out
    assert "\nattention:" not in said
    assert "\nmlp:" not in said
    run(tmp_path / "fa3", **settings, attention="fa3")
    assert "\nattention: fa3, as set\n" in capsys.readouterr().out
    assert {x.size(0) for x in flash_packages.got} > {1}  # the trial uses another batch size
    one, other = ({n: record["loss"] for n, record in logged(tmp_path / name).items()} for name in ("auto", "fa3"))
    assert other == pytest.approx(one, rel=1e-4)
    flash_packages.remove(monkeypatch)
    assert "flash_attn_interface" in refusal(resume, tmp_path / "fa3")
    assert resume(tmp_path / "fa3", attention="auto", max_iters=3) == 0


def test_a_run_computes_with_the_mlp_that_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []

    def chosen(ops: Ops, layer: Layer, world: World) -> tuple[Ops, str]:
        def mlp(x: Tensor, *given: Any) -> Tensor:
            rows.append(x.shape[:-1].numel())
            return ops.mlp(x, *given)

        return replace(ops, mlp=mlp), f"chosen for {choices.rows_of(layer)} rows"

    monkeypatch.setattr("train.plan.choose_mlp", chosen)
    run(tmp_path / "out", eval_only=True, batch_size=4, block_size=16)
    assert "\nmlp: chosen for 64 rows\n" in capsys.readouterr().out
    assert 64 in rows


def test_a_refused_run_writes_nothing(tmp_path: Path) -> None:
    said = refusal(run, tmp_path / "out", attention="efficient", dropout=0.25)
    assert said.startswith("attention: got 'efficient', expected one of")
    assert "(on cpu): " in said
    assert refusal(run, tmp_path / "out", attention="cudnn", dropout=0.2) == (
        "attention: got 'cudnn', expected one of: auto, flash, efficient, math, flash_attn (with dropout=0.2): "
        "cudnn may round dropout to sixteenths"
    )
    assert not (tmp_path / "out").exists()
