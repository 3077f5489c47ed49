"""Which path a matmul with a GELU takes: the table of measurements, and `python -m kernels.tune`, which writes it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import tune, tuned
from kernels.fused.matmul import Tiles
from kernels.fused.mlp import mlp
from kernels.launch import INTERPRETED
from kernels.tuned import Problem
from tests.kernels.memory import Memory
from tests.kernels.test_mlp import SMALL, drawn

# The table of measurements


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    monkeypatch.setattr(tuned, "TABLE", path)
    return path


PROBLEM = Problem("linear_gelu", torch.bfloat16, 37, 96, 24)


def test_the_table_that_is_shipped_can_be_read() -> None:
    for device, problems in json.loads(tuned.TABLE.read_text()).items():
        assert isinstance(device, str)
        for problem, entry in problems.items():
            best = min(entry["ms"], key=entry["ms"].get)
            assert tuned.CUBLAS in entry["ms"], problem
            assert entry["use"] == tuned.CUBLAS or str(Tiles(**entry["use"])) == best, problem


def test_cublas_where_nothing_was_measured(table: Path) -> None:
    x = torch.empty(37, 24)
    assert tuned.choose("auto", PROBLEM, x, (SMALL,)) is None
    assert tuned.choose("cublas", PROBLEM, x, (SMALL,)) is None
    assert tuned.choose("triton", PROBLEM, x, (SMALL,)) == SMALL


def test_what_was_measured_is_taken_on_that_device_for_that_problem(table: Path) -> None:
    other, x = Tiles(32, 32, 32, 4, 2, 1), torch.empty(37, 24)
    tuned.record("a card", PROBLEM, None, {"cublas": 1.0}, "")
    tuned.record("cpu", Problem("mlp_dpre", torch.bfloat16, 37, 96, 24), None, {"cublas": 1.0}, "")
    tuned.record("cpu", PROBLEM, SMALL, {"cublas": 2.0, str(SMALL): 1.0}, "torch 2")
    assert tuned.choose("auto", PROBLEM, x, (other,)) == SMALL
    assert tuned.choose("triton", PROBLEM, x, (other,)) == SMALL
    assert tuned.choose("cublas", PROBLEM, x, (other,)) is None
    assert tuned.choose("auto", Problem("linear_gelu", torch.float16, 37, 96, 24), x, (other,)) is None
    assert tuned.measured("a card", PROBLEM) is None
    tuned.record("cpu", PROBLEM, None, {"cublas": 1.0, str(SMALL): 1.0}, "torch 3")  # again, over the older one
    assert tuned.choose("auto", PROBLEM, x, (other,)) is None
    assert json.loads(table.read_text())["cpu"][str(PROBLEM)]["with"] == "torch 3"


@pytest.mark.skipif(not INTERPRETED, reason="the bytes that tell the paths apart are counted in the interpreter")
def test_auto_goes_by_the_table_forward_and_backward(table: Path, memory: Memory) -> None:
    inputs = drawn(37, 24, 96, torch.bfloat16)

    def moved(path: str) -> int:
        before = memory.loaded
        mlp(**inputs, path=path).sum().backward()
        return memory.loaded - before

    fused, apart = moved("triton"), moved("cublas")
    assert moved("auto") == apart != fused
    tuned.record("cpu", PROBLEM, SMALL, {}, "")
    half_way = moved("auto")
    assert half_way not in (apart, fused)
    tuned.record("cpu", Problem("mlp_dpre", torch.bfloat16, 37, 96, 24), SMALL, {}, "")
    assert moved("auto") == fused


# Its measurement


@pytest.fixture
def work(device: torch.device) -> tune.Work:
    return tune.works(37, 24, torch.bfloat16, device)[0]


def clock(ms: dict[Tiles | None, float], work: tune.Work, timed: list[Tiles | None]):
    """(work, a time()) that tells `ms` by the tiles that run."""

    def run(tiles: Tiles | None) -> tuple[Tensor, Tensor]:
        timed.append(tiles)
        return work.run(tiles)

    def time(function) -> float:
        function()
        return ms[timed[-1]]

    return tune.Work(work.problem, work.tiles, run, work.exact), time


@pytest.mark.parametrize(("factor", "wins"), [(0.5, True), (0.98, True), (0.995, False), (2.0, False)])
def test_what_is_faster_by_more_than_noise_wins(factor: float, wins: bool, work, table: Path) -> None:
    tiles = work.tiles[0]
    watched, time = clock({None: 2.0} | dict.fromkeys(work.tiles, 3.0) | {tiles: 2.0 * factor}, work, [])
    assert tune.measure(watched, "a card", time)
    assert tuned.measured("a card", work.problem) == (tiles if wins else None)
    entry = json.loads(table.read_text())["a card"][str(work.problem)]
    assert entry["ms"]["cublas"] == 2.0
    assert entry["ms"][str(tiles)] == 2.0 * factor
    assert torch.__version__ in entry["with"]


@pytest.mark.parametrize("which", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("wrong", ["one element", "nan", "second output"])
def test_what_is_wrong_is_neither_timed_nor_taken(which: int, wrong: str, device, table: Path, capsys) -> None:
    work = tune.works(37, 24, torch.bfloat16, device)[which]
    timed: list[Tiles | None] = []

    def run(tiles: Tiles | None) -> tuple[Tensor, Tensor]:
        first, second = work.run(tiles)
        if tiles is not None:
            spoilt = second if wrong == "second output" else first
            spoilt.view(-1)[-1] += torch.nan if wrong == "nan" else 1.0
        return first, second

    spoilt, time = clock({None: 2.0}, tune.Work(work.problem, work.tiles, run, work.exact), timed)
    assert not tune.measure(spoilt, "a card", time)
    assert tuned.measured("a card", work.problem) is None
    assert list(json.loads(table.read_text())["a card"][str(work.problem)]["ms"]) == ["cublas"]
    assert "WRONG" in capsys.readouterr().out


def test_rows_are_checked_in_chunks_to_the_last(work: tune.Work, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tune.errors(work, None)
    monkeypatch.setattr(tune, "CHUNK", 8)
    assert tune.errors(work, None) == whole
    backward = tune.works(37, 24, torch.bfloat16, torch.device("cpu" if INTERPRETED else "cuda"))[1]
    torch.testing.assert_close(tune.errors(backward, None)[1], 0.0, rtol=0, atol=0.1)  # sums over all chunks


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch, capsys, table: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert table.read_text() == "{}"


@pytest.mark.parametrize("shape", ["768", "0x768", "32768x-1", "ax3"])
def test_a_shape_that_is_none(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--shapes", shape])
    assert f"got {shape}, expected ROWSxWIDTH" in capsys.readouterr().err
