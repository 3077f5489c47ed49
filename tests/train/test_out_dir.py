"""A folder belongs to one run at a time, and what only reads leaves an earlier run as it is."""

from pathlib import Path

import pytest

from tests.train.runs import Stop, crash, iterations, last, refusal, resume, run
from train.files import owned
from train.step import TrainStep


@pytest.mark.parametrize("resumed", [False, True])
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, resumed):
    out_dir = tmp_path / "out"
    if resumed:
        run(out_dir, max_iters=4)

    def second(step: TrainStep) -> None:
        before = {path: path.read_bytes() for path in out_dir.iterdir()}
        for again, settings in ((run, {}), (resume, {}), (run, {"seed": 2, "always_save_checkpoint": False})):
            message = refusal(again, out_dir, **settings)
            assert f"out_dir: {out_dir} belongs to a run that has not ended" in message
        assert run(out_dir, eval_only=True) == 0  # it only reads
        if resumed:
            assert resume(out_dir, eval_only=True) == 0
        assert {path: path.read_bytes() for path in out_dir.iterdir()} == before

    (resume if resumed else run)(out_dir, at={1: second}, max_iters=6)
    assert last(out_dir)["iter_num"] == 6
    assert iterations(out_dir, "iter") == list(range(6))
    assert not list(out_dir.glob("earlier-*"))
    assert resume(out_dir, max_iters=7) == 0  # the first one has let go


def test_a_run_that_died_holds_nothing(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path / "out", at={3: crash})
    assert resume(tmp_path / "out", max_iters=4) == 0


def test_a_refused_run_leaves_no_folder(tmp_path):
    refusal(run, tmp_path / "out", dataset=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def test_a_file_system_without_locks_holds_nothing(tmp_path, monkeypatch):
    """Windows has no fcntl."""
    monkeypatch.setattr("train.files.fcntl", None)
    with owned(tmp_path / "out"), owned(tmp_path / "out"):
        assert Path(tmp_path / "out").is_dir()
    assert run(tmp_path / "out", max_iters=2) == 0
