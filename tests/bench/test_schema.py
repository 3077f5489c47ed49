"""Results files: what is written is what is read, and what is not a results file is refused by its field."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import schema
from bench.schema import Ceiling, Commit, Device, Kernel, Results, Software, Step

WHOLE = Results(
    device=Device("NVIDIA H100 80GB HBM3", "cuda", memory=80 * 2**30, capability=[9, 0], driver="580.1"),
    software=Software("3.12.1", "2.11.0", "3.6.0", "13.0", "9.1"),
    commit=Commit("0123456789ab", clean=True),
    date="2026-11-22T10:00:00Z",
    command="python -m bench",
    ceilings=[Ceiling("matmul", "bfloat16", [7e14, 7.5e14, 7.2e14])],
    kernels=[Kernel("gelu", [32768, 3072], "bfloat16", "forward", "fused", [1e-4, 2e-4], bytes=402653184)],
    steps=[Step("gpt2", "ours eager", True, "bfloat16", 32768, {"nanogpt": 2.8e13}, [0.05], losses=[10.9])],
    complete=True,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    schema.write(path, WHOLE)
    assert schema.read(path) == WHOLE
    assert json.loads(path.read_text())["kernels"][0]["seconds"] == [1e-4, 2e-4]


def test_a_ceiling_is_the_best_rate() -> None:
    assert WHOLE.ceiling("matmul") == 7.5e14
    assert WHOLE.ceiling("copy") is None


def test_numbers_that_are_none_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        schema.write(tmp_path / "a.json", Results(**{**vars(WHOLE), "ceilings": [Ceiling("copy", "", [float("nan")])]}))
    assert not (tmp_path / "a.json").exists()


def changed(**fields) -> str:
    return json.dumps({**asdict(WHOLE), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a results file: it has no format 'nanofuse-bench'"),
        ('{"device": 1}', "is not a results file"),
        (changed(version=2), "has version 2, expected 1"),
        (changed(device={"name": "x"}), "device: the field 'type' is missing"),
        (changed(device={"name": "x", "type": "cpu", "color": 1}), "device: got the unknown field 'color'"),
        (changed(device=3), "device: got 3, expected an object"),
        (changed(complete=1), "complete: got 1, expected bool"),
        (changed(date=None), "date: got None, expected str"),
        (changed(ceilings={}), r"ceilings: got \{\}, expected list"),
        (changed(ceilings=[{"what": "copy", "dtype": "", "rates": 1.5}]), r"ceilings\[0\].rates: got 1.5"),
        (changed(kernels=[{**asdict(WHOLE.kernels[0]), "seconds": ["1"]}]), r"kernels\[0\].seconds\[0\]: got '1'"),
        (changed(steps=[{**asdict(WHOLE.steps[0]), "flops": {"6n": None}}]), r"steps\[0\].flops.6n: got None"),
        (changed(steps=[{**asdict(WHOLE.steps[0]), "seconds": [float("inf")]}]), r"steps\[0\].seconds\[0\]: got inf"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        schema.read(path)
