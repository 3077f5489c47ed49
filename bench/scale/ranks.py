"""What one rank of `python -m bench.scale --check` does: time training steps and all-reduces; rank 0 prints them.

Started by torchrun on a CPU, one thread a rank. All ranks begin each sample together.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from kernels import REFERENCE
from model import GPT, GPTConfig
from train.data import Batch
from train.distributed import Reducer, World, process_group, world_from_environment
from train.optim import FlatAdamW
from train.step import TrainStep

# Wide and short, few tokens: most of its time goes into its parameters, so that summing their gradients shows.
CONFIG = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=4, n_embd=1024, bias=False)
BATCH_SIZE = 1
ROUNDS, LEAST = 15, 3  # samples of each, and how many are made before the first that counts
SIZES = (2**14, 2**22)  # float32s of the two all-reduces by which latency and bandwidth are told apart


def timed(work: Callable[[], object], world: World) -> float:
    world.barrier()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(world: World) -> dict[str, list[float]]:
    """Seconds, by turns: "step", and "all_reduce <elements>" where there are several ranks."""
    torch.manual_seed(0)
    model = GPT(CONFIG, REFERENCE)
    adamw = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = FlatAdamW(model, REFERENCE, **adamw, in_float32=True)
    reducer = Reducer(world, optimizer.flat) if world.size > 1 else None
    step = TrainStep(model, optimizer, grad_clip=1.0, reducer=reducer)
    tokens = torch.randint(CONFIG.vocab_size, (1, BATCH_SIZE, CONFIG.block_size + 1))
    batch = Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), (0,))
    works = {"step": lambda: step(batch, 1e-3)}
    for size in SIZES if world.size > 1 else ():
        works[f"all_reduce {size}"] = partial(world.sum, torch.zeros(size))
    samples = {name: [] for name in works}
    for turn in range(LEAST + ROUNDS):
        for name, work in works.items():
            seconds = timed(work, world)
            if turn >= LEAST:
                samples[name].append(seconds)
    return samples


def main() -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    with process_group(world, "gloo", torch.device("cpu")):
        samples = measure(world)
    if world.master:
        print(json.dumps(samples))
    sys.stdout.flush()
    if world.size > 1:
        os._exit(0)  # as train/__main__.py ends, and why


if __name__ == "__main__":
    main()
