"""The attention and the MLP of a run: the fastest that runs here and is correct, or the named one, or an error."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

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
from train.distributed import World
from train.errors import UserError

CPU = torch.device("cpu")
LAYER = Layer(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8), 3, torch.float32, CPU)
MLP = Layer(GPTConfig(block_size=20, vocab_size=9, n_layer=1, n_head=2, n_embd=16), 1, torch.float16, CPU)
Way = tuple[int, int]  # the tiles of an MLP, forward and backward; 0: cuBLAS
_, FIRST, SECOND = ways(torch.empty(0, dtype=MLP.dtype, device="cuda" if torch.cuda.is_available() else "cpu"))[0]
FOUR = (3.0, 0.5, 1.25, 2.0)  # of flash, flash_attn, fa3, fa4; cudnn and efficient do not run on a CPU


def changed(layer: Layer, **changes: Any) -> Layer:
    """The layer of a model with these changes."""
    return layer._replace(config=replace(layer.config, **changes))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A CPU on which all is timed. Sets the clock: what works take, one after the other; without any, nothing may be
    timed."""
    flash_packages.install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "TIMED", ("cpu",))

    def set(*times: float, look: Callable[[Timeable], Any] = lambda work: work()) -> None:
        shown = iter(times)

        def milliseconds(work: Timeable, device: torch.device) -> float:
            look(work)
            return next(shown)

        monkeypatch.setattr(choices, "milliseconds", milliseconds if times else None)

    set()
    return set


@pytest.mark.parametrize("change", ["shape", "device", "torch", "candidates", "{", '{"a": {"flash": []}}'])
def test_auto_takes_the_fastest_that_runs_and_measures_again_after_a_change(clock, change, monkeypatch):
    """Also of the file of times: it may be damaged."""
    said = "attention: flash_attn, fastest of flash_attn 0.50 ms, fa3 1.25 ms, fa4 2.00 ms, flash 3.00 ms a layer, "
    said += "forward and backward"
    for times, when in ((FOUR, ""), ((), ", as an earlier run measured")):
        clock(*times)
        assert choose_attention("auto", LAYER, World()) == ("flash_attn", said + when)
    assert {(x.shape, x.dtype) for x in flash_packages.got} >= {((3, 8, 3, 2, 4), torch.float32)}
    assert len(flash_packages.dqkvs) > 0
    layer = LAYER._replace(batch_size=2) if change == "shape" else LAYER
    if change == "device":
        monkeypatch.setattr(choices, "device_name", lambda device: "another card")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0")
    elif change == "candidates":
        flash_packages.remove(monkeypatch)
    elif change != "shape":
        cache_file().write_text(change)
    for times, earlier in (((1.0, 2.0, 3.0, 4.0), False), ((), True)):
        clock(*times)
        backend, now = choose_attention("auto", layer, World())
        assert (backend, "earlier" in now) == ("flash", earlier)


def test_nothing_is_measured_off_cuda_or_where_there_is_one_way(monkeypatch):
    ragged = changed(MLP, n_embd=24)  # rows that do not begin at multiples of 16 elements
    for ops, layer in ((REFERENCE, MLP), (FUSED, MLP._replace(dtype=torch.float32)), (FUSED, ragged)):
        assert choose_mlp(ops, layer, World()) == (ops, "")
    flash_packages.remove(monkeypatch)
    said = f"attention: torch's own choice; none of {', '.join(MEASURED)} runs here"
    assert choose_attention("auto", changed(LAYER, dropout=0.2), World()) == ("auto", said)
    monkeypatch.setattr(choices, "TIMED", ("cuda",))
    assert choose_attention("auto", LAYER, World()) == ("auto", "")
    assert choose_mlp(FUSED, MLP, World()) == (FUSED, "")


def test_where_times_are_kept_and_that_none_are_where_they_cannot_be(clock, tmp_path, monkeypatch):
    assert cache_file() == tmp_path / "cache" / "nanofuse" / "times.json"
    cache_file().mkdir(parents=True)
    for _ in range(2):
        clock(*FOUR)
        assert "earlier" not in choose_attention("auto", LAYER, World())[1]
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["nanofuse", "times.json"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_file() == Path("/home/somebody/.cache/nanofuse/times.json")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # of a user without a home
    monkeypatch.chdir(tmp_path)
    clock(*FOUR)
    assert "earlier" not in choose_attention("auto", LAYER, World())[1]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# The MLP


class Spied:
    """The fused bundle, with the reference's MLP, which is quicker here. It keeps its tiles and arguments. `spoil`
    changes the result of the way `wrong`."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] | None = None, wrong: Way | None = None) -> None:
        self.spoil, self.wrong, self.rows = spoil, wrong, set()
        self.ops = replace(FUSED, mlp=self.mlp)

    def mlp(self, *, forward_tiles: int = 0, backward_tiles: int = 0, **given: Any) -> Tensor:
        self.way, self.given = (forward_tiles, backward_tiles), given
        self.rows.add(len(given["x"]))
        y = REFERENCE.mlp(**given)
        return self.spoil(y) if self.way == self.wrong else y

    def taken(self, ops: Ops) -> Way:
        """The tiles that the bundle's MLP uses."""
        ops.mlp(**choices.mlp_inputs(MLP, 3))
        return self.way


def test_the_mlp_is_the_fastest_in_each_direction_and_the_next_run_takes_the_same(clock, monkeypatch):
    """Measured is the MLP that the run computes; backward, the forward pass runs before the clock starts. Only the
    first rows are checked before. Neither choice overwrites the other's times."""
    clock(*FOUR)
    choose_attention("auto", LAYER, World())
    spied, asked = Spied(), []

    def look(work: Timeable) -> None:
        backward = isinstance(work, choices.Staged)
        made = work.prepare() if backward else work()
        assert [spied.given[name].shape for name in ("x", "fc_weight", "fc_bias")] == [(20, 16), (64, 16), (64,)]
        if backward:
            leaves = [x for x in spied.given.values() if isinstance(x, Tensor)]
            assert [gradient.shape for gradient in work.work(made)] == [x.shape for x in leaves]
        asked.append((*spied.way, backward))

    monkeypatch.setattr(choices, "CHECKED", 7)
    clock(3.0, 0.5, 1.25, 2.0, 4.0, 3.0, look=look)
    ops, mlp_said = choose_mlp(spied.ops, MLP, World())
    assert spied.rows == {7, 20}
    assert asked == [(0, 0, False), (1, 0, False), (2, 0, False), (0, 0, True), (0, 1, True), (0, 2, True)]
    assert spied.taken(ops) == (1, 0)
    assert mlp_said == (
        f"mlp: forward {FIRST}, fastest of {FIRST} 0.500 ms, {SECOND} 1.250 ms, cuBLAS 3.000 ms a layer; "
        f"backward cuBLAS, fastest of cuBLAS 2.000 ms, {SECOND} 3.000 ms, {FIRST} 4.000 ms a layer"
    )
    clock()
    ops, later = choose_mlp(spied.ops, MLP, World())
    assert spied.taken(ops) == (1, 0)
    assert later == mlp_said.replace(" a layer", " a layer, as an earlier run measured")
    assert "earlier" in choose_attention("auto", LAYER, World())[1]
    other = choices.mlp_inputs(changed(MLP, bias=False, gelu="tanh"))
    assert [other[name] for name in ("fc_bias", "proj_bias", "approximate")] == [None, None, "tanh"]


def gradient(y: Tensor) -> Tensor:
    y.register_hook(lambda dy: 1.05 * dy)
    return y


def raises(y: Tensor) -> Tensor:
    raise RuntimeError("out of registers\nand so on")


@pytest.mark.parametrize(("spoil", "wrong"), [(raises, (1, 0)), (gradient, (0, 1))])
def test_what_is_wrong_is_neither_timed_nor_taken(clock, spoil, wrong):
    """Even if it would be the fastest."""
    spied, forward = Spied(spoil, wrong), spoil is raises
    two, three = (3.0, 2.0), (3.0, 2.0, 1.0)  # of cuBLAS, the first tiles, which may be wrong, and the second
    clock(*(two + three if forward else three + two))
    ops, said = choose_mlp(spied.ops, MLP, World())
    assert spied.taken(ops) == (2, 2)
    listed = f"{'forward' if forward else 'backward'} {SECOND}, fastest of {SECOND} 2.000 ms, cuBLAS 3.000 ms a layer"
    reason = "out of registers" if forward else "d"
    assert f"{listed}, without {FIRST}, which is wrong: {reason}" in said
    assert "\n" not in said


def test_every_rank_takes_rank_0s():
    told = iter([BACKENDS.index("fa3"), 2, 1])

    class Second(World):
        def from_master(self, *values: float) -> list[float]:
            return [next(told) for _ in values]

    world, spied = Second(1, 1, 2), Spied()
    assert choose_attention("auto", LAYER, world)[0] == "fa3"
    ops, _ = choose_mlp(spied.ops, MLP, world)
    assert not spied.rows  # only rank 0 checks and measures
    assert spied.taken(ops) == (2, 1)


# A name, and runs


@pytest.mark.parametrize(
    ("name", "dropout", "reason"),
    [
        ("cudnn", 0.0, "No viable backend for scaled_dot_product_attention was found"),
        ("flash", 0.2, "do not support non-zero dropout"),
    ],
)
def test_a_name_that_cannot_run(name, dropout, reason):
    with pytest.raises(UserError) as caught:
        choose_attention(name, changed(LAYER, dropout=dropout), World())
    message = str(caught.value)
    able = "auto, math, flash_attn" if dropout else "auto, flash, math, flash_attn, fa3, fa4"
    assert message.startswith(f"attention: got {name!r}, expected one of: {able} (on cpu): ")
    assert reason in message
    assert "\n" not in message


def test_a_run_computes_with_what_was_chosen_and_chooses_again_when_resumed(tmp_path, capsys, monkeypatch):
    """And learns the same by another attention."""
    mlp = mock.Mock(side_effect=REFERENCE.mlp)
    monkeypatch.setattr(choices, "TIMED", ())
    settings = dict(dropout=0.0, max_iters=2)
    run(tmp_path / "auto", **settings)
    said = capsys.readouterr().out
    assert "\nattention:" not in said
    assert "\nmlp:" not in said
    monkeypatch.setattr("train.plan.choose_mlp", lambda ops, *of: (replace(ops, mlp=mlp), "mlp: chosen"))
    run(tmp_path / "fa3", **settings, attention="fa3")
    assert "\nattention: fa3, as set\nmlp: chosen\n" in capsys.readouterr().out
    assert any(call.args[0].shape[:-1].numel() == 2 * 16 for call in mlp.call_args_list)
    assert {x.size(0) for x in flash_packages.got} > {1}  # the trial uses another batch size
    one, other = ({n: record["loss"] for n, record in logged(tmp_path / name).items()} for name in ("auto", "fa3"))
    assert other == pytest.approx(one, rel=1e-4)
    flash_packages.remove(monkeypatch)
    assert "flash_attn_interface" in refusal(resume, tmp_path / "fa3")
    assert resume(tmp_path / "fa3", attention="auto", max_iters=3) == 0
