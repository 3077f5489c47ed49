"""A step over several devices, from one device's step and the links. Arithmetic only; `command.py` shows it.

One device: a step takes `slowness` times its roofline floor (`model/work.py`). The slowness is measured on one step; it
is 1 for a device that nobody measured, which makes its time a bound. So batches, micro-steps and sums in float32 that
were not measured are reckoned as their floors are to the floor of what was.

Several: every device makes its micro-steps, then the gradients are summed, then each updates. A collective that the
backward pass can hide costs what is left of it after the backward pass, at least the last exchange, whose gradients are
complete only then: that of the token embedding, which is the head's weight too. A backward pass is 2/3 of a micro-step.

Sharded (`train/shard.py`): each micro-step gathers every block for its forward and again for its backward pass, the
embeddings once, in the compute dtype, and scatters all gradients in float32. Each device updates its share.
"""

import math
from dataclasses import dataclass, replace

import torch

from bench.scale.links import Fabric
from model import GPT, GPTConfig
from model.flops import num_params
from model.work import floor, step_work
from train.distributed import Reducer, World
from train.flat import FlatState

FORWARD, BACKWARD = 1 / 3, 2 / 3  # of a micro-step: matmuls, most of it, are done once forward and twice backward
FLOAT32 = 4


@dataclass(frozen=True)
class Rates:
    flops: float  # FLOP/s of one device, in the compute dtype
    bandwidth: float  # bytes/s of its memory


@dataclass(frozen=True)
class Job:
    """What one device does in a step."""

    config: GPTConfig
    batch_size: int  # sequences of a micro-step
    accumulation: int = 1  # micro-steps
    compute: int = 2  # bytes of an element of the compute dtype


@dataclass(frozen=True)
class Parts:
    """Seconds of one device's step."""

    micro: float  # a micro-step, with what it adds to the sums
    update: float


def floors(job: Job, rates: Rates, *, several: bool) -> Parts:
    """The least that the step takes. several: gradients of micro-steps or ranks are summed, in float32."""
    sizes = {"compute": job.compute, "gradients": FLOAT32 if several else job.compute, "fused_gelu": True}
    work = step_work(job.config, job.batch_size, accumulation=2, **sizes)
    seconds = {name: floor(part, rates.flops, rates.bandwidth) for name, part in work.items()}
    update = seconds.pop("optimizer") + seconds.pop("clearing")
    sums = seconds.pop("accumulation")
    added = several and job.compute < FLOAT32  # float32's are summed where autograd writes them, as it does anyway
    return Parts(sum(seconds.values()) / 2 + added * sums, update)


def slowness(seconds: float, job: Job, rates: Rates) -> float:
    """How many times its floor a measured step of one device took."""
    parts = floors(job, rates, several=job.accumulation > 1)
    return seconds / (job.accumulation * parts.micro + parts.update)


@dataclass(frozen=True)
class Traffic:
    """Bytes that ranks exchange."""

    pieces: list[int]  # of gradients, as they are summed; the first one's are complete last
    blocks: int  # how many
    block: int  # parameters of a block
    rest: int  # parameters outside the blocks
    compute: int  # bytes of an element of the compute dtype


def traffic(config: GPTConfig, compute: torch.dtype) -> Traffic:
    """As `train/distributed.py` cuts the flat gradients of such a model, without making one."""
    with torch.device("meta"):
        model = GPT(config)
    model.compute_dtype = compute
    flat = FlatState(model, in_float32=True)
    pieces = [flat.total.element_size() * count for count in Reducer(World(), flat).sizes]
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    rest = num_params(config, non_embedding=False) - config.n_layer * block
    return Traffic(pieces, config.n_layer, block, rest, compute.itemsize)


@dataclass(frozen=True)
class Predicted:
    """A step of several devices, in seconds."""

    devices: int
    job: Job
    computing: float
    communication: float
    exposed: float  # of the communication: what nothing hides

    @property
    def seconds(self) -> float:
        return self.computing + self.exposed

    @property
    def tokens(self) -> int:
        """An iteration's, of all devices."""
        return self.devices * self.job.accumulation * self.job.batch_size * self.job.config.block_size


def predict(
    job: Job,
    rates: Rates,
    slow: float,
    sent: Traffic,
    fabric: Fabric,
    devices: int,
    *,
    overlap: bool,
    shard: bool = False,
    contention: float = 1.0,
) -> Predicted:
    """A step of `devices` devices, each of which does `job`. contention: how much slower than alone each computes."""
    parts = floors(job, rates, several=devices * job.accumulation > 1)
    micro, update = (contention * slow * seconds for seconds in (parts.micro, parts.update))
    if shard and devices > 1:
        communication, exposed = _sharded(sent, fabric, devices, micro, overlap=overlap)
        communication, exposed, update = job.accumulation * communication, job.accumulation * exposed, update / devices
    else:
        each = [fabric.all_reduce(size, devices) for size in sent.pieces]
        communication = sum(each)
        exposed = unhidden(communication, BACKWARD * micro, each[0]) if overlap else communication
    return Predicted(devices, job, job.accumulation * micro + update, communication, exposed)


def _sharded(sent: Traffic, fabric: Fabric, devices: int, micro: float, *, overlap: bool) -> tuple[float, float]:
    """(communication, of it exposed) of one micro-step."""
    rest, block = (fabric.gather(sent.compute * count, devices) for count in (sent.rest, sent.block))
    rest_scatter, block_scatter = (fabric.gather(FLOAT32 * count, devices) for count in (sent.rest, sent.block))
    forward = rest + sent.blocks * block
    backward = sent.blocks * (block + block_scatter) + rest_scatter
    if not overlap:
        return forward + backward, forward + backward
    exposed = unhidden(forward, FORWARD * micro, rest) + unhidden(backward, BACKWARD * micro, rest_scatter)
    return forward + backward, exposed


def unhidden(communication: float, window: float, alone: float) -> float:
    """Seconds of communication that a window of computing does not hide; `alone` is the part that cannot be hidden."""
    return max(alone, communication - window)


def share_out(job: Job, tokens: int, devices: int) -> Job:
    """`job` with each device's share of an iteration of `tokens`, in micro-steps of at most its batch size.

    Shares are rounded up to whole sequences, and micro-steps are of one size: the iteration can be larger than asked.
    """
    sequences = math.ceil(tokens / (devices * job.config.block_size))
    accumulation = math.ceil(sequences / job.batch_size)
    return replace(job, batch_size=math.ceil(sequences / accumulation), accumulation=accumulation)
