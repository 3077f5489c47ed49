"""The scale model against gloo on this CPU: 1, 2 and 4 ranks of a small model, measured and predicted.

Ranks here share cores, which devices do not: each has one thread, and where there are more ranks than cores, computing
and gloo's copying are assumed to take as many times longer. Nothing hides communication: there is no core for it. Of
all samples the fastest counts: whatever else runs on the machine only adds.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from bench.scale.links import Fabric
from bench.scale.model import Job, Predicted, Rates, predict, slowness, traffic
from bench.scale.ranks import BATCH_SIZE, CONFIG, SIZES
from bench.tables import aligned
from train.errors import RunError

RANKS = (1, 2, 4)
JOB = Job(CONFIG, BATCH_SIZE, compute=4)
RATES = Rates(1.0, 1.0)  # any will do: what is predicted of this job was measured of it
TURNS = 2  # of 1, 2 and 4 ranks
SECONDS = 120  # that the ranks may take
Samples = dict[str, list[float]]


def run_ranks(count: int) -> Samples:
    """What `ranks.py` measures of so many ranks. RunError where they fail or hang."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    ranks = subprocess.Popen(
        [*command, "-m", "bench.scale.ranks"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = ranks.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(f"check: {count} ranks did not end within {SECONDS} s") from None
    finally:
        if ranks.poll() is None:  # they hang, or somebody pressed Ctrl-C
            os.killpg(ranks.pid, signal.SIGKILL)
            ranks.communicate()
    if ranks.returncode:
        last = (err.strip().splitlines() or ["nothing was printed"])[-1]
        raise RunError(f"check: {count} ranks ended with status {ranks.returncode}: {last}")
    return json.loads(out.strip().splitlines()[-1])


def links(two: Samples) -> Fabric:
    """gloo's bandwidth and latency here, from all-reduces of two sizes over two ranks: S / inside + 2 hops each."""
    small, large = (min(two[f"all_reduce {size}"]) for size in SIZES)
    inside = 4 * (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
    return Fabric(max(RANKS), inside, inside, hop_inside=max(0.0, small - 4 * SIZES[0] / inside) / 2)


def predictions(one: Samples, two: Samples, cores: int) -> dict[int, Predicted]:
    """By number of ranks, from the step of one and the links of two."""
    slow, fabric = slowness(min(one["step"]), JOB, RATES), links(two)
    sent, predicted = traffic(CONFIG, torch.float32), {}
    for count in RANKS:
        sharing = max(1.0, count / cores)
        shared = Fabric(fabric.node, fabric.inside / sharing, fabric.between, fabric.hop_inside * sharing)
        predicted[count] = predict(JOB, RATES, slow, sent, shared, count, overlap=False, contention=sharing)
    return predicted


def report() -> str:
    """Measures, and says how it compares."""
    cores = len(os.sched_getaffinity(0))
    measured: dict[int, Samples] = {count: {} for count in RANKS}
    for count in RANKS * TURNS:
        for name, seconds in run_ranks(count).items():
            measured[count].setdefault(name, []).extend(seconds)
    predicted, fabric = predictions(measured[1], measured[2], cores), links(measured[2])
    alone = measured[1]["step"]
    rows = [["ranks", "computing", "summing", "predicted ms", "measured ms", "off by"]]
    for count, each in predicted.items():
        seconds = min(measured[count]["step"])
        numbers = (each.computing, each.exposed, each.seconds, seconds)
        off = f"{each.seconds / seconds - 1:+.0%}" if count > 1 else "as measured"
        rows.append([str(count), *(f"{1e3 * number:.1f}" for number in numbers), off])
    lines = [
        f"{sum(traffic(CONFIG, torch.float32).pieces) / 1e6:.1f} MB of gradients; {cores} cores, one thread a rank",
        f"measured    {1e3 * min(alone):.1f} ms a step of one rank alone, the fastest of {len(alone)}",
        f"measured    {fabric.inside / 1e9:.2f} GB/s, {1e6 * fabric.hop_inside:.0f} us a hop: gloo between two ranks",
        "assumed     more ranks than cores compute, and sum, as many times slower; nothing is hidden",
    ]
    return "\n".join([*lines, "", aligned(rows)])
