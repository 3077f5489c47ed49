"""The pictures: what is in them, which format is chosen, and that a run's end never fails on them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from train.errors import UserError
from train.log import METRICS
from train.plot import main, plot_run, write_picture

SVG = "{http://www.w3.org/2000/svg}"
PNG = b"\x89PNG\r\n\x1a\n"
RUN = {"kind": "run", "iter": 0, "parameters": 10_646_784, "device": "<A & B>"}


def iteration(i, loss):
    return {"kind": "iter", "iter": i, "loss": loss}


def evaluation(i, train, val):
    return {"kind": "eval", "iter": i, "train_loss": train, "val_loss": val}


RECORDS = [
    RUN,
    evaluation(0, 4.2, 4.25),
    *(iteration(i, 4.2 - i / 50) for i in range(100)),
    evaluation(50, 3.1, 3.2),
    evaluation(75, 2.7, 2.8125),
    evaluation(100, 2.2, 3.0),
]


@pytest.fixture
def make_run(tmp_path):
    def make_run(records, name="out"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return make_run


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


def draw(path, **runs):
    """The picture as an XML tree."""
    return ElementTree.parse(write_picture(path, runs)).getroot()


def words(picture):
    return [element.text for element in picture.iter(f"{SVG}text")]


def lines(picture):
    """The points of every line, in drawing order."""
    found = [element.get("points").split() for element in picture.iter(f"{SVG}polyline")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in found]


def test_a_run_alone(tmp_path):
    picture = draw(tmp_path / "loss.svg", out=RECORDS)
    text = words(picture)
    assert "out: 10.65M parameters, <A & B>" in text
    assert "validation, best 2.8125 at 75" in text
    assert {"training", "training, evaluated", "iteration", "loss, nats a token"} <= set(text)
    raw, smooth, val = lines(picture)
    assert (len(raw), len(smooth), len(val)) == (100, 100, 4)
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in picture.iter(f"{SVG}circle")]
    assert len(circles) == 4 + 4 + 1
    assert circles[-1] == val[2]  # the ring is around the best


def test_points_lie_where_the_axes_say(tmp_path):
    picture = draw(tmp_path / "loss.svg", out=RECORDS)
    places = {t.text: (float(t.get("x")), float(t.get("y"))) for t in picture.iter(f"{SVG}text")}
    val = lines(picture)[-1]
    assert val[0][0] == pytest.approx(places["0"][0], abs=0.1)
    assert val[-1][0] == pytest.approx(places["100"][0], abs=0.1)
    assert val[-1][1] == pytest.approx(places["3"][1] - 4, abs=0.1)  # a label's baseline is 4 below its line


def test_several_runs(tmp_path):
    other = [evaluation(0, 4.0, 4.0), evaluation(200, 1.0, 1.5)]
    picture = draw(tmp_path / "loss.svg", mine=RECORDS, yours=other)
    assert {"mine, best 2.8125 at 75", "yours, best 1.5000 at 200"} <= set(words(picture))
    smooth, mine, yours = lines(picture)
    assert (len(smooth), len(mine), len(yours)) == (100, 4, 2)


def test_smoothing_takes_out_noise_and_keeps_the_start(tmp_path):
    noisy = [iteration(i, 3.0 + (-1) ** i) for i in range(1200)]
    raw, smooth = lines(draw(tmp_path / "loss.svg", out=noisy))
    assert smooth[0] == raw[0]

    def swing(line):
        return max(y for _, y in line) - min(y for _, y in line)

    assert 0 < swing(smooth[100:]) < 0.1 * swing(raw)


def test_a_long_run_makes_no_large_file(tmp_path):
    path = write_picture(tmp_path / "loss.svg", {"out": [iteration(i, 3.0 + i % 7) for i in range(200_000)]})
    assert path.stat().st_size < 100_000
    assert len(lines(ElementTree.parse(path).getroot())[0]) > 500


@pytest.mark.parametrize(
    "records",
    [
        [iteration(0, 4.0)],
        [evaluation(0, 4.0, 4.0)],
        [evaluation(7, None, 4.0), iteration(8, None), {"kind": "iter", "iter": 9}],
        [iteration(0, 0.0), iteration(1, 0.0)],
        [iteration(10**7, 1e-9), iteration(2 * 10**7, 1e9)],
    ],
)
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_odd_runs_have_a_picture_too(tmp_path, records, suffix):
    if suffix == ".png":
        pytest.importorskip("matplotlib")
    assert write_picture(tmp_path / f"loss{suffix}", {"out": records}).stat().st_size > 500


def test_the_end_of_a_run_with_matplotlib(make_run):
    pytest.importorskip("matplotlib")
    folder = make_run(RECORDS)
    assert plot_run(folder) == folder / "loss.png"
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in folder.iterdir()) == ["loss.png", METRICS]


def test_the_end_of_a_run_without_matplotlib(make_run, no_matplotlib):
    folder = make_run(RECORDS)
    assert plot_run(str(folder)) == folder / "loss.svg"
    assert sorted(path.name for path in folder.iterdir()) == ["loss.svg", METRICS]


def test_the_end_of_a_run_never_fails(make_run, tmp_path, monkeypatch):
    assert plot_run(tmp_path / "nowhere") is None
    assert plot_run(make_run([RUN], "no losses")) is None
    assert plot_run(make_run([], "empty")) is None
    blocked = make_run(RECORDS, "blocked")
    for name in ("loss.png", "loss.svg"):
        (blocked / name).mkdir()
    assert plot_run(blocked) is None
    assert sorted(path.name for path in blocked.iterdir()) == ["loss.png", "loss.svg", METRICS]


def test_the_old_picture_stays_when_the_new_one_cannot_be_drawn(tmp_path):
    path = tmp_path / "loss.svg"
    path.write_text("old")
    with pytest.raises(UserError, match=r"metrics.jsonl: no losses yet in out"):
        write_picture(path, {"out": [RUN]})
    assert path.read_text() == "old"


def test_the_command(make_run, tmp_path, capsys):
    first, second = make_run(RECORDS, "a/out"), make_run(RECORDS[:60], "b/out")
    picture = tmp_path / "both.svg"
    main([str(first), str(second), f"--out={picture}"])
    assert capsys.readouterr().out == f"loss curve: {picture}\n"
    legend = [text for text in words(ElementTree.parse(picture).getroot()) if "best" in text]
    assert [text.split(",")[0] for text in legend] == [str(first), str(second)]  # both are called out


def test_the_command_without_matplotlib(make_run, no_matplotlib, monkeypatch, tmp_path):
    folder = make_run(RECORDS)
    main([f"--out_dir={folder}"])
    assert (folder / "loss.svg").exists()
    monkeypatch.chdir(tmp_path)
    main([])  # the folder called out
    with pytest.raises(UserError, match=r"out: \.png needs matplotlib; .*pip install 'nanofuse\[plot\]'"):
        main([f"--out={folder / 'loss.png'}"])


def test_bad_input(make_run, tmp_path):
    folder = make_run(RECORDS)
    with pytest.raises(UserError, match=r"out_dir: cannot read .*nowhere.metrics.jsonl: No such file or directory"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"out: cannot write .*missing.loss.svg: No such file or directory"):
        main([str(folder), f"--out={tmp_path / 'missing' / 'loss.svg'}"])
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"out: got a name ending in '\.doc', expected .*\.png"):
        main([str(folder), f"--out={tmp_path / 'loss.doc'}"])
    assert not list(tmp_path.glob("*loss*"))


def test_exit_status(tmp_path):
    command = [sys.executable, "-m", "train.plot", str(tmp_path / "nowhere")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: out_dir: cannot read .*\n", done.stderr)


def test_help(capsys):
    main(["--help"])
    assert "python -m train.plot [OUT_DIR ...]" in capsys.readouterr().out
