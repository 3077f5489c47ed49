"""The estimate of a step's memory against what a step on a CPU holds, byte by byte where that can be said."""

import dataclasses
import functools
from typing import Any

import pytest
import torch

from kernels import REFERENCE, Ops
from kernels.fused import FUSED
from kernels.launch import INTERPRETED
from model import GPT, GPTConfig
from model.attention import slow_in_sdpa
from model.memory import Step, activations, estimate, head_kept, state
from model.recompute import MODES
from tests.model.held import Made, allocated
from train.data import Batch
from train.optim import FlatAdamW
from train.step import TrainStep

# exact but for copies that are views where there is one head or one sequence
SHAPES = [
    (dict(block_size=16, vocab_size=43, n_layer=2, n_head=2, n_embd=32, bias=True), 3),
    (dict(block_size=7, vocab_size=50, n_layer=3, n_head=5, n_embd=40, bias=False), 2),
    (dict(block_size=33, vocab_size=48, n_layer=1, n_head=2, n_embd=24, bias=True), 5),
]
EVERY_MODE = pytest.mark.parametrize("recompute", MODES)
DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.2])
BFLOAT16 = torch.bfloat16
DEVICE = torch.device("cpu")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU's memory is measured in tests/train/test_gpu.py")


def make(ops: Ops, shape: dict[str, Any], chunk: int, **attributes: Any) -> TrainStep:
    torch.manual_seed(0)
    loss = functools.partial(ops.linear_cross_entropy, chunk_rows=chunk)
    model = GPT(GPTConfig(**shape), dataclasses.replace(ops, linear_cross_entropy=loss))
    for name, value in attributes.items():
        setattr(model, name, value)
    optimizer = FlatAdamW(model, ops, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    return TrainStep(model, optimizer, grad_clip=1.0)


def planned(model: GPT, batch_size: int, chunk: int) -> Step:
    return Step(
        model.config,
        batch_size,
        dtype_bytes=model.compute_dtype.itemsize,
        stream_bytes=model.stream_dtype.itemsize,
        recompute=model.recompute,
        fused=model.ops.name == "fused",
        loss_chunk=chunk,
        matmuls=slow_in_sdpa(DEVICE, model.compute_dtype, model.config.block_size, model.config.dropout),
        cpu=True,
    )


def tokens(shape: dict[str, Any], batch_size: int) -> Batch:
    x = torch.randint(shape["vocab_size"], (1, batch_size, shape["block_size"] + 1))
    return Batch(x[..., :-1].contiguous(), x[..., 1:].contiguous(), (5,))


@pytest.mark.parametrize(("shape", "batch_size"), SHAPES)
@pytest.mark.parametrize(("ops", "chunk"), [(REFERENCE, 0), (FUSED, 0), (FUSED, 8)])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (BFLOAT16, torch.float32), (BFLOAT16, BFLOAT16)])
@DROPOUT
@EVERY_MODE
def test_what_a_forward_pass_keeps(
    recompute: str,
    dropout: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    ops: Ops,
    chunk: int,
    shape: dict[str, Any],
    batch_size: int,
) -> None:
    attributes = dict(compute_dtype=dtypes[0], stream_dtype=dtypes[1], recompute=recompute)
    model = make(ops, shape | {"dropout": dropout}, chunk, **attributes).model
    batch = tokens(shape, batch_size)
    with Made() as made:
        loss = model(batch.x[0], batch.y[0])[1]
    step = planned(model, batch_size, chunk)
    assert made.held() == activations(step) + head_kept(step)
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("ops", "dtype", "vocab_size"),  # 512: where the head has most; 64: where the last block has
    [
        *((REFERENCE, dtype, size) for dtype in (torch.float32, BFLOAT16) for size in (512, 64)),
        pytest.param(FUSED, torch.float32, 64, marks=pytest.mark.slow),  # the interpreter is slow
    ],
)
@DROPOUT
@EVERY_MODE
def test_the_peak_of_a_step(recompute: str, dropout: float, ops: Ops, dtype: torch.dtype, vocab_size: int) -> None:
    """Not FUSED in bfloat16: a CPU's product copies its factors meanwhile, and in the one operation of a fused MLP's
    backward pass it does so when most is held, up to 13 % of this step."""
    shape = dict(block_size=64, vocab_size=vocab_size, n_layer=2, n_head=4, n_embd=64, bias=False, dropout=dropout)
    step = make(ops, shape, 0, compute_dtype=dtype, recompute=recompute)
    batch = tokens(shape, 4)
    step(batch, 1e-3)
    parts = estimate(planned(step.model, 4, 0))
    expected = parts["activations"] + parts["logits"] + parts["workspace"]
    assert allocated(lambda: step(batch, 1e-3)) == pytest.approx(expected, rel=0.06)


@pytest.mark.slow
def test_the_peak_of_a_fused_head() -> None:
    """Where the head has most: once, for the interpreter is slow."""
    test_the_peak_of_a_step("none", 0.0, FUSED, torch.float32, 512)


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "vocab_size"), [("none", 1024), ("block", 64)])
def test_the_peak_of_a_compiled_step(recompute: str, vocab_size: int, compiler: None) -> None:
    """Inductor's choices are its own: near the estimate is all that can be asked."""
    torch.compiler.reset()
    shape = dict(block_size=64, vocab_size=vocab_size, n_layer=6, n_head=4, n_embd=64, bias=False)
    step = make(REFERENCE, shape, 0, compute_dtype=BFLOAT16, recompute=recompute)
    planned_step = dataclasses.replace(planned(step.model, 4, 0), compiled=True)
    step.model = torch.compile(step.model)
    batch = tokens(shape, 4)
    step(batch, 1e-3)
    parts = estimate(planned_step)
    expected = parts["activations"] + parts["logits"] + parts["workspace"]
    assert allocated(lambda: step(batch, 1e-3)) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("several", [False, True])
def test_the_state(dtype: torch.dtype, several: bool) -> None:
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=3, n_head=4, n_embd=64, bias=False))
    model.compute_dtype = dtype
    adam = FlatAdamW(model, REFERENCE, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.1, in_float32=several)
    flat = adam.flat
    buffers = {id(x): x for x in (flat.param, flat.compute, flat.exp_avg, flat.exp_avg_sq, flat.grad, flat.total)}
    held = sum(x.nbytes for x in buffers.values() if x is not None)
    step = dataclasses.replace(planned(model, 1, 0), several=several)
    assert sum(state(step).values()) == held  # widths that are multiples of 64: nothing is padded


GPT2 = Step(GPTConfig(vocab_size=50304, bias=False), batch_size=32)


def test_gpt2_on_a_gpu_by_hand() -> None:
    """36 bytes a channel, token and block: 2 streams of 4, 14 of 2; 16 a token: statistics; 4 a head: log-sum-exps."""
    M, C = 32 * 1024, 768
    assert activations(GPT2) == 12 * (36 * M * C + 16 * M + 4 * M * 12) + (4 + 2) * M * C + 8 * M
    assert head_kept(GPT2) == 2 * M * 50304
    block = dataclasses.replace(GPT2, recompute="block")
    assert activations(block) == 12 * (8 * M * C + 4 * M * 12) - 2 * M * C + (4 + 2) * M * C + 8 * M


def test_graphs_add_up() -> None:
    """The head of an evaluation, and the reference's update, have memory of their own beside the micro-step's graph."""
    for step, more in ((GPT2, head_kept(GPT2)), (dataclasses.replace(GPT2, fused=False), None)):
        without, graphed = (
            sum(estimate(dataclasses.replace(step, graphs=graphs)).values()) for graphs in (False, True)
        )
        n = estimate(step)["weights"] // 4
        assert graphed - without == (more or 8 * n + (2 + 4 + 4) * 32 * 1024 * 50304)
