"""python -m bench.scale: what several devices would make of a training step. A prediction, its assumptions beside it.

The step of one device comes from a results file; where it has none of a size, or there is no file, it is the roofline
floor, a bound that no device reaches. model.py is the model, links.py what is known of links.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench import schema
from bench.devices import DEVICES, short_name
from bench.scale import check
from bench.scale.links import CALL, HOP_NETWORK, NCCL, Fabric, link_of
from bench.scale.model import Job, Predicted, Rates, Traffic, predict, share_out, slowness, traffic
from bench.schema import Results, Step, median
from bench.tables import aligned
from bench.workloads import WORKLOADS
from model.flops import flops_per_token
from train import dryrun
from train.errors import UserError
from train.hardware import DTYPES, lookup
from train.metrics import mfu, tokens_per_second
from train.settings import check_values, help_text, parse_settings, setting, shown

ABOUT = "Predict tokens/s and MFU of several devices, from one device's measured step and the links between them."


@dataclass(frozen=True)
class ScaleConfig:
    results: str = setting("", "a results file of python -m bench; empty: estimates for --device")
    device: str = setting("H100", f"without a results file: {', '.join(DEVICES)}, or torch's name of one")
    sizes: str = setting("gpt2,gpt2-medium,gpt2-large,gpt2-xl", f"of {', '.join(WORKLOADS)}")
    devices: str = setting("1,2,4,8,64,1024", "how many, separated by commas")
    scaling: str = setting("strong", "share an iteration out, or give each device as much", choices=("strong", "weak"))
    tokens: int = setting(491520, "strong: tokens of an iteration, of all devices (nanoGPT's)", low=1)
    accumulation: int = setting(1, "weak: micro-steps of each device", low=1)
    batch_size: int = setting(0, "sequences of a micro-step, at most; 0: as measured, or the workload's", low=0)
    shard: bool = setting(False, "parameters, gradients and moments shared out, as python -m train --shard does")
    overlap: str = setting(
        "auto", "backward hides communication; auto: as the step does", choices=("auto", "yes", "no")
    )
    node: int = setting(8, "devices that one node has", group="links", low=1)
    intranode_gbyte: float = setting(0.0, "GB/s in one direction within a node; 0: by device", low=0.0)
    internode_gbit: float = setting(400.0, "Gbit/s of a device's network card", low=1e-3)
    link_share: float = setting(0.8, "of a link's rate that is reached", low=1e-3, below=1.0000001)
    check: bool = setting(
        False, "instead: measure 1, 2 and 4 ranks of a small model on this CPU, beside the prediction"
    )


@dataclass(frozen=True)
class Base:
    """One device's step of one size, and how it is known."""

    job: Job
    slow: dict[int, float]  # by sequences of a micro-step
    overlaps: bool
    said: str


def counts(text: str, node: int) -> list[int]:
    """How many devices, in order. UserError for what no nodes of `node` make."""
    found = []
    for part in text.split(","):
        count = int(part) if part.strip().isdecimal() else 0
        if count < 1:
            raise UserError(f"devices: got {shown(part)}, expected whole numbers from 1, separated by commas")
        if count > node and count % node:
            raise UserError(f"devices: got {count}, expected at most {node}, which a node has, or a multiple of it")
        found.append(count)
    return sorted(set(found))


def sizes_of(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in WORKLOADS:
            raise UserError(f"sizes: got {shown(name)}, expected some of: {', '.join(WORKLOADS)}")
    return names


def read_results(path: str) -> Results:
    try:
        return schema.read(Path(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"results: {path}: {reason}") from error


def rates_of(config: ScaleConfig, results: Results | None) -> tuple[str, Rates, float, list[str]]:
    """(device's name, its rates, its peak, what is said of them): measured ceilings where there are, or data sheets."""
    name = results.device.name if results else DEVICES.get(config.device, config.device)
    row = lookup(name)
    if row is None and results is None:
        raise UserError(f"device: got {shown(config.device)}, expected one that train/hardware.py knows")
    matmul, copy = (results.ceiling(what) if results else None for what in ("matmul", "copy"))
    if row is None and not (matmul and copy):
        raise UserError(f"results: {config.results}: it has no ceilings, and no data sheet of {name} is known")
    if row is not None and row.bf16 is None:
        raise UserError(f"device: got {shown(name)}, expected one with bfloat16")
    sheet = f"data sheet  {{}}, {row.source}" if row else ""
    said = [
        f"measured    {matmul / 1e12:.4g} TFLOP/s of a large matmul"
        if matmul
        else sheet.format(f"{row.bf16:g} TFLOP/s, dense bfloat16"),
        f"measured    {copy / 1e9:.4g} GB/s of a large copy" if copy else sheet.format(f"{row.bandwidth:g} GB/s"),
    ]
    rates = Rates(matmul or row.bf16 * 1e12, copy or row.bandwidth * 1e9)
    if results and results.peak:
        said.append(f"MFU         of {results.peak.flops / 1e12:.4g} TFLOP/s: {results.peak.source}")
        return name, rates, results.peak.flops, said
    return name, rates, row.bf16 * 1e12 if row else rates.flops, said


def fabric_of(config: ScaleConfig, device: str) -> tuple[Fabric, list[str]]:
    """The links, and what is said of them."""
    link, share = link_of(device), config.link_share
    if link is None and not config.intranode_gbyte:
        raise UserError(f"intranode_gbyte: got 0.0, expected GB/s in one direction: no link of {device} is known")
    gbytes = config.intranode_gbyte or link.gbytes
    hop = link.hop if link else HOP_NETWORK
    said = [
        f"as set      {gbytes:g} GB/s in one direction between devices of a node"
        if config.intranode_gbyte
        else f"data sheet  {gbytes:g} GB/s in one direction between devices of a node, {link.kind} ({link.source})",
        f"assumed     nodes of {config.node}; a network card of {config.internode_gbit:g} Gbit/s for each device",
        f"assumed     {share:.0%} of a link's rate is reached (NCCL's protocols cost about 20%: nccl-tests issue 212)",
        f"assumed     {CALL:g} us an exchange; a hop {hop:g} us within a node, {HOP_NETWORK:g} between ({NCCL})",
        "assumed     rings within nodes, rings or trees across; no switch that adds up, no other traffic",
    ]
    rates = {"inside": share * gbytes * 1e9, "between": share * config.internode_gbit / 8 * 1e9}
    return Fabric(config.node, **rates, hop_inside=hop / 1e6, hop_between=HOP_NETWORK / 1e6, call=CALL / 1e6), said


def base_of(name: str, config: ScaleConfig, results: Results | None, rates: Rates) -> Base:
    """The fastest of our steps of that model in the file; else its floor."""
    workload = WORKLOADS[name]
    batch_size = config.batch_size or workload.batch_size
    rows = [row for row in results.steps if _fits(row, name, config)] if results else []
    if not rows:
        job = Job(workload.config, batch_size)
        return Base(
            job, {batch_size: 1.0}, False, f"ESTIMATE    {name}: the roofline floor, faster than any device will be"
        )
    rows.sort(key=lambda row: row.tokens / median(row.seconds))  # the last one of each batch is the fastest
    jobs = {row.shape["batch_size"]: (row, _job(row, name)) for row in rows}
    slow = {batch: slowness(median(row.seconds), job, rates) for batch, (row, job) in sorted(jobs.items())}
    row, job = jobs[rows[-1].shape["batch_size"]]
    said = (
        f"measured    {name}: {1e3 * median(row.seconds):.2f} ms for {row.tokens:,} tokens, {row.variant}, {row.dtype}"
        f", median of {len(row.seconds)}\n            times its floor, by batch: "
    )
    said += ", ".join(f"{batch}: {times:.2f}" for batch, times in slow.items())
    overlaps = not any(word in row.variant for word in ("compiled", "graphed"))
    return Base(replace(job, batch_size=config.batch_size or job.batch_size), slow, overlaps, said)


def _job(row: Step, name: str) -> Job:
    sizes = row.shape["batch_size"], row.shape.get("accumulation", 1)
    return Job(WORKLOADS[name].config, *sizes, DTYPES[row.dtype].itemsize)


def _fits(row: Step, name: str, config: ScaleConfig) -> bool:
    """Whether it is a step of ours, of that model, that could be shared out."""
    shape = {key: size for key, size in WORKLOADS[name].shape.items() if key not in ("batch_size", "accumulation")}
    same = row.shape.items() >= shape.items() and "batch_size" in row.shape
    whole = row.variant.startswith("ours") and bool(row.seconds)
    return same and whole and not (config.shard and "graphed" in row.variant)


def plan(name: str, config: ScaleConfig, base: Base, rates: Rates, fabric: Fabric) -> tuple[list[Predicted], Traffic]:
    """A prediction for each number of devices."""
    job, sent = base.job, traffic(base.job.config, torch.float32 if base.job.compute == 4 else torch.bfloat16)
    overlap = config.shard or base.overlaps if config.overlap == "auto" else config.overlap == "yes"
    predicted = []
    for devices in counts(config.devices, config.node):
        weak = replace(job, accumulation=config.accumulation)
        each = weak if config.scaling == "weak" else share_out(job, config.tokens, devices)
        slow = float(np.interp(each.batch_size, list(base.slow), list(base.slow.values())))
        predicted.append(predict(each, rates, slow, sent, fabric, devices, overlap=overlap, shard=config.shard))
    return predicted, sent


def memory(each: Predicted, *, shard: bool) -> int:
    """Bytes that a device holds, as `train/dryrun.py` finds them, with the fused kernels."""
    from kernels.fused import FUSED

    job = each.job
    step = dryrun.Job(
        job.config,
        job.batch_size,
        FUSED,
        accumulation=job.accumulation,
        several=each.devices * job.accumulation > 1,
        dtype=torch.float32 if job.compute == 4 else torch.bfloat16,
        shards=each.devices if shard else 1,
    )
    return dryrun.dry_run(step).total


def table(predicted: list[Predicted], peak: float, *, shard: bool) -> str:
    """Efficiency is tokens/s a device, relative to the first row's."""
    head = ["devices", "batch", "tokens/iter", "ms/iter", "comm ms", "exposed", "tokens/s", "MFU", "MFU 6N", "effic."]
    rows = [[*head, "GB each"]]
    first = predicted[0].tokens / predicted[0].seconds / predicted[0].devices
    for each in predicted:
        rate = tokens_per_second(each.tokens, each.seconds)
        flops = [flops_per_token(each.job.config, formula) * each.tokens for formula in ("nanogpt", "6n")]
        rows.append(
            [
                f"{each.devices:,}",
                f"{each.job.accumulation} x {each.job.batch_size}",
                f"{each.tokens:,}",
                *(f"{1e3 * seconds:.2f}" for seconds in (each.seconds, each.communication, each.exposed)),
                f"{rate:,.0f}",
                *(f"{mfu(count, each.seconds, each.devices * peak):.1%}" for count in flops),
                f"{rate / each.devices / first:.1%}",
                f"{memory(each, shard=shard) / 1e9:.1f}",
            ]
        )
    return aligned(rows)


def report(config: ScaleConfig) -> str:
    """All of it, as text."""
    names, _ = sizes_of(config.sizes), counts(config.devices, config.node)
    results = read_results(config.results) if config.results else None
    device, rates, peak, said = rates_of(config, results)
    fabric, links = fabric_of(config, device)
    bases = {name: base_of(name, config, results, rates) for name in names}
    plans = {name: plan(name, config, base, rates, fabric) for name, base in bases.items()}
    share = (
        f"as set      {config.tokens:,} tokens an iteration, shared out; shares rounded up to whole sequences"
        if config.scaling == "strong"
        else f"as set      each device the same: {config.accumulation} micro-steps"
    )
    blocks = [
        f"Predicted, not measured: {short_name(device)}, {'sharded, ' if config.shard else ''}{config.scaling} scaling"
    ]
    blocks.append("\n".join([*(base.said for base in bases.values()), *said, *links, *_code(config, bases), share]))
    for name, (predicted, sent) in plans.items():
        size = f"{sum(sent.pieces) / 1e9:.3f} GB of gradients in {len(sent.pieces)} exchanges"
        size = f"{sent.blocks} blocks and the embeddings, one by one" if config.shard else size
        mark = " (ESTIMATE from the floor)" if bases[name].said.startswith("ESTIMATE") else ""
        blocks.append(f"{name}{mark}: {size}\n{table(predicted, peak, shard=config.shard)}")
    return "\n\n".join(blocks)


def _code(config: ScaleConfig, bases: dict[str, Base]) -> list[str]:
    """What the lines before the tables say of the step itself."""
    hidden = [name for name, base in bases.items() if config.shard or base.overlaps]
    hidden = {"yes": list(bases), "no": [], "auto": hidden}[config.overlap]
    lines = [
        "as built    gradients are summed over ranks in float32; several micro-steps' too",
        "assumed     other batches are as many times slower than their floors, between measured ones in proportion",
        "assumed     a backward pass is 2/3 of a micro-step; ranks never wait for one that is slower",
        "estimated   GB that each device holds: train/dryrun.py, fused kernels, nothing computed again",
    ]
    if config.shard:
        lines.append(
            "as built    each micro-step gathers the blocks twice and scatters gradients in float32; no graphs"
        )
    source = "as built" if config.overlap == "auto" else "as set  "
    if hidden:
        lines.append(f"{source}    the backward pass hides exchanges: {', '.join(hidden)}")
    if exposed := [name for name in bases if name not in hidden]:
        reason = ", since a graph or a compiled pass ends before they begin" if config.overlap == "auto" else ""
        lines.append(f"{source}    nothing hides exchanges{reason}: {', '.join(exposed)}")
    return lines


def main() -> int:
    parsed = parse_settings(ScaleConfig, sys.argv[1:], presets=False)
    if parsed.help:
        print(help_text(ScaleConfig, "python -m bench.scale", ABOUT))
        return 0
    config = ScaleConfig(**parsed.settings)
    check_values(config)
    print(check.report() if config.check else report(config))
    return 0
