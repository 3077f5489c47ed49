"""The attention and the MLP of a run: the fastest that runs here and is correct, or the named one, or an error."""

import json
from collections.abc import Callable, Iterator
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
from tests.train.runs import last, logged, refusal, resume, run
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
    times: Iterator[float] = iter(milliseconds)

    def clock(work: Timeable, device: torch.device) -> float:
        work()
        return next(times)

    return clock


# auto


@pytest.mark.parametrize(
    ("dropout", "installed", "times", "expected"),
    [
        (
            0.0,
            True,
            (3.0, 0.5, 1.25, 2.0),
            "flash_attn, fastest of flash_attn 0.50 ms, fa3 1.25 ms, fa4 2.00 ms, flash 3.00 ms",
        ),
        (0.2, True, (1.0,), "flash_attn, fastest of flash_attn 1.00 ms"),
        (0.2, False, (), ""),
    ],
)
def test_auto_takes_the_fastest_that_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, dropout: float, installed: bool, times: tuple[float, ...], expected: str
) -> None:
    """cudnn and efficient do not run on a CPU. Without any, torch chooses."""
    if not installed:
        flash_packages.remove(monkeypatch)
    backend, said = choose_attention("auto", changed(LAYER, dropout=dropout), World(), clock(*times))
    if expected:
        assert (backend, said) == ("flash_attn", f"{expected} a layer, forward and backward")
    else:
        assert (backend, said) == ("auto", f"torch's own choice; none of {', '.join(MEASURED)} runs here")


def test_measured_is_the_layer_that_the_run_computes() -> None:
    asked = []

    def clock(work: Timeable, device: torch.device) -> float:
        flash_packages.got.clear()
        work()
        asked.append([(x.shape, x.dtype) for x in flash_packages.got])
        return 1.0

    choose_attention("auto", changed(LAYER, dropout=0.2), World(), clock)
    assert asked == [[((3, 8, 3, 2, 4), torch.float32)]]
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


def test_every_rank_takes_rank_0s() -> None:
    class Second(World):
        def from_master(self, value: int) -> int:
            return BACKENDS.index("fa3")

    def never(work: Timeable, device: torch.device) -> float:
        raise AssertionError("only rank 0 measures")

    assert choose_attention("auto", LAYER, Second(1, 1, 2), never)[0] == "fa3"


# The MLP

BOTH = ways(torch.empty(0, dtype=MLP.dtype, device="cuda" if torch.cuda.is_available() else "cpu"))
_, FIRST, SECOND = BOTH[0]


def spied(seen: list[dict[str, Any]], spoil: Callable[[Tensor, dict[str, Any]], Tensor] = lambda y, given: y) -> Ops:
    """The fused bundle, with an MLP that records its arguments. `spoil` can change its result."""

    def mlp(**given: Any) -> Tensor:
        seen.append(given)
        return spoil(FUSED.mlp(**given), given)

    return replace(FUSED, mlp=mlp)


def way(given: dict[str, Any]) -> tuple[int, int]:
    return given.get("forward_tiles", 0), given.get("backward_tiles", 0)


def taken(ops: Ops, seen: list[dict[str, Any]]) -> tuple[int, int]:
    """The tiles that the bundle's MLP uses, forward and backward."""
    inputs = choices.mlp_inputs(MLP, 3)
    ops.mlp(**inputs)
    return way(seen[-1])


def test_the_mlp_is_the_fastest_in_each_direction_and_says_so() -> None:
    seen: list[dict[str, Any]] = []
    ops, said = choose_mlp(spied(seen), MLP, World(), clock(3.0, 0.5, 1.25, 2.0, 4.0, 3.0))
    assert taken(ops, seen) == (1, 0)
    assert said == (
        f"forward {FIRST}, fastest of {FIRST} 0.500 ms, {SECOND} 1.250 ms, cuBLAS 3.000 ms a layer; "
        f"backward cuBLAS, fastest of cuBLAS 2.000 ms, {SECOND} 3.000 ms, {FIRST} 4.000 ms a layer"
    )
    assert replace(ops, mlp=FUSED.mlp) == FUSED


def test_measured_is_the_mlp_that_the_run_computes() -> None:
    """In the backward direction the forward pass runs before the clock starts."""
    seen: list[dict[str, Any]] = []
    asked = []

    def clock(work: Timeable, device: torch.device) -> float:
        seen.clear()
        backward = isinstance(work, choices.Staged)
        made = work.prepare() if backward else work()
        (given,) = seen
        parts = [given[name].shape for name in ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias")]
        assert parts == [(20, 16), (64, 16), (64,), (16, 64), (16,)]
        leaves = [x for x in given.values() if isinstance(x, Tensor)]
        assert all(x.requires_grad and x.dtype == torch.float16 for x in leaves)
        assert (given["approximate"], made.shape, made.requires_grad) == ("erf", (20, 16), True)
        if backward:
            assert [gradient.shape for gradient in work.work(made)] == [x.shape for x in leaves]
        asked.append((way(given), backward))
        return 1.0

    choose_mlp(spied(seen), MLP, World(), clock)
    forward, backward = [(0, 0), (1, 0), (2, 0)], [(0, 0), (0, 1), (0, 2)]
    assert asked == [(way, False) for way in forward] + [(way, True) for way in backward]


def last_element(y: Tensor, given: dict[str, Any]) -> Tensor:
    last = (torch.arange(y.numel()) == y.numel() - 1).view(y.shape)
    return torch.where(last, torch.nan, y) if way(given) == (1, 0) else y


def gradient(y: Tensor, given: dict[str, Any]) -> Tensor:
    if way(given) == (0, 1):
        y.register_hook(lambda dy: 1.05 * dy)
    return y


def raises(y: Tensor, given: dict[str, Any]) -> Tensor:
    if way(given) == (0, 1):
        raise RuntimeError("out of registers\nand so on")
    return y


@pytest.mark.parametrize(
    ("spoil", "direction", "reason"),
    [
        (last_element, "forward", "output 0: 1 of 320 elements off"),
        (gradient, "backward", "d"),
        (raises, "backward", "out of registers"),
    ],
)
def test_what_is_wrong_is_neither_timed_nor_taken(spoil: Callable, direction: str, reason: str) -> None:
    """Even if it would be the fastest."""
    seen: list[dict[str, Any]] = []
    timed = []

    def clock(work: Timeable, device: torch.device) -> float:
        work()
        timed.append(way(seen[-1]))
        return {(0, 0): 2.0, (1, 0): 1.0, (0, 1): 1.0, (2, 0): 1.5, (0, 2): 1.5}[timed[-1]]

    ops, said = choose_mlp(spied(seen, spoil), MLP, World(), clock)
    wrong = (1, 0) if direction == "forward" else (0, 1)
    assert wrong not in timed
    assert taken(ops, seen) == ((2, 1) if direction == "forward" else (1, 2))
    part = next(part for part in said.split("; ") if part.startswith(direction))
    assert part.startswith(f"{direction} {SECOND}, fastest of {SECOND} 1.500 ms, cuBLAS 2.000 ms a layer, ")
    assert f" a layer, without {FIRST}, which is wrong: {reason}" in part
    assert "\n" not in said


def test_the_first_rows_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "CHECKED", 7)
    seen: list[dict[str, Any]] = []
    assert choices.what_is_wrong(spied(seen).mlp, MLP) == ""
    assert [given["x"].shape for given in seen] == [(7, 16)]


@pytest.mark.parametrize(
    ("ops", "layer"),
    [
        (REFERENCE, MLP),
        (FUSED, MLP._replace(dtype=torch.float32)),
        (FUSED, changed(MLP, n_embd=24)),  # rows that do not begin at multiples of 16 elements
    ],
)
def test_where_there_is_one_way_nothing_is_measured(ops: Ops, layer: Layer) -> None:
    chosen, said = choose_mlp(ops, layer, World(), clock())
    assert chosen is ops
    assert said == ""


def test_every_rank_takes_rank_0s_mlp() -> None:
    told = iter([2, 1])

    class Second(World):
        def from_master(self, value: int) -> int:
            return next(told)

    seen: list[dict[str, Any]] = []
    ops, _ = choose_mlp(spied(seen), MLP, Second(1, 1, 2), clock())
    assert not seen  # only rank 0 checks and measures
    assert taken(ops, seen) == (2, 1)


def test_the_mlp_is_the_models_own() -> None:
    inputs = choices.mlp_inputs(changed(MLP, bias=False, gelu="tanh"), 3)
    assert [inputs[name] for name in ("fc_bias", "proj_bias", "approximate")] == [None, None, "tanh"]


def test_a_run_computes_with_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    rows = []

    def chosen(ops: Ops, layer: Layer, world: World) -> tuple[Ops, str]:
        def mlp(x: Tensor, *given: Any) -> Tensor:
            rows.append(x.shape[:-1].numel())
            return ops.mlp(x, *given)

        assert choices.rows_of(layer) == 4 * 16
        return replace(ops, mlp=mlp), "as the test likes it"

    monkeypatch.setattr("train.plan.choose_mlp", chosen)
    run(tmp_path / "out", eval_only=True, batch_size=4, block_size=16)
    assert "\nmlp: as the test likes it\n" in capsys.readouterr().out
    assert 4 * 16 in rows


# Times that are kept


def test_the_next_run_takes_the_same_without_measuring() -> None:
    first = choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
    again = choose_attention("auto", LAYER, World(), clock())
    assert again == (first[0], f"{first[1]}, as an earlier run measured")
    seen: list[dict[str, Any]] = []
    _, said = choose_mlp(spied(seen), MLP, World(), clock(3.0, 0.5, 1.25, 2.0, 4.0, 3.0))
    ops, later = choose_mlp(spied(seen), MLP, World(), clock())
    assert taken(ops, seen) == (1, 0)
    assert later == said.replace(" a layer", " a layer, as an earlier run measured")
    assert choose_attention("auto", LAYER, World(), clock()) == again  # neither overwrites the other


@pytest.mark.parametrize("change", ["shape", "device", "torch", "candidates"])
def test_times_of_something_else_are_not_taken(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
    layer, times = LAYER, (1.0, 2.0, 3.0, 4.0)
    if change == "shape":
        layer = LAYER._replace(batch_size=2)
    elif change == "device":
        monkeypatch.setattr(choices, "device_name", lambda device: "another card")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0")
    else:
        flash_packages.remove(monkeypatch)
        times = (1.0,)
    backend, said = choose_attention("auto", layer, World(), clock(*times))
    assert backend == "flash"
    assert "earlier" not in said


@pytest.mark.parametrize("damage", ["{", "[]", '{"a": 3}', '{"a": {"flash": "fast"}}', "\udcff", "folder"])
def test_a_file_that_is_damaged_is_made_again(damage: str) -> None:
    choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
    if damage == "folder":
        cache_file().unlink()
        cache_file().mkdir()
    else:
        cache_file().write_bytes(damage.encode(errors="surrogateescape"))
    assert choose_attention("auto", LAYER, World(), clock(1.0, 2.0, 3.0, 4.0))[0] == "flash"
    if damage != "folder":
        assert "earlier" in choose_attention("auto", LAYER, World(), clock())[1]


def test_where_times_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
    (path,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert path == cache_file() == tmp_path / "cache" / "nanofuse" / "times.json"
    ((key, times),) = json.loads(path.read_text()).items()
    assert times == {"flash": 3.0, "flash_attn": 0.5, "fa3": 1.25, "fa4": 2.0}
    assert f"torch {torch.__version__}" in key
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_file() == Path("/home/somebody/.cache/nanofuse/times.json")


@pytest.mark.parametrize("home", ["a file", "none"])
def test_where_times_cannot_be_kept_they_are_measured_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if home == "a file":
        (tmp_path / "cache").write_text("in the folder's place")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for _ in range(2):
        backend, said = choose_attention("auto", LAYER, World(), clock(3.0, 0.5, 1.25, 2.0))
        assert backend == "flash_attn"
        assert "earlier" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] * (home == "a file")


# A name


def test_the_setting_names_the_models_backends() -> None:
    assert settings_of(TrainConfig)["attention"].metadata["choices"] == BACKENDS


@pytest.mark.parametrize(
    ("name", "dropout", "reason"),
    [
        ("cudnn", 0.0, "No viable backend for scaled_dot_product_attention was found"),
        ("cudnn", 0.2, "attention: cudnn may round dropout to sixteenths, got 0.2"),
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


def test_a_run_by_each_learns_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = dict(dropout=0.0, compile=False)
    run(tmp_path / "auto", **settings)
    said = capsys.readouterr().out
    assert "\nattention:" not in said
    assert "\nmlp:" not in said
    for name in ("math", "flash_attn"):
        run(tmp_path / name, **settings, attention=name)
        assert f"\nattention: {name}, as set\n" in capsys.readouterr().out
        assert last(tmp_path / name)["config"]["attention"] == name
        for iteration, record in logged(tmp_path / "auto").items():
            assert logged(tmp_path / name)[iteration]["loss"] == pytest.approx(record["loss"], rel=1e-4)
    assert {x.size(0) for x in flash_packages.got} > {1}  # the trial uses another batch size


def test_a_refused_run_writes_nothing(tmp_path: Path) -> None:
    for name in ("cudnn", "efficient"):
        said = refusal(run, tmp_path / "out", attention=name, dropout=0.25)
        assert said.startswith(f"attention: got {name!r}, expected one of")
        assert "(on cpu): " in said
    assert refusal(run, tmp_path / "out", attention="cudnn", dropout=0.2) == (
        "attention: got 'cudnn', expected one of: auto, flash, efficient, math, flash_attn (with dropout=0.2): "
        "cudnn may round dropout to sixteenths"
    )
    assert not (tmp_path / "out").exists()


def test_resuming_chooses_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(dropout=0.0, compile=False)
    run(tmp_path / "out", **settings, attention="fa3", max_iters=2)
    flash_packages.remove(monkeypatch)
    assert "flash_attn_interface" in refusal(resume, tmp_path / "out")
    assert resume(tmp_path / "out", attention="auto", max_iters=3) == 0
