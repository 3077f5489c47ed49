"""Which attention a run takes: the fastest that runs here, or the one that was named, or one line that says why not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.attention import BACKENDS
from tests.model import flash_packages
from tests.train.runs import last, logged, refusal, resume, run
from train.attention_choice import MEASURED, AttentionShape, Work, choose_attention, measure, why_not
from train.config import TrainConfig
from train.distributed import World
from train.errors import UserError
from train.settings import settings_of

SHAPE = AttentionShape(3, 8, 2, 4, 0.0, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_packages.install(monkeypatch)


def clock(*milliseconds: float):
    """A clock that runs the work and says these times, one after the other."""
    times: Iterator[float] = iter(milliseconds)

    def clock(work: Work, device: torch.device) -> float:
        work()
        return next(times)

    return clock


# auto


def test_auto_takes_the_fastest_and_says_so() -> None:
    backend, said = choose_attention("auto", SHAPE, World(), clock(3.0, 0.5, 1.25, 2.0))
    assert backend == "flash_attn"  # cudnn and efficient do not run on a CPU
    assert said == (
        "flash_attn, fastest of flash_attn 0.50 ms, fa3 1.25 ms, fa4 2.00 ms, flash 3.00 ms a layer, forward and "
        "backward"
    )


def test_what_cannot_run_is_not_measured() -> None:
    assert list(measure(SHAPE, clock(1, 2, 3), ("cudnn", "math", "flash", "fa3"))) == ["math", "flash", "fa3"]
    dropout = SHAPE._replace(dropout=0.2)
    assert list(measure(dropout, clock(1, 2), (*MEASURED, "math"))) == ["flash_attn", "math"]


def test_measured_is_the_layer_that_the_run_computes() -> None:
    def clock(work: Work, device: torch.device) -> float:
        flash_packages.got.clear()
        work()
        assert [(x.shape, x.dtype) for x in flash_packages.got] == [((3, 8, 3, 2, 4), torch.float32)]
        assert len(flash_packages.dqkvs) > 0
        return 1.0

    assert measure(SHAPE, clock, ("fa3",)) == {"fa3": 1.0}


def test_where_nothing_runs_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_packages.remove(monkeypatch)
    backend, said = choose_attention("auto", SHAPE._replace(dropout=0.2), World(), clock())
    assert (backend, said) == ("auto", f"torch's own choice; none of {', '.join(MEASURED)} runs here")


def test_random_state_is_as_it_was() -> None:
    before = torch.get_rng_state()
    choose_attention("auto", SHAPE, World(), clock(1, 2, 3, 4))
    choose_attention("math", SHAPE._replace(dropout=0.2), World())
    assert torch.equal(torch.get_rng_state(), before)


def test_off_cuda_nothing_is_measured() -> None:
    assert choose_attention("auto", SHAPE, World()) == ("auto", "")
    assert not flash_packages.got


def test_every_rank_takes_rank_0s() -> None:
    class Second(World):
        def from_master(self, value: int) -> int:
            return BACKENDS.index("fa3")

    def never(work: Work, device: torch.device) -> float:
        raise AssertionError("only rank 0 measures")

    assert choose_attention("auto", SHAPE, Second(1, 1, 2), never)[0] == "fa3"


# A name


def test_the_setting_names_the_models_backends() -> None:
    assert settings_of(TrainConfig)["attention"].metadata["choices"] == BACKENDS


def test_a_name_is_taken() -> None:
    assert choose_attention("math", SHAPE, World()) == ("math", "math, as set")


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
        choose_attention(name, SHAPE._replace(dropout=dropout), World())
    message = str(caught.value)
    able = "auto, math, flash_attn" if dropout else "auto, flash, math, flash_attn, fa3, fa4"
    assert message.startswith(f"attention: got {name!r}, expected one of: {able} (on cpu): ")
    assert reason in message
    assert "\n" not in message


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_packages.remove(monkeypatch)
    assert all("flash_attn" in why_not(name, SHAPE) for name in ("flash_attn", "fa3", "fa4"))


# Runs


def test_a_run_by_each_learns_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = dict(dropout=0.0, compile=False)
    run(tmp_path / "auto", **settings)
    assert "attention:" not in capsys.readouterr().out
    for name in ("math", "flash_attn"):
        run(tmp_path / name, **settings, attention=name)
        assert f"\nattention: {name}, as set\n" in capsys.readouterr().out
        assert last(tmp_path / name)["config"]["attention"] == name
        for iteration, record in logged(tmp_path / "auto").items():
            assert logged(tmp_path / name)[iteration]["loss"] == pytest.approx(record["loss"], rel=1e-4)
    assert {x.size(0) for x in flash_packages.got} > {1}  # of the trial


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


def test_resuming_chooses_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(dropout=0.0, compile=False)
    run(tmp_path / "out", **settings, attention="fa3", max_iters=2)
    flash_packages.remove(monkeypatch)
    assert "flash_attn_interface" in refusal(resume, tmp_path / "out")
    assert resume(tmp_path / "out", attention="auto", max_iters=3) == 0
