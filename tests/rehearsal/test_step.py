"""A whole step on the device that is not there: its launches, waits and allocations, and its capture."""

import contextlib
import dataclasses
import functools
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.variants import WORKLOADS
from kernels import FUSED
from tests.rehearsal.device import Gpu
from tests.rehearsal.watching import Watching
from train import dryrun
from train.compile import compile_model
from train.data import Batch
from train.dryrun import Job, build, dry_run
from train.errors import UserError
from train.graph import GraphedStep

# Launches of a micro-step, GB that they move, the same of an update. Change this table only on purpose.
PINNED = {
    ("gpt2", "none", False): (267, 79.78, 3, 3.73),
    ("gpt2", "none", True): (243, 72.54, 3, 3.73),
    ("gpt2", "mlp", False): (303, 90.77, 3, 3.73),
    ("gpt2", "block", False): (351, 99.24, 3, 3.73),
    ("shakespeare_char", "none", False): (142, 8.12, 3, 0.32),
    ("shakespeare_char", "none", True): (130, 7.22, 3, 0.32),
    ("shakespeare_char", "mlp", False): (160, 9.50, 3, 0.32),
    ("shakespeare_char", "block", False): (184, 10.55, 3, 0.32),
}
# with the fused matmul both ways, which a run takes where it is faster
FUSED_MATMUL = dataclasses.replace(FUSED, mlp=functools.partial(FUSED.mlp, forward_tiles=1, backward_tiles=1))


def job(workload: str, shape: dict[str, Any] | None = None, **changes: Any) -> Job:
    """A workload's, with these fields changed. shape: fields of its model's shape, changed."""
    sizes = WORKLOADS[workload]
    config = dataclasses.replace(sizes.config, **shape or {})
    fields = {"batch_size": sizes.batch_size, "ops": FUSED, "attention": "flash" if config.dropout else "cudnn"}
    return Job(config, **fields | changes)


@pytest.mark.parametrize(("workload", "recompute", "fused_matmul"), PINNED)
def test_launches_and_bytes_are_pinned(workload: str, recompute: str, fused_matmul: bool) -> None:
    ops = FUSED_MATMUL if fused_matmul else FUSED
    run = dry_run(job(workload, recompute=recompute, ops=ops))
    micro, update = (sum(call.bytes for call in part) / 1e9 for part in (run.micro_step, run.update))
    seen = len(run.micro_step), round(micro, 2), len(run.update), round(update, 2)
    assert seen == PINNED[workload, recompute, fused_matmul]
    if recompute == "none":
        work = job(workload).work(fused_gelu=fused_matmul)
        assert 1e9 * micro < 1.12 * sum(part.bytes for name, part in work.items() if name != "optimizer")
        assert 1e9 * update == pytest.approx(work["optimizer"].bytes, rel=1e-4)


# both workloads, with dropout and without, each mode
VARIANTS = [("gpt2", 0.0, "none"), ("gpt2", 0.0, "mlp"), ("shakespeare_char", 0.2, "block")]


@pytest.mark.parametrize(
    ("workload", "dropout", "recompute", "layers"),
    [*((*variant, 2) for variant in VARIANTS), pytest.param("gpt2", 0.2, "block", 12, marks=pytest.mark.slow)],
)
def test_a_step_waits_for_nothing(
    gpu: Gpu, workload: str, dropout: float, recompute: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No host sync, no mixed devices, no fake that differs from its body. Launches and memory with the real autograd
    engine, its threads and the device's tensors are the same as on shapes alone."""
    sums = {"several": True, "accumulation": 3} if recompute == "mlp" else {}
    shapes = job(workload, {"n_layer": layers, "dropout": dropout, "bias": True}, recompute=recompute, **sums)
    expected = dry_run(shapes)
    watching: list[Watching] = []
    monkeypatch.setattr(dryrun, "Recorder", lambda *given: watching.append(Watching(*given)) or watching[0])
    run = dry_run(dataclasses.replace(shapes, on="cuda"))
    assert watching[0].faults == []
    assert [call.name for call in run.micro_step] == [call.name for call in expected.micro_step]
    assert [call.name for call in run.update] == [call.name for call in expected.update]
    assert run.total == pytest.approx(expected.total, rel=0.01)


class Allocations(TorchDispatchMode):
    """Records the stream and the thread of every tensor that is made during a capture."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu, self.streams, self.threads = gpu, set(), set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        captured = torch.cuda.is_current_stream_capturing()
        if captured and any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(made)):
            self.streams.add(self.gpu.stream)
            self.threads.add(threading.get_ident())
        return made


@pytest.mark.parametrize(
    ("workload", "dropout", "recompute", "compiled"),
    [
        *((*variant, False) for variant in VARIANTS),
        ("shakespeare_char", 0.2, "none", True),
        pytest.param("gpt2", 0.0, "block", True, marks=pytest.mark.slow),
    ],
)
def test_a_capture_is_on_one_stream(gpu: Gpu, workload: str, dropout: float, recompute: str, compiled: bool) -> None:
    sizes = {"n_layer": 1 + compiled, "dropout": dropout}
    fields = {"recompute": recompute, "batch_size": 2, "accumulation": 2, "several": True, "on": "cuda"}
    shapes = job(workload, sizes, **fields)
    step = build(shapes)
    x = torch.zeros(2, shapes.shape.block_size, dtype=torch.int64, device=gpu.device)
    if compiled:  # Dynamo and autograd as with Inductor, but its code cannot run without a device
        step.model = compile_model(step.model, functools.partial(torch.compile, backend="aot_eager"), in_parts=True)
        dloss = torch.ones((), device=gpu.device)
        step.model(x, x.clone(), dloss=dloss)[1].backward(dloss)  # as model_to_train does, on the default stream
    allocations = Allocations(gpu)
    with allocations:
        graphed = GraphedStep(step, x.shape, evaluates=True)
    assert len(gpu.captures) == 3  # micro-step, update, evaluation
    assert allocations.streams == {capture.stream for capture in gpu.captures}
    assert len(allocations.streams) == 1
    assert 0 not in allocations.streams
    assert len(allocations.threads) == 2  # one of the host, one of autograd
    assert [capture.strays for capture in gpu.captures] == [0, 0, 0]
    before = [capture.replays for capture in gpu.captures]
    both = torch.stack([x, x])
    graphed(Batch(both, both, (1, 2)), 1e-3)
    assert [capture.replays - n for capture, n in zip(gpu.captures, before, strict=True)] == [2, 1, 0]
    for _ in range(5):
        graphed.evaluate(x, x)
    assert [capture.replays - n for capture, n in zip(gpu.captures, before, strict=True)] == [2, 1, 5]


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_a_loss_of_another_stream_is_seen_unless_nothing_holds_it(gpu: Gpu) -> None:
    """Its AccumulateGrad nodes remember the default stream. torch 2.13 refuses; earlier, the capture waits for it."""
    step = build(job("shakespeare_char", {"n_layer": 1}, batch_size=2, on="cuda"))
    tokens = torch.zeros(2, 256, dtype=torch.int64, device=gpu.device)
    gc.disable()  # so that a collection by chance cannot help; the process runs only this test
    held = [step.model(tokens, tokens)[1]]
    with contextlib.suppress(UserError):
        GraphedStep(step, tokens.shape)
    assert gpu.captures[0].failed or gpu.captures[0].strays
    gpu.captures.clear()
    held.append(held)  # only the garbage collector frees it
    del held
    GraphedStep(step, tokens.shape)
    assert [capture.strays for capture in gpu.captures] == [0, 0]


def test_a_step_whose_warm_up_fails_is_cleared_when_it_has_ended(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-ups' kernels may still run on the side stream, and write what is cleared on the default one."""
    step = build(job("shakespeare_char", {"n_layer": 1}, batch_size=2, on="cuda"))
    streams: list[int] = []

    def fails() -> None:
        streams.append(gpu.stream)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(step.optimizer, "gather", fails)
    with pytest.raises(torch.OutOfMemoryError):
        GraphedStep(step, (2, 256))
    assert gpu.waits[-1] == (0, *streams)
