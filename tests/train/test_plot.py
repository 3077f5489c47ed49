"""The loss curves: their content and format. They never make the end of a run fail."""

import json
import os
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


ITERATIONS = [iteration(i, 4.2 - i / 50) for i in range(100)]
EVALUATIONS = [evaluation(*row) for row in ((0, 4.2, 4.25), (50, 3.1, 3.2), (75, 2.7, 2.8125), (100, 2.2, 3.0))]
RECORDS = [RUN, *ITERATIONS, *EVALUATIONS]


def make_run(folder, records):
    folder.mkdir(parents=True)
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def words(path):
    return [element.text for element in ElementTree.parse(path).iter(f"{SVG}text")]


def curves(path, colour):
    """The points of every line of this colour, in drawing order."""
    lines = [line for line in ElementTree.parse(path).iter(f"{SVG}path") if line.get("clip-path")]
    mine = [line.get("d") for line in lines if f"stroke: {colour}" in line.get("style")]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in mine]


def test_a_run_alone(tmp_path):
    path = write_picture(tmp_path / "loss.svg", {"out": RECORDS})
    expected = {"out: 10.65M parameters, <A & B $x$>", "validation, best 2.8125 at 75", "training", "iteration"}
    assert expected | {"training, evaluated", "loss, nats a token"} <= set(words(path))
    (raw, smooth), (val,) = curves(path, COLOURS[0]), curves(path, COLOURS[1])
    assert (len(smooth), len(val)) == (100, 4)
    assert raw[0] == smooth[0]
    heights = [y for _, y in val]  # SVG counts downwards
    assert sorted(range(4), key=heights.__getitem__) == [0, 1, 3, 2]
    assert val[1][0] - val[0][0] == pytest.approx(2 * (val[2][0] - val[1][0]))  # iterations 0, 50, 75
    # the same every time, and it needs nothing but itself
    text = path.read_text()
    assert write_picture(tmp_path / "again.svg", {"out": RECORDS}).read_text() == text
    assert not re.search(r"(href|src)=\"(?!#)|@import|url\((?!#)", text)
    assert "prefers-color-scheme:dark" in text


HUGE = int("9" * 400)
WILD = [
    {"kind": "run", "iter": 0, "parameters": HUGE},
    {"kind": "iter", "iter": 9},
    *(iteration(i, loss) for i, loss in enumerate([None, 1.0, 1e308, HUGE])),
    *(evaluation(i, *losses) for i, losses in [(HUGE, (1.0, 1.0)), (3, (-1e308, [1.0])), (-(10**30), ("x", 1e308))]),
    {"kind": "eval", "iter": "5", "val_loss": 1.0},
]


@pytest.mark.parametrize("records", [[iteration(0, 0.0)], [evaluation(0, 4.0, 4.0), iteration(5, None)], WILD])
@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's
def test_odd_runs_have_a_picture_too(tmp_path, records):
    assert words(write_picture(tmp_path / "loss.svg", {"out": records}))


def test_the_end_of_a_run_has_a_picture_or_none_but_never_fails(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "out", RECORDS)
    assert plot_run(folder) == folder / "loss.png"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for nothing in (tmp_path / "nowhere", make_run(tmp_path / "no losses", [RUN])):
        assert plot_run(nothing) is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # a broken installation
    assert plot_run(folder) is None


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(make_run(tmp_path / "a" / "out", RECORDS).parent)
    main([])  # the folder "out"
    assert sorted(path.name for path in Path("out").iterdir()) == ["loss.png", METRICS]
    make_run(Path("oth\x1ber"), EVALUATIONS)
    main(["out", "oth\x1ber", "--out=both.svg"])
    assert capsys.readouterr().out == "loss curve: out/loss.png\nloss curve: both.svg\n"
    assert [text.split(",")[0] for text in words("both.svg") if "best" in text] == ["out", r"oth\x1ber"]
    Path("link.svg").symlink_to("/dev/null")
    make_run(Path("deep"), []).joinpath(METRICS).write_text('{"kind": "run", "iter": ' + "[" * 10**5)
    os.mkfifo(make_run(Path("piped"), []) / "pipe")
    os.replace("piped/pipe", Path("piped") / METRICS)
    for arguments, message in (
        (["--out=link.svg"], r"out: cannot write link.svg: it is .*, expected a regular file"),
        (["--out=loss.doc"], r"out: cannot write loss.doc: Format 'doc' is not supported .*png"),
        (["deep"], r"metrics.jsonl: no losses yet in deep"),
        (["piped"], r"out_dir: cannot read piped.metrics.jsonl: not a regular file"),
        (["nowhere"], r"out_dir: cannot read nowhere.metrics.jsonl: No such file or directory"),
        ([str(make_run(Path("begun"), [RUN]))], r"metrics.jsonl: no losses yet in begun"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
