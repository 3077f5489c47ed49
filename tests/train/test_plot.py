"""The loss curves: their content and format. They never make the end of a run fail."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from train.errors import UserError
from train.log import METRICS
from train.plot import COLOURS, main, plot_run, write_picture

SVG = "{http://www.w3.org/2000/svg}"
RUN = {"kind": "run", "iter": 0, "parameters": 10_646_784, "device": "<A & B $x$>"}


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


def draw(path, **runs):
    """The picture as an XML tree."""
    return ElementTree.parse(write_picture(path, runs)).getroot()


def words(picture):
    return [element.text for element in picture.iter(f"{SVG}text")]


def curves(picture, colour):
    """The points of every line of this colour, in drawing order."""
    paths = [path for path in picture.iter(f"{SVG}path") if f"stroke: {colour}" in path.get("style", "")]
    found = [re.findall(r"[ML] (\S+) (\S+)", path.get("d")) for path in paths if path.get("clip-path")]
    return [[(float(x), float(y)) for x, y in points] for points in found]


def test_a_run_alone(tmp_path):
    picture = draw(tmp_path / "loss.svg", out=RECORDS)
    expected = {"out: 10.65M parameters, <A & B $x$>", "validation, best 2.8125 at 75", "training", "iteration"}
    assert expected | {"training, evaluated", "loss, nats a token"} <= set(words(picture))
    (raw, smooth), (val,) = curves(picture, COLOURS[0]), curves(picture, COLOURS[1])
    assert (len(smooth), len(val)) == (100, 4)
    assert raw[0] == smooth[0]
    heights = [y for _, y in val]  # SVG counts downwards
    assert sorted(range(4), key=heights.__getitem__) == [0, 1, 3, 2]
    assert val[1][0] - val[0][0] == pytest.approx(2 * (val[2][0] - val[1][0]))  # iterations 0, 50, 75
    places = {(float(dot.get("x")), float(dot.get("y"))) for dot in picture.iter(f"{SVG}use")}
    assert set(val) <= places
    # the same every time, and it needs nothing but itself
    text = (tmp_path / "loss.svg").read_text()
    assert write_picture(tmp_path / "again.svg", {"out": RECORDS}).read_text() == text
    assert not re.search(r"(href|src)=\"(?!#)|@import|url\((?!#)", text)
    assert "prefers-color-scheme:dark" in text


@pytest.mark.parametrize("records", [[iteration(0, 0.0)], [evaluation(0, 4.0, 4.0), iteration(5, None)]])
@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's
def test_short_runs_have_a_picture_too(tmp_path, records):
    assert words(draw(tmp_path / "loss.svg", out=records))


def test_the_end_of_a_run_has_a_picture_or_none_but_never_fails(make_run, tmp_path, monkeypatch):
    folder, blocked = make_run(RECORDS), make_run(RECORDS, "blocked")
    (blocked / "loss.png").mkdir()
    assert plot_run(folder) == folder / "loss.png"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for nothing in (tmp_path / "nowhere", make_run([RUN], "no losses"), blocked):
        assert plot_run(nothing) is None
    for one in (folder, blocked):
        assert sorted(path.name for path in one.iterdir()) == ["loss.png", METRICS]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # a broken installation
    assert plot_run(folder) is None


def test_the_command(make_run, tmp_path, capsys, monkeypatch):
    make_run(RECORDS, "a/out"), make_run(RECORDS[:60], "b/out")
    monkeypatch.chdir(tmp_path)
    main(["a/out", "b/out", "--out=both.svg"])
    assert capsys.readouterr().out == "loss curve: both.svg\n"
    legend = [text for text in words(ElementTree.parse("both.svg").getroot()) if "best" in text]
    assert [text.split(",")[0] for text in legend] == ["a/out", "b/out"]
    monkeypatch.chdir(tmp_path / "a")
    main([])  # the folder "out"
    assert sorted(path.name for path in Path("out").iterdir()) == ["loss.png", METRICS]


def test_a_picture_goes_over_files_only(make_run, tmp_path):
    folder, nowhere, link = make_run(RECORDS), tmp_path / "nowhere", tmp_path / "link.svg"
    link.symlink_to("/dev/null")
    for arguments, message in (
        ([folder, f"--out={link}"], r"out: cannot write .*link.svg: it is .*, expected a regular file"),
        ([folder, "--out=missing/loss.svg"], r"out: cannot write missing/loss.svg: No such file or directory"),
        ([folder, f"--out={tmp_path}/loss.doc"], r"out: cannot write .*loss.doc: Format 'doc' is not supported .*png"),
        ([nowhere], r"out_dir: cannot read .*nowhere.metrics.jsonl: No such file or directory"),
        ([make_run([RUN], "begun")], r"metrics.jsonl: no losses yet in .*begun"),
    ):
        with pytest.raises(UserError, match=message):
            main(list(map(str, arguments)))
    assert link.is_symlink()
