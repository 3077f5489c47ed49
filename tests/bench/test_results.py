"""Results files: what is written is what is read, and what is not a results file is refused by its field."""

import json
from pathlib import Path

import pytest
import torch
from msgspec import to_builtins

from bench import results
from bench.results import Session
from tests.bench.made import cpu, h100

COMMITTED = Path(__file__).parents[2] / "bench" / "results"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    for made in (h100(), cpu(), Session(torch.device("cpu"), torch.float32, "python -m bench").results):
        results.write(path, made)
        assert results.read(path) == made
    for committed in COMMITTED.glob("*.json"):
        assert results.read(committed).complete


def changed(part: str = "", **fields: object) -> str:
    """A file with some fields of it, or of the first row of a part, changed."""
    whole = json.loads(json.dumps(to_builtins(h100())))
    (whole[part][0] if part else whole).update(fields)
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "truncated"),
        ('{"a": 1}', "missing required field `device`"),
        (changed(version=2, new=1), "enum value 2 - at `$.version`"),
        (changed(format="x\n\x1b[31m" * 900), "at `$.format`"),
        (changed("ceilings", rates=[]), "length >= 1 - at `$.ceilings[0].rates`"),
        (changed("steps", seconds=[0.1, 0.0]), "Expected `float` > 0.0 - at `$.steps[0].seconds[1]`"),
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
