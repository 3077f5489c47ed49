"""Results files: what is written is what is read, and what is not a results file is refused by its field."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec import to_builtins
from msgspec.structs import replace

from bench import results
from bench.results import Ceiling, Session
from tests.bench.made import cpu, h100

WHOLE = json.loads(json.dumps(to_builtins(h100())))
SHAPE = WHOLE["steps"][0]["shape"]
COMMITTED = Path(__file__).parents[2] / "bench" / "results"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    for made in (h100(), cpu(), Session(torch.device("cpu"), torch.float32, "python -m bench").results):
        results.write(path, made)
        assert results.read(path) == made
    for committed in COMMITTED.glob("*.json"):
        assert results.read(committed).complete
    with pytest.raises(ValueError, match=r"got `null` - at `\$\.ceilings\[0\]\.rates\[0\]`"):
        results.write(path, replace(cpu(), ceilings=[Ceiling("copy", "", [float("nan")])]))
    assert results.read(path) == made  # still whole


def changed(part: str = "", **fields: object) -> str:
    """The file with some fields of it, or of the first row of a part, changed."""
    whole = json.loads(json.dumps(WHOLE))
    (whole[part][0] if part else whole).update(fields)
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "truncated"),
        ('{"a": 1}', "missing required field `device`"),
        (changed(version=2, new=1), "enum value 2 - at `$.version`"),
        (changed(format="x\n\x1b[31m" * 900), "at `$.format`"),
        (changed(complete=1), "Expected `bool`, got `int` - at `$.complete`"),
        (changed(peak={"flops": 0.0, "source": ""}), "peak: got 0.0 FLOP/s, expected more than 0"),
        (changed("ceilings", rates=[None]), "got `null` - at `$.ceilings[0].rates[0]`"),
        (changed("ceilings", rates=[]), "length >= 1 - at `$.ceilings[0].rates`"),
        (changed("steps", seconds=[float("inf")]), "malformed"),
        (changed("steps", seconds=[0.1, 0.0]), "Expected `float` > 0.0 - at `$.steps[0].seconds[1]`"),
        (changed("steps", seconds=[0.1] * 3, turn=2), "turn: got 2, expected a divisor of the 3 samples"),
        (changed("steps", shape={**SHAPE, "n_head": 7}), "n_head"),
        (changed("steps", shape={**SHAPE, "n_layer": 10**9}), "`int` <= 65536"),
        (changed("steps", tokens=-5), "Expected `int` >= 1 - at `$.steps[0].tokens`"),
        (changed("steps", peak_memory=-1), "Expected `int` >= 0 - at `$.steps[0].peak_memory`"),
        (changed("steps", first_round=-1), "Expected `int` >= 0 - at `$.steps[0].first_round`"),
        (changed("kernels", shape=[8, -3]), "Expected `int` >= 1 - at `$.kernels[0].shape[1]`"),
        (changed("kernels", flops=10**400), "is no results file"),
        ("[" * 100_000, "is no results file"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no results file of nanofuse-bench, version 1: ") as caught:
        results.read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert said.isprintable()
    assert len(said) <= 1005  # its middle is left out


def test_words_in_a_file_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(changed(device=WHOLE["device"] | {"name": "H100\x1b[31m\n# a heading" + "x" * 5000}))
    name = results.read(path).device.name
    assert name.startswith(r"H100\x1b[31m\n# a heading")
    assert len(name) < 1100


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(tmp_path: Path, put: Callable) -> None:
    put(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json: cannot be read: "):
        results.read(tmp_path / "x.json")
