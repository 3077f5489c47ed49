"""The scale plan: its arithmetic by hand, and the command."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from bench import results, scale
from bench.results import Machine
from bench.scale import Fabric, ScaleConfig, least_seconds, share_out
from bench.variants import WORKLOADS
from kernels import FUSED
from tests.bench.made import h100
from train.dryrun import Job
from train.errors import UserError

GPT2 = Job(WORKLOADS["gpt2"].config, 32, FUSED)
RATES = (1e15, 3e12)  # FLOP/s, bytes/s
HAND = Fabric(8, inside=100.0, between=10.0, hop_inside=1.0, hop_between=2.0, call=5.0)


@pytest.mark.parametrize(
    ("devices", "seconds"),
    [
        (1, 0.0),
        (4, 2 * (3 / 4 * 80 / 100 + 3 * 1) + 5),
        (16, 2 * (7 / 8 * 80 / 100 + 7 * 1) + 2 * (1 / 2 * 80 / 8 / 10 + 1 * 2) + 5),  # a ring over 2 nodes
        (512, 2 * (7 / 8 * 80 / 100 + 7 * 1) + 2 * (80 / 8 / 10 + 6 * 2) + 5),  # trees over 64
    ],
)
def test_an_all_reduce(devices: int, seconds: float) -> None:
    assert HAND.all_reduce(80, devices) == pytest.approx(seconds)


def test_the_least_time_of_a_step() -> None:
    """Of sums in float32, an optimizer reads gradients twice as wide, twice. The first micro-step writes them as wide,
    every other one reads and writes them."""
    alone, several, two, three = (
        least_seconds(replace(GPT2, accumulation=accumulation), RATES, devices)
        for accumulation, devices in ((1, 1), (1, 2), (2, 1), (3, 1))
    )
    assert several - alone == pytest.approx(124_373_760 * (2 * 2 + 2) / 3e12)
    assert two - several == pytest.approx(three - two)  # a micro-step
    update, sums = 124_373_760 * (2 + 2 + 24 + 2) / 3e12, 124_373_760 * 6 / 3e12
    assert two - several == pytest.approx(alone - update + sums)
    shared = [share_out(GPT2, 491520, devices) for devices in (1, 2, 13, 64, 1024)]  # 480 sequences; 37 for each of 13
    assert [(job.batch_size, job.accumulation) for job in shared] == [(32, 15), (30, 8), (19, 2), (8, 1), (1, 1)]


# The command


def cells(text: str, size: str) -> list[list[str]]:
    """The rows of a size's table."""
    block = next(block for block in text.split("\n\n") if block.startswith((f"{size}:", f"{size} (")))
    return [line.split() for line in block.splitlines()[3:]]


def test_a_measured_step_in_the_table(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    times = {"reference compiled": 0.01, "LayerNorm": 0.01, "ours eager": 0.09, "ours graphed": 0.07}
    steps = [WORKLOADS["gpt2"].row(name, seconds=[time] * 3) for name, time in times.items()]  # the first two: not ours
    steps.append(structs.replace(WORKLOADS["gpt2"].row("ours compiled"), skipped="no compiler"))
    results.write(path, structs.replace(h100(), steps=steps))
    text = scale.report(ScaleConfig(str(path), sizes="gpt2,gpt2-medium", devices="1,8", tokens=32 * 1024))
    for said in (
        "measured    gpt2: 70.00 ms for 32,768 tokens, ours graphed, bfloat16, median of 3",
        "ESTIMATE    gpt2-medium: the roofline floor",
        "gpt2-medium (ESTIMATE from the floor)",
        "measured    741.8 TFLOP/s of a large matmul",
        "data sheet  450 GB/s in one direction between devices of a node, NVLink 4",
    ):
        assert said in text
    one, eight = cells(text, "gpt2")
    flops = 6 * (124_373_760 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert one[:8] == ["1", "1", "x", "32", "32,768", "70.00", "0.00", f"{32768 / 0.07:,.0f}"]
    assert one[8:10] == [f"{flops * 32768 / 0.07 / 989e12:.1%}", "100.0%"]
    assert eight[1:5] == ["1", "x", "4", "32,768"]
    fabric = replace(HAND, inside=0.8 * 450e9, hop_inside=3.4e-6, call=8.4e-6)  # four fifths of NVLink 4
    assert float(eight[6]) == pytest.approx(1e3 * fabric.all_reduce(4 * 124_373_760, 8), abs=0.01)
    rates = [float(row[7].replace(",", "")) / int(row[0]) for row in (one, eight)]
    assert eight[9] == f"{rates[1] / rates[0]:.1%}"


def test_estimates_need_no_file() -> None:
    text = scale.report(ScaleConfig(device="4090", sizes="gpt2", devices="1,1024"))
    assert "data sheet  165.2 TFLOP/s" in text
    assert "32 GB/s in one direction between devices of a node, PCIe 4 x16" in text
    assert cells(text, "gpt2")[1][0] == "1,024"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--results=none.json", "results: none.json: cannot be read: No such file or directory"),
        ("--results=bare.json", "results: bare.json: it has no ceilings, and no data sheet of AMD EPYC is known"),
        ("--device=H1000", "device: got 'H1000', expected one that train/hardware.py knows"),
        ("--devices=1,two", "devices: got 'two', expected whole numbers from 1 to 8, which a node has, or multiples"),
        ("--devices=12", "devices: got 12, expected whole numbers from 1 to 8, which a node has, or multiples"),
    ],
)
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    results.write(Path("bare.json"), structs.replace(h100(), device=Machine("AMD EPYC", "cpu"), ceilings=[]))
    monkeypatch.setattr(sys, "argv", ["bench.scale", argument])
    with pytest.raises(UserError) as error:
        scale.main()
    assert str(error.value).startswith(message)
