"""The test harness itself: a forward and a backward pass on the device that is not there, and a capture."""

import contextlib

import pytest
import torch

from kernels import FUSED, launch
from model import GPT, GPTConfig, Precision
from tests.rehearsal.device import Gpu, on_device
from train.data import Batch
from train.graph import GraphedStep
from train.optim import FlatAdamW
from train.step import TrainStep

CONFIG = GPTConfig(block_size=64, vocab_size=128, n_layer=2, n_head=2, n_embd=64, bias=True, dropout=0.125)
SHAPE = 4, CONFIG.block_size


def make_model() -> GPT:
    return on_device(lambda: GPT(CONFIG, FUSED, precision=Precision(torch.bfloat16), attention="flash"))


def make_step() -> TrainStep:
    model = make_model()
    optimizer = FlatAdamW(model, FUSED, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1, several=True)
    return TrainStep(model, optimizer, grad_clip=1.0)


def tokens(gpu: Gpu, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=gpu.device)


def test_forward_and_backward(gpu: Gpu) -> None:
    assert not launch.INTERPRETED
    model = make_model()
    loss = model(tokens(gpu, *SHAPE), tokens(gpu, *SHAPE))[1]
    loss.backward()
    assert loss.device == gpu.device
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.device == gpu.device, name


def test_capture_and_replay(gpu: Gpu) -> None:
    step = make_step()
    graphed = GraphedStep(step, (2, *SHAPE))
    assert [capture.strays for capture in gpu.captures] == [[], []]
    graphed(Batch(tokens(gpu, 2, *SHAPE), tokens(gpu, 2, *SHAPE), (1, 2)), lr=1e-3)
    assert [capture.replays for capture in gpu.captures] == [2, 1]


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_a_loss_that_is_held_is_seen(gpu: Gpu) -> None:
    """Its AccumulateGrad nodes remember the default stream. torch 2.13 refuses; earlier, the capture waits for it."""
    step = make_step()
    held = step.model(tokens(gpu, *SHAPE), tokens(gpu, *SHAPE))[1]
    held.backward()
    with contextlib.suppress(Exception):
        GraphedStep(step, (1, *SHAPE))
    micro_step = gpu.captures[0]
    assert micro_step.failed or micro_step.strays
