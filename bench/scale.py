"""Predict a training step on several devices, and print every assumption: python -m bench.scale.

One device: a step takes `slowness` times its roofline floor (`model/work.py`). A measured step gives the slowness.
Without one it is 1, and the predicted time is a lower bound. Batches, micro-steps and sums in float32 that were not
measured take their floors times the slowness.

Several devices: each computes its micro-steps, then the gradients are summed, then each updates. An exchange costs
nothing while the backward pass hides it. The last exchange is never hidden: the gradients of the token embedding (also
the head's weight) are complete only at the end. Sharded (`train/shard.py`), each micro-step gathers the parameters in
the compute dtype: every block for the forward pass and again for the backward pass, the embeddings once. It scatters
all gradients in float32.

A ring of N devices reduces and scatters S bytes, or gathers them, in N - 1 hops (Patarasuk and Yuan 2009, "Bandwidth
optimal all-reduce algorithms"). An all-reduce is both, in one call.

    (N - 1) / N * S / bandwidth + (N - 1) * hop

With n nodes of g devices there are two levels. First the devices of each node exchange their data. Then each device
exchanges its part S / g with one device of each other node, through its own network card. With many nodes the hops take
long, so NCCL all-reduces over two binary trees instead, in 2 log2(n) hops (Sanders, Speck and Traeff 2009, "Two-tree
algorithms for full bandwidth broadcast, reduction and scan"). The faster of the two counts.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench import results
from bench.digest import short_name
from bench.results import Results, Step
from bench.tables import aligned
from bench.workloads import WORKLOADS
from model import GPT, GPTConfig, Precision
from model.flops import flops_per_token, mfu, num_params
from model.work import floor, step_work
from train import dryrun, errors
from train.distributed import Reducer, World
from train.errors import UserError
from train.flat import FlatState
from train.hardware import CARDS, DTYPES, lookup
from train.settings import command_line, setting, shown

Rates = tuple[float, float]  # FLOP/s of one device in the compute dtype, bytes/s of its memory
Traffic = tuple[list[int], int, int]  # bytes of each exchange of gradients; parameters of a block, outside the blocks
ABOUT = "Predict tokens/s and MFU of several devices, from one device's measured step and the links between them."
FORWARD, BACKWARD = 1 / 3, 2 / 3  # shares of a micro-step: each matmul has one forward and two backward
FLOAT32 = 4  # bytes
NETWORK, CALL = 14.0, 8.4  # microseconds: a hop between nodes, the start of any exchange
NCCL = "NCCL's own model, src/graph/tuning.cc"


@dataclass(frozen=True)
class ScaleConfig:
    results: str = setting("", "a results file of python -m bench; empty: estimates for --device")
    device: str = setting("H100", f"without a results file: {', '.join(CARDS)}, or torch's name of one")
    sizes: str = setting("gpt2,gpt2-medium,gpt2-large,gpt2-xl", f"of {', '.join(WORKLOADS)}")
    devices: str = setting("1,2,4,8,64,1024", "how many, separated by commas")
    scaling: str = setting("strong", "share an iteration out, or give each device as much", choices=("strong", "weak"))
    tokens: int = setting(491520, "strong: tokens of an iteration, of all devices (nanoGPT's)", low=1)
    accumulation: int = setting(1, "weak: micro-steps of each device", low=1)
    batch_size: int = setting(0, "sequences of a micro-step, at most; 0: as measured, or the workload's", low=0)
    shard: bool = setting(False, "parameters, gradients and moments shared out, as python -m train --shard does")
    overlap: str = setting("auto", "backward hides exchanges; auto: as the step does", choices=("auto", "yes", "no"))
    node: int = setting(8, "devices that one node has", group="links", low=1)
    intranode_gbyte: float = setting(0.0, "GB/s in one direction within a node; 0: by device", low=0.0)
    internode_gbit: float = setting(400.0, "Gbit/s of a device's network card", low=1e-3)
    link_share: float = setting(0.8, "of a link's rate that is reached", low=1e-3, below=1.0000001)


@dataclass(frozen=True)
class Job:
    """The work of one device in a step."""

    config: GPTConfig
    batch_size: int  # sequences of a micro-step
    accumulation: int = 1  # micro-steps
    compute: int = 2  # bytes of an element of the compute dtype

    @property
    def tokens(self) -> int:
        return self.accumulation * self.batch_size * self.config.block_size

    def floors(self, rates: Rates, *, several: bool) -> tuple[float, float]:
        """Least seconds of a micro-step and of the update. several: gradients of micro-steps or ranks are summed."""
        sizes = {"compute": self.compute, "gradients": FLOAT32 if several else self.compute, "fused_gelu": True}
        work = step_work(self.config, self.batch_size, accumulation=2, **sizes)
        seconds = {name: floor(part, *rates) for name, part in work.items()}
        update, sums = seconds.pop("optimizer") + seconds.pop("clearing"), seconds.pop("accumulation")
        added = several and self.compute < FLOAT32  # autograd itself sums float32 gradients
        return sum(seconds.values()) / 2 + added * sums, update

    def slowness(self, seconds: float, rates: Rates) -> float:
        """A measured step's seconds on one device, divided by its floor."""
        micro, update = self.floors(rates, several=self.accumulation > 1)
        return seconds / (self.accumulation * micro + update)

    def share_out(self, tokens: int, devices: int) -> "Job":
        """Each device's job in an iteration of `tokens`: equal micro-steps of at most this batch size.

        Shares are rounded up to whole sequences, so the iteration can be larger than requested.
        """
        sequences = math.ceil(tokens / (devices * self.config.block_size))
        accumulation = math.ceil(sequences / self.batch_size)
        return replace(self, batch_size=math.ceil(sequences / accumulation), accumulation=accumulation)

    def held(self, devices: int, *, shard: bool) -> int:
        """Bytes on each device, with the fused kernels."""
        from kernels import FUSED  # it needs Triton

        dtype = torch.float32 if self.compute == FLOAT32 else torch.bfloat16
        options = {"several": devices * self.accumulation > 1, "dtype": dtype, "shards": devices if shard else 1}
        job = dryrun.Job(self.config, self.batch_size, FUSED, accumulation=self.accumulation, **options)
        return dryrun.dry_run(job).total


@dataclass(frozen=True)
class Predicted:
    """A step on several devices, in seconds. exposed: the communication that nothing hides."""

    devices: int
    job: Job
    computing: float
    communication: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.computing + self.exposed


@dataclass(frozen=True)
class Fabric:
    """Nodes and links. Rates are bytes/s that one device reaches in one direction. Hops and calls are seconds."""

    node: int  # devices that one node has
    inside: float
    between: float
    hop_inside: float = 0.0
    hop_between: float = 0.0
    call: float = 0.0

    def seconds(self, size: float, devices: int, *, all_reduce: bool = False) -> float:
        """Seconds of one all-gather, reduce-scatter or all-reduce of `size` bytes in all; 0 for one device."""
        assert devices <= self.node or devices % self.node == 0, (devices, self.node)
        if devices == 1:
            return 0.0
        g = min(devices, self.node)
        n, part = devices // g, size / g
        inside = (g - 1) / g * size / self.inside + (g - 1) * self.hop_inside
        ring = (n - 1) / n * part / self.between + (n - 1) * self.hop_between
        if not all_reduce:
            return inside + ring + self.call
        tree = 2 * part / self.between + 2 * (n - 1).bit_length() * self.hop_between  # up the trees and down
        return 2 * inside + min(2 * ring, tree) + self.call


def traffic(job: Job) -> Traffic:
    """The exchanges, as `train/distributed.py` cuts the flat gradients. The first exchange's are complete last."""
    with torch.device("meta"):
        compute = torch.float32 if job.compute == FLOAT32 else torch.bfloat16
        model = GPT(job.config, precision=Precision(compute))
    pieces = [FLOAT32 * count for count in Reducer(World(), FlatState(model, in_float32=True)).sizes]
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    return pieces, block, num_params(job.config, non_embedding=False) - job.config.n_layer * block


def predict(
    job: Job, rates: Rates, slow: float, sent: Traffic, fabric: Fabric, devices: int, *, overlap: bool, shard: bool
) -> Predicted:
    """A step on `devices` devices. Each does `job`. slow: its slowness."""
    micro, update = (slow * part for part in job.floors(rates, several=devices * job.accumulation > 1))
    # (communication, computing that can hide it, the part that is never hidden), once or in each micro-step
    if shard and devices > 1:
        block, rest = (fabric.seconds(job.compute * count, devices) for count in sent[1:])
        block_back, rest_back = (fabric.seconds(FLOAT32 * count, devices) for count in sent[1:])
        blocks = job.config.n_layer
        forward = rest + blocks * block, FORWARD * micro, rest
        backward = blocks * (block + block_back) + rest_back, BACKWARD * micro, rest_back
        exchanges, times, update = (forward, backward), job.accumulation, update / devices
    else:
        each = [fabric.seconds(size, devices, all_reduce=True) for size in sent[0]]
        exchanges, times = ((sum(each), BACKWARD * micro, each[0]),), 1
    communication = times * sum(taken for taken, _, _ in exchanges)
    exposed = times * sum(max(alone, taken - window) for taken, window, alone in exchanges)
    computing = job.accumulation * micro + update
    return Predicted(devices, job, computing, communication, exposed if overlap else communication)


@dataclass(frozen=True)
class Base:
    """One device's step of one model, measured or estimated."""

    job: Job
    slow: dict[int, float]  # slowness, by sequences of a micro-step
    overlaps: bool  # the backward pass hides exchanges
    said: str
    measured: bool = True


def counts(text: str, node: int) -> list[int]:
    """Numbers of devices, sorted. UserError for no number, and for one above `node` that is no multiple of it."""
    found = []
    for part in text.split(","):
        count = int(part) if part.strip().isdecimal() else 0
        if count < 1:
            raise UserError(f"devices: got {shown(part)}, expected whole numbers from 1, separated by commas")
        if count > node and count % node:
            raise UserError(f"devices: got {count}, expected at most {node}, which a node has, or a multiple of it")
        found.append(count)
    return sorted(set(found))


def rates_of(config: ScaleConfig, found: Results | None) -> tuple[str, Rates, float, list[str]]:
    """(device's name, its rates, its peak, lines about them), as the file measured, else from data sheets."""
    card = CARDS.get(config.device.lower())
    name = found.device.name if found else card.name if card else config.device
    row = lookup(name)
    matmul, copy = (found.ceiling(what) if found else None for what in ("matmul", "copy"))
    if row is None and found is None:
        raise UserError(f"device: got {shown(config.device)}, expected one that train/hardware.py knows")
    if row is None and not (matmul and copy):
        raise UserError(f"results: {config.results}: it has no ceilings, and no data sheet of {name} is known")
    sheet = [f"{row.bf16:g} TFLOP/s, dense bfloat16", f"{row.bandwidth:g} GB/s"] if row else []
    said = [f"data sheet  {rate}, {row.source}" for rate in sheet] or ["", ""]
    if matmul:
        said[0] = f"measured    {matmul / 1e12:.4g} TFLOP/s of a large matmul"
    if copy:
        said[1] = f"measured    {copy / 1e9:.4g} GB/s of a large copy"
    rates = matmul or row.bf16 * 1e12, copy or row.bandwidth * 1e9
    if found is None:
        return name, rates, rates[0], said
    said.append(f"MFU         of {found.peak.flops / 1e12:.4g} TFLOP/s: {found.peak.source}")
    return name, rates, found.peak.flops, said


def fabric_of(config: ScaleConfig, device: str) -> tuple[Fabric, list[str]]:
    """The links, and lines about them."""
    row = lookup(device)
    link = row.link if row else None
    if link is None and not config.intranode_gbyte:
        raise UserError(f"intranode_gbyte: got 0.0, expected GB/s in one direction: no link of {device} is known")
    gbytes, share = config.intranode_gbyte or link.bandwidth, config.link_share
    hop = link.hop if link else NETWORK
    where = f"{gbytes:g} GB/s in one direction between devices of a node"
    said = [
        f"as set      {where}" if config.intranode_gbyte else f"data sheet  {where}, {link.name} ({link.source})",
        f"assumed     nodes of {config.node}; a network card of {config.internode_gbit:g} Gbit/s for each device",
        f"assumed     {share:.0%} of a link's rate is reached (NCCL's protocols cost about 20%: nccl-tests issue 212)",
        f"assumed     {CALL:g} us an exchange; a hop {hop:g} us within a node, {NETWORK:g} between ({NCCL})",
        "assumed     rings within nodes, rings or trees across; switches add nothing up, no other traffic",
    ]
    rates = share * gbytes * 1e9, share * config.internode_gbit / 8 * 1e9
    return Fabric(config.node, *rates, hop / 1e6, NETWORK / 1e6, CALL / 1e6), said


def base_of(name: str, config: ScaleConfig, found: Results | None, rates: Rates) -> Base:
    """Our fastest step of that model in the file; without one, its floor."""
    workload = WORKLOADS[name]
    rows = [row for row in found.steps if row.seconds and _fits(row, name, config)] if found else []
    if not rows:
        said = f"ESTIMATE    {name}: the roofline floor, faster than any device will be"
        batch_size = config.batch_size or workload.batch_size
        return Base(Job(workload.config, batch_size), {batch_size: 1.0}, False, said, measured=False)
    slow = {}
    for row in sorted(rows, key=lambda row: row.tokens / median(row.seconds)):  # of each batch, the fastest comes last
        sizes = row.shape.batch_size, row.shape.accumulation, DTYPES[row.dtype].itemsize
        job = Job(workload.config, *sizes)
        slow[job.batch_size] = job.slowness(median(row.seconds), rates)
    slow = dict(sorted(slow.items()))
    said = (
        f"measured    {name}: {1e3 * median(row.seconds):.2f} ms for {row.tokens:,} tokens, {row.variant}, {row.dtype}"
        f", median of {len(row.seconds)}\n            times its floor, by batch: "
    )
    said += ", ".join(f"{batch}: {times:.2f}" for batch, times in slow.items())
    overlaps = not any(word in row.variant for word in ("compiled", "graphed"))
    return Base(replace(job, batch_size=config.batch_size or job.batch_size), slow, overlaps, said)


def _fits(row: Step, name: str, config: ScaleConfig) -> bool:
    """Whether the row is our step of that model, and can run as configured."""
    same = row.shape.config == replace(WORKLOADS[name].config, dropout=0.0)
    return same and row.variant.startswith("ours") and not (config.shard and "graphed" in row.variant)


def report(config: ScaleConfig) -> str:
    """The whole prediction, as text."""
    names, devices = config.sizes.split(","), counts(config.devices, config.node)
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise UserError(f"sizes: got {shown(unknown[0])}, expected some of: {', '.join(WORKLOADS)}")
    try:
        found = results.read(Path(config.results)) if config.results else None
    except ValueError as error:
        raise UserError(f"results: {error}") from error
    device, rates, peak, said = rates_of(config, found)
    fabric, links = fabric_of(config, device)
    bases = {name: base_of(name, config, found, rates) for name in names}
    overlaps = {name: base.overlaps or config.shard for name, base in bases.items()}
    if config.overlap != "auto":
        overlaps = dict.fromkeys(names, config.overlap == "yes")
    head = f"Predicted, not measured: {short_name(device)}, {'sharded, ' * config.shard}{config.scaling} scaling"
    said = [*(base.said for base in bases.values()), *said, *links, *_assumptions(config, overlaps)]
    blocks = [head, "\n".join(said)]
    for name, base in bases.items():
        sent, predicted = traffic(base.job), []
        for count in devices:
            weak = replace(base.job, accumulation=config.accumulation)
            job = weak if config.scaling == "weak" else base.job.share_out(config.tokens, count)
            slow = float(np.interp(job.batch_size, list(base.slow), list(base.slow.values())))
            each = predict(job, rates, slow, sent, fabric, count, overlap=overlaps[name], shard=config.shard)
            predicted.append(each)
        size = f"{sum(sent[0]) / 1e9:.3f} GB of gradients in {len(sent[0])} exchanges"
        size = f"{base.job.config.n_layer} blocks and the embeddings, one by one" if config.shard else size
        mark = "" if base.measured else " (ESTIMATE from the floor)"
        blocks.append(f"{name}{mark}: {size}\n{table(predicted, peak, shard=config.shard)}")
    return "\n\n".join(blocks)


def _assumptions(config: ScaleConfig, overlaps: dict[str, bool]) -> list[str]:
    """The lines about the step itself, before the tables."""
    lines = [
        "as built    gradients are summed over ranks in float32; several micro-steps' too",
        "assumed     other batch sizes: times slower than the floor, interpolated between the measured ones",
        "assumed     a backward pass is 2/3 of a micro-step; ranks never wait for one that is slower",
        "estimated   GB that each device holds: train/dryrun.py, fused kernels, nothing computed again",
    ]
    if config.shard:
        lines += ["as built    each micro-step gathers the blocks twice and scatters gradients in float32; no graphs"]
    auto = config.overlap == "auto"
    source = "as built" if auto else "as set  "
    if hidden := [name for name, overlap in overlaps.items() if overlap]:
        lines.append(f"{source}    the backward pass hides exchanges: {', '.join(hidden)}")
    if exposed := [name for name, overlap in overlaps.items() if not overlap]:
        reason = ", since a graph or a compiled pass ends before they begin" if auto else ""
        lines.append(f"{source}    nothing hides exchanges{reason}: {', '.join(exposed)}")
    if config.scaling == "strong":
        shares = "shared out; shares rounded up to whole sequences"
        return [*lines, f"as set      {config.tokens:,} tokens an iteration, {shares}"]
    return [*lines, f"as set      each device the same: {config.accumulation} micro-steps"]


def table(predicted: list[Predicted], peak: float, *, shard: bool) -> str:
    """A row for each number of devices. Efficiency is tokens/s a device, relative to the first row."""
    head = ["devices", "batch", "tokens/iter", "ms/iter", "comm ms", "exposed", "tokens/s", "MFU", "MFU 6N", "effic."]
    rows = [[*head, "GB each"]]
    for each in predicted:
        job, rate = each.job, each.job.tokens / each.seconds  # of one device
        mfus = [mfu(flops_per_token(job.config, form) * job.tokens, each.seconds, peak) for form in ("nanogpt", "6n")]
        rows.append(
            [
                f"{each.devices:,}",
                f"{job.accumulation} x {job.batch_size}",
                f"{each.devices * job.tokens:,}",
                *(f"{1e3 * seconds:.2f}" for seconds in (each.seconds, each.communication, each.exposed)),
                f"{each.devices * rate:,.0f}",
                *(f"{share:.1%}" for share in mfus),
                f"{rate / (predicted[0].job.tokens / predicted[0].seconds):.1%}",
                f"{job.held(each.devices, shard=shard) / 1e9:.1f}",
            ]
        )
    return aligned(rows)


def main() -> int:
    config, _ = command_line(ScaleConfig, None, "python -m bench.scale", ABOUT)
    print(report(config))
    return 0


if __name__ == "__main__":
    errors.run(main)
