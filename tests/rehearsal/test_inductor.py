"""torch.compile for CUDA on a machine without it: it ends, its launches are pinned, it happens once."""

import signal

import pytest
import torch
from torch._dynamo.utils import counters

from kernels import FUSED
from kernels.launch import Device
from tests.rehearsal.device import Gpu
from tests.rehearsal.inductor import Inductor, inductor  # noqa: F401
from tests.rehearsal.test_step import FUSED_MATMUL, job
from tests.rehearsal.watching import Watching
from train import compile, dryrun
from train.config import TrainConfig

# launches of a compiled micro-step, and GB that they move; for the eager one see test_step.py
PINNED = {
    ("gpt2", 2, False): (57, 27.91),
    ("shakespeare_char", 2, False): (58, 2.83),
    ("gpt2", 12, False): (267, 79.78),
    ("shakespeare_char", 6, False): (142, 8.12),
    ("shakespeare_char", 6, True): (130, 7.22),
}


@pytest.mark.parametrize(
    ("workload", "n_layer", "fused_matmul"),
    [pytest.param(*case, marks=[] if case == ("shakespeare_char", 2, False) else pytest.mark.slow) for case in PINNED],
)
def test_two_blocks_are_compiled_whatever_the_depth(
    gpu: Gpu,
    inductor: Inductor,  # noqa: F811
    workload: str,
    n_layer: int,
    fused_matmul: bool,
) -> None:
    shapes = job(workload, {"n_layer": n_layer}, ops=FUSED_MATMUL if fused_matmul else FUSED, on="cuda")
    shape = shapes.batch_size, shapes.shape.block_size
    step = dryrun.build(shapes)
    signal.setitimer(signal.ITIMER_PROF, 60)  # seconds; then the process ends, before Inductor has used up all memory
    settings = TrainConfig(batch_size=shape[0], block_size=shape[1], compile=True)
    step.model = compile.model_to_train(step.model, settings, gpu.device, print)  # prints why, if it cannot
    signal.setitimer(signal.ITIMER_PROF, 0)
    attention = "flash" if shapes.shape.dropout else "cudnn"
    # of the first block and of all others: forward, backward, evaluation, all before step 0
    assert len(inductor.codes) == 6
    assert sum(f"_scaled_dot_product_{attention}_attention_backward" in code for code in inductor.codes) == 2
    assert inductor.spills
    assert not any(inductor.spills.values()), inductor.spills
    assert inductor.unknown == []

    x, y = (torch.zeros(shape, dtype=torch.int64, device=gpu.device) for _ in range(2))
    recorder = Watching(Device(90, 132), "cuda", shapes.shape.vocab_size)
    step.optimizer.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            inductor.launches.clear()
            recorder.calls.clear()
            with recorder:
                step.micro_step(x, y)
            seen = [call.bytes for call in recorder.calls] + inductor.launches
            step.update()
            step.evaluate(x, y)
    assert (len(seen), round(sum(seen) / 1e9, 2)) == PINNED[workload, n_layer, fused_matmul]
    assert recorder.faults == []
    assert len(inductor.codes) == 6
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
