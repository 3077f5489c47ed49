"""Predict a training step on several devices, and print every assumption: python -m bench.scale.

One device: a step takes `slowness` times its roofline floor (`model/work.py`). A measured step gives the slowness.
Without one it is 1, and the predicted time is a lower bound. Other batches, other numbers of micro-steps and sums in
float32 take their own floors times the same slowness.

Several devices: each computes its micro-steps, then the gradients are summed in one exchange, then each updates. The
exchange hides behind nothing.

A ring of N devices reduces and scatters S bytes, then gathers them, in N - 1 hops each (Patarasuk and Yuan 2009,
"Bandwidth optimal all-reduce algorithms"):

    2 * ((N - 1) / N * S / bandwidth + (N - 1) * hop)

With n nodes of g devices there are two levels. First the devices of each node exchange their data. Then each device
exchanges its part S / g with one device of each other node, through its own network card. With many nodes the hops take
long, so NCCL all-reduces over two binary trees instead, in 2 log2(n) hops (Sanders, Speck and Traeff 2009, "Two-tree
algorithms for full bandwidth broadcast, reduction and scan"). The faster of the two counts.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from bench import results
from bench.digest import short_name
from bench.results import Results
from bench.tables import aligned
from bench.variants import WORKLOADS, chosen
from model.work import duration, flops_per_token, mfu, num_params
from train import errors
from train.dryrun import Job, dry_run
from train.errors import UserError, shown
from train.hardware import CARDS, DTYPES, data_sheet
from train.settings import command_line, setting

Rates = tuple[float, float]  # FLOP/s of one device in the compute dtype, bytes/s of its memory
ABOUT = "Predict tokens/s and MFU of several devices, from one device's measured step and the links between them."
FLOAT32 = 4  # bytes
NETWORK, CALL = 14.0, 8.4  # microseconds: a hop between nodes, the start of any exchange
NCCL = "NCCL's own model, src/graph/tuning.cc"


@dataclass(frozen=True)
class ScaleConfig:
    results: str = setting("", "a results file of python -m bench; empty: estimates for --device", path=True)
    device: str = setting("H100", f"without a results file: {', '.join(CARDS)}, or torch's name of one")
    sizes: str = setting("gpt2,gpt2-medium,gpt2-large,gpt2-xl", f"of {', '.join(WORKLOADS)}")
    devices: str = setting("1,2,4,8,64,1024", "how many, separated by commas")
    tokens: int = setting(491520, "tokens of an iteration, shared out over all devices (nanoGPT's)", low=1)
    node: int = setting(8, "devices that one node has", group="links", low=1)
    intranode_gbyte: float = setting(0.0, "GB/s in one direction within a node; 0: by device", low=0.0)
    internode_gbit: float = setting(400.0, "Gbit/s of a device's network card", low=1e-3)
    link_share: float = setting(0.8, "of a link's rate that is reached", low=1e-3, below=1.0000001)


def least_seconds(job: Job, rates: Rates, devices: int = 1) -> float:
    """Of a step, without the exchange. Gradients of several micro-steps or devices are summed in float32."""
    work = replace(job, several=devices * job.accumulation > 1).work(fused_gelu=True)
    return duration(work.items(), *rates)


def share_out(job: Job, tokens: int, devices: int) -> Job:
    """Each device's job in an iteration of `tokens`: equal micro-steps of at most the job's batch size.

    Shares are rounded up to whole sequences, so the iteration can be larger than requested.
    """
    sequences = math.ceil(tokens / (devices * job.shape.block_size))
    accumulation = math.ceil(sequences / job.batch_size)
    batch_size = math.ceil(sequences / accumulation)
    return replace(job, batch_size=batch_size, accumulation=accumulation, several=devices * accumulation > 1)


@dataclass(frozen=True)
class Fabric:
    """Nodes and links. Rates are bytes/s that one device reaches in one direction. Hops and calls are seconds."""

    node: int  # devices that one node has
    inside: float
    between: float
    hop_inside: float
    hop_between: float
    call: float

    def all_reduce(self, size: float, devices: int) -> float:
        """Seconds of one all-reduce of `size` bytes; 0 for one device."""
        if devices == 1:
            return 0.0
        g = min(devices, self.node)
        n, part = devices // g, size / g
        inside = 2 * ((g - 1) / g * size / self.inside + (g - 1) * self.hop_inside)
        ring = 2 * ((n - 1) / n * part / self.between + (n - 1) * self.hop_between)
        tree = 2 * part / self.between + 2 * (n - 1).bit_length() * self.hop_between  # up the trees and down
        return inside + min(ring, tree) + self.call


def counts(text: str, node: int) -> list[int]:
    """Numbers of devices, sorted. UserError for no number, and for one above `node` that is no multiple of it."""
    found = [int(part) if part.strip().isdecimal() else part for part in text.split(",")]
    for count in found:
        if not isinstance(count, int) or count < 1 or (count > node and count % node):
            expected = f"whole numbers from 1 to {node}, which a node has, or multiples of {node}, separated by commas"
            raise UserError(f"devices: got {shown(count)}, expected {expected}")
    return sorted(set(found))


def rates_of(config: ScaleConfig, found: Results | None) -> tuple[str, Rates, float, list[str]]:
    """(device's name, its rates, its peak, lines about them), as the file measured, else from data sheets."""
    card = CARDS.get(config.device.lower())
    name = found.device.name if found else card.name if card else config.device
    sheet = data_sheet(name)
    matmul, copy = (found.ceiling(what) if found else None for what in ("matmul", "copy"))
    if sheet is None and found is None:
        raise UserError(f"device: got {shown(config.device)}, expected one that train/hardware.py knows")
    if sheet is None and not (matmul and copy):
        raise UserError(f"results: {config.results}: it has no ceilings, and no data sheet of {name} is known")
    said = [f"measured    {matmul / 1e12:.4g} TFLOP/s of a large matmul"] if matmul else []
    said += [] if matmul else [f"data sheet  {sheet.bf16:g} TFLOP/s, dense bfloat16, {sheet.source}"]
    said += [f"measured    {copy / 1e9:.4g} GB/s of a large copy"] if copy else []
    said += [] if copy else [f"data sheet  {sheet.bandwidth:g} GB/s, {sheet.source}"]
    rates = matmul or sheet.bf16 * 1e12, copy or sheet.bandwidth * 1e9
    peak = found.peak.flops if found else rates[0]
    said += [f"MFU         of {peak / 1e12:.4g} TFLOP/s: {found.peak.source}"] if found else []
    return name, rates, peak, said


def fabric_of(config: ScaleConfig, device: str) -> tuple[Fabric, list[str]]:
    """The links, and lines about them and about what else is assumed."""
    sheet = data_sheet(device)
    link = sheet.link if sheet else None
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
        "as built    gradients are summed over ranks in float32; several micro-steps' too",
        "assumed     other batch sizes: as many times slower than their own floor",
        "as built    the exchange begins after the last micro-step, and hides behind nothing",
        "assumed     ranks never wait for one that is slower",
        "estimated   GB that each device holds: train/dryrun.py, fused kernels, nothing computed again",
        f"as set      {config.tokens:,} tokens an iteration, shared out; shares rounded up to whole sequences",
    ]
    rates = share * gbytes * 1e9, share * config.internode_gbit / 8 * 1e9
    return Fabric(config.node, *rates, hop / 1e6, NETWORK / 1e6, CALL / 1e6), said


def base_of(name: str, found: Results | None, rates: Rates) -> tuple[Job, float, str]:
    """(one device's step of that model, its slowness, a line about it). Our fastest in the file, else the floor's."""
    from kernels import FUSED  # it needs Triton

    workload = WORKLOADS[name]
    config = replace(workload.config, dropout=0.0)
    ours = [row for row in (found.steps if found else []) if row.seconds and row.variant.startswith("ours")]
    rows = [row for row in ours if row.shape.config == config]
    if not rows:
        said = f"ESTIMATE    {name}: the roofline floor, faster than any device will be"
        return Job(workload.config, workload.batch_size, FUSED), 1.0, said
    row = max(rows, key=lambda row: row.tokens / row.median)
    job = Job(workload.config, row.shape.batch_size, FUSED, row.shape.accumulation, dtype=DTYPES[row.dtype])
    slow = row.median / least_seconds(job, rates)
    said = f"measured    {name}: {1e3 * row.median:.2f} ms for {row.tokens:,} tokens, {row.variant}, {row.dtype}"
    return job, slow, f"{said}, median of {len(row.seconds)}: {slow:.2f} times its floor"


def report(config: ScaleConfig) -> str:
    """The whole prediction, as text."""
    names, devices = chosen("sizes", config.sizes, WORKLOADS), counts(config.devices, config.node)
    try:
        found = results.read(Path(config.results)) if config.results else None
    except ValueError as error:
        raise UserError(f"results: {error}") from error
    device, rates, peak, said = rates_of(config, found)
    fabric, links = fabric_of(config, device)
    bases = {name: base_of(name, found, rates) for name in names}
    lines = [*(line for _, _, line in bases.values()), *said, *links]
    blocks = [f"Predicted, not measured: {short_name(device)}", "\n".join(lines)]
    head = ["devices", "batch", "tokens/iter", "ms/iter", "comm ms", "tokens/s", "MFU", "effic.", "GB each"]
    for name, (base, slow, line) in bases.items():
        rows, alone = [head], 0.0
        gradients = FLOAT32 * num_params(base.shape, non_embedding=False)  # bytes that the ranks exchange
        for count in devices:
            job = share_out(base, config.tokens, count)
            exchange = fabric.all_reduce(gradients, count)
            seconds = slow * least_seconds(job, rates, count) + exchange
            tokens = job.accumulation * job.batch_size * job.shape.block_size
            rate = tokens / seconds  # of one device
            alone = alone or rate
            cells = [
                f"{count:,}",
                f"{job.accumulation} x {job.batch_size}",
                f"{count * tokens:,}",
                f"{1e3 * seconds:.2f}",
                f"{1e3 * exchange:.2f}",
                f"{count * rate:,.0f}",
                f"{mfu(flops_per_token(job.shape) * tokens, seconds, peak):.1%}",
                f"{rate / alone:.1%}",  # relative to the first row
                f"{dry_run(job).total / 1e9:.1f}",
            ]
            rows.append(cells)
        mark = " (ESTIMATE from the floor)" if line.startswith("ESTIMATE") else ""
        blocks.append(f"{name}{mark}: {gradients / 1e9:.3f} GB of gradients exchanged\n{aligned(rows)}")
    return "\n\n".join(blocks)


def main() -> None:
    config, _ = command_line(ScaleConfig, None, "python -m bench.scale", ABOUT)
    print(report(config))


if __name__ == "__main__":
    errors.run(main)
