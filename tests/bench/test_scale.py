"""The scale plan: its arithmetic by hand, what must hold whatever the numbers, and the command."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from bench import results, scale
from bench.results import Ceiling, Device, Peak, Step
from bench.scale import Fabric, Job, predict, traffic
from bench.workloads import WORKLOADS
from tests.bench.made import h100
from train.errors import UserError

GPT2 = Job(WORKLOADS["gpt2"].config, 32)
RATES = (1e15, 3e12)  # FLOP/s, bytes/s
HAND = Fabric(8, inside=100.0, between=10.0, hop_inside=1.0, hop_between=2.0, call=5.0)
PLAIN = Fabric(8, inside=1.0, between=1.0)  # two devices all-reduce S bytes in S seconds

# Collectives


@pytest.mark.parametrize(
    ("devices", "seconds"),
    [
        (1, 0.0),
        (4, 2 * (3 / 4 * 80 / 100 + 3 * 1) + 5),
        (8, 2 * (7 / 8 * 80 / 100 + 7 * 1) + 5),
        (16, 2 * (7 / 8 * 80 / 100 + 7 * 1) + 2 * (1 / 2 * 80 / 8 / 10 + 1 * 2) + 5),  # a ring over 2 nodes
        (512, 2 * (7 / 8 * 80 / 100 + 7 * 1) + 2 * (80 / 8 / 10 + 6 * 2) + 5),  # trees over 64
    ],
)
def test_an_all_reduce(devices: int, seconds: float) -> None:
    assert HAND.seconds(80, devices, all_reduce=True) == pytest.approx(seconds)


def test_an_all_gather() -> None:
    assert HAND.seconds(80, 1) == 0
    assert HAND.seconds(80, 16) == pytest.approx((7 / 8 * 80 / 100 + 7) + (1 / 2 * 80 / 8 / 10 + 2) + 5)


# One device's share


@pytest.mark.parametrize(
    ("devices", "batch_size", "accumulation"),
    [(1, 32, 15), (2, 30, 8), (8, 30, 2), (64, 8, 1), (480, 1, 1), (1024, 1, 1)],  # 480 sequences
)
def test_sharing_out_nanogpts_iteration(devices: int, batch_size: int, accumulation: int) -> None:
    job = GPT2.share_out(491520, devices)
    assert (job.batch_size, job.accumulation) == (batch_size, accumulation)


def test_what_ranks_exchange_of_gpt2() -> None:
    pieces, block, rest = traffic(GPT2)
    assert sum(pieces) == 4 * 124_373_760  # float32, whatever is computed in
    assert pieces[0] == 4 * 50304 * 768  # the token embedding by itself
    assert len(pieces) == 11
    assert block == 12 * 768**2 + 2 * 768
    assert 12 * block + rest == 124_373_760


def test_floors_of_a_step() -> None:
    """Of sums in float32, an optimizer reads gradients twice as wide: 2 n bytes more twice, and as many cleared."""
    n, alone, several = 124_373_760, GPT2.floors(RATES, several=False), GPT2.floors(RATES, several=True)
    assert several[1] - alone[1] == pytest.approx(3 * 2 * n / 3e12)
    assert several[0] - alone[0] == pytest.approx(n * (2 + 2 * 4) / 3e12)
    wide = replace(GPT2, compute=4)
    assert wide.floors(RATES, several=True) == wide.floors(RATES, several=False)


# Steps


def with_micro(seconds: float) -> tuple[Job, float]:
    """A job, and the slowness by which a micro-step of several ranks takes so long."""
    return GPT2, seconds / GPT2.floors(RATES, several=True)[0]


def test_the_measured_step_is_predicted_of_one_device() -> None:
    for job in (GPT2, replace(GPT2, accumulation=5)):
        slow = job.slowness(0.5, RATES)
        predicted = predict(job, RATES, slow, traffic(job), HAND, 1, overlap=False, shard=False)
        assert predicted.seconds == pytest.approx(0.5)
        assert predicted.communication == 0


@pytest.mark.parametrize(
    ("micro", "overlap", "exposed"),
    [
        (9.0, True, 40 - 6),  # a backward pass of 6 s hides as much of 40 s
        (30.0, True, 30),  # of 20 s: all but the embedding's, which comes last
        (30.0, False, 40),
    ],
)
def test_a_step_of_two_devices(micro: float, overlap: bool, exposed: float) -> None:
    job, slow = with_micro(micro)
    job = replace(job, accumulation=3)
    predicted = predict(job, RATES, slow, ([30, 10], 0, 0), PLAIN, 2, overlap=overlap, shard=False)
    update = slow * job.floors(RATES, several=True)[1]
    assert predicted.communication == 40
    assert predicted.exposed == pytest.approx(exposed)
    assert predicted.seconds == pytest.approx(3 * micro + update + exposed)


@pytest.mark.parametrize(
    ("micro", "overlap", "exposed"),
    [
        (60.0, True, (128 - 20) + (376 - 40)),
        (900.0, True, 8 + 16),  # what comes before the first block and after it
        (900.0, False, 128 + 376),
    ],
)
def test_a_sharded_step_of_two_devices(micro: float, overlap: bool, exposed: float) -> None:
    """Two bytes an element gathered, four scattered; half of it travels: 8 and 16 of the rest, 10 and 20 a block."""
    job, slow = with_micro(micro)
    job = replace(job, accumulation=2)
    predicted = predict(job, RATES, slow, ([], 10, 8), PLAIN, 2, overlap=overlap, shard=True)
    update = slow * job.floors(RATES, several=True)[1] / 2
    assert predicted.communication == 2 * (8 + 12 * 10 + 12 * (10 + 20) + 16)
    assert predicted.exposed == pytest.approx(2 * exposed)
    assert predicted.seconds == pytest.approx(2 * micro + update + 2 * exposed)


# The command


def file(tmp_path: Path, *rows: Step, **fields: object) -> str:
    """A results file of an H100 with these steps."""
    ceilings = [Ceiling("matmul", "bfloat16", [700e12]), Ceiling("copy", "float32", [3e12])]
    whole = {"peak": Peak(989e12, "NVIDIA H100 data sheet"), "ceilings": ceilings, "kernels": [], "steps": list(rows)}
    results.write(tmp_path / "results.json", structs.replace(h100(), **whole | fields))
    return str(tmp_path / "results.json")


def row(variant: str, seconds: float, batch_size: int = 32, **fields: object) -> Step:
    flops, shape = {"nanogpt": 1.0, "6n": 1.0}, structs.replace(WORKLOADS["gpt2"].shape, batch_size=batch_size)
    known = {"compares": True, "dtype": "bfloat16", "tokens": batch_size * 1024, "seconds": [seconds] * 3}
    return Step(workload="gpt2", variant=variant, flops=flops, shape=shape, **known | fields)


def cells(text: str, size: str) -> list[list[str]]:
    """The rows of a size's table."""
    block = next(block for block in text.split("\n\n") if block.startswith((f"{size}:", f"{size} (")))
    return [line.split() for line in block.splitlines()[3:]]


def test_a_measured_step_in_the_table(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        row("reference compiled", 0.01),  # not ours
        row("LayerNorm", 0.01, compares=False),
        row("ours eager", 0.09),
        row("ours graphed", 0.07),
        structs.replace(row("ours compiled", 0.01), seconds=[], skipped="no compiler"),
    )
    config = scale.ScaleConfig(path, sizes="gpt2,gpt2-medium", devices="1,8", tokens=32 * 1024)
    text = scale.report(config)
    assert "measured    gpt2: 70.00 ms for 32,768 tokens, ours graphed, bfloat16, median of 3" in text
    assert "ESTIMATE    gpt2-medium: the roofline floor" in text
    assert "gpt2-medium (ESTIMATE from the floor)" in text
    assert "700 TFLOP/s of a large matmul" in text
    assert "data sheet  450 GB/s in one direction between devices of a node, NVLink 4" in text
    assert "nothing hides exchanges, since a graph or a compiled pass ends before they begin: gpt2," in text
    one, eight = cells(text, "gpt2")
    flops = 6 * (124_373_760 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert one[:4] == ["1", "1", "x", "32"]
    assert one[4:9] == ["32,768", "70.00", "0.00", "0.00", f"{32768 / 0.07:,.0f}"]
    assert one[9] == f"{flops * 32768 / 0.07 / 989e12:.1%}"
    assert one[-2] == "100.0%"
    assert eight[1:5] == ["1", "x", "4", "32,768"]
    sums = sum(
        scale.fabric_of(config, "NVIDIA H100 80GB HBM3")[0].seconds(4 * n, 8, all_reduce=True) for n in [124_373_760]
    )
    assert float(eight[6]) == pytest.approx(1e3 * (sums + 10 * (8.4 + 2 * 7 * 3.4) / 1e6), abs=0.02)  # in 11 exchanges
    assert eight[6] == eight[7]


def test_an_eager_step_hides_and_a_sharded_one_is_never_a_graph(tmp_path: Path) -> None:
    config = scale.ScaleConfig(file(tmp_path, row("ours eager", 0.07)), sizes="gpt2", devices="8")
    text = scale.report(config)
    assert "the backward pass hides exchanges: gpt2" in text
    (eight,) = cells(text, "gpt2")
    assert float(eight[7]) < float(eight[6])
    path = file(tmp_path, row("ours eager", 0.09), row("ours graphed", 0.07))
    text = scale.report(replace(config, results=path, shard=True))
    assert "gpt2: 90.00 ms" in text
    assert "each micro-step gathers the blocks twice" in text


def test_between_measured_batches(tmp_path: Path) -> None:
    """Of batches 1 and 3, measured at 10 and 2 times their floors, a batch of 2 takes 6 times its own."""
    rates = 700e12, 3e12
    floor = {n: replace(GPT2, batch_size=n).slowness(1.0, rates) ** -1 for n in (1, 2, 3)}
    path = file(tmp_path, row("ours eager", 10 * floor[1], 1), row("ours graphed", 2 * floor[3], 3))
    config = scale.ScaleConfig(path, sizes="gpt2", devices="1", scaling="weak", batch_size=2)
    ((*_, batch, _, milliseconds, _, _, _, _, _, _, _),) = cells(scale.report(config), "gpt2")
    assert batch == "2"
    assert float(milliseconds) == pytest.approx(1e3 * 6 * floor[2], abs=0.01)


def test_estimates_need_no_file() -> None:
    text = scale.report(scale.ScaleConfig(device="4090", sizes="gpt2", devices="1,1024"))
    assert "data sheet  165.2 TFLOP/s" in text
    assert "32 GB/s in one direction between devices of a node, PCIe 4 x16" in text
    assert "ESTIMATE" in text
    assert cells(text, "gpt2")[1][0] == "1,024"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--results=none.json", "results: none.json: cannot be read: No such file or directory"),
        ("--results=bad.json", "results: bad.json: is no results file of nanofuse-bench, version 1: got format"),
        ("--device=H1000", "device: got 'H1000', expected one that train/hardware.py knows"),
        ("--devices=1,two", "devices: got 'two', expected whole numbers from 1, separated by commas"),
        ("--devices=12", "devices: got 12, expected at most 8, which a node has, or a multiple of it"),
        ("--sizes=gpt3", "sizes: got 'gpt3', expected some of: cpu, shakespeare_char, gpt2,"),
        ("--link_share=1.5", "link_share: got 1.5, expected at least"),
    ],
)
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["bench.scale", argument])
    with pytest.raises(UserError) as error:
        scale.main()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert error.value.status == 2


def test_a_file_without_ceilings_of_a_device_that_nobody_knows(tmp_path: Path) -> None:
    path = file(tmp_path, device=Device("AMD EPYC", "cpu"), ceilings=[])
    with pytest.raises(UserError, match=r"it has no ceilings, and no data sheet of AMD EPYC is known"):
        scale.report(scale.ScaleConfig(path))
