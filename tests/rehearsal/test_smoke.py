"""The test harness itself: it sees what would break a capture on a device."""

import contextlib

import pytest
import torch

from kernels import FUSED
from model import GPT, GPTConfig, Precision
from tests.rehearsal.device import Gpu, on_device
from train.graph import GraphedStep
from train.optim import FlatAdamW
from train.step import TrainStep

CONFIG = GPTConfig(block_size=64, vocab_size=128, n_layer=2, n_head=2, n_embd=64, bias=True, dropout=0.125)
SHAPE = 4, CONFIG.block_size


def make_step() -> TrainStep:
    model = on_device(lambda: GPT(CONFIG, FUSED, precision=Precision(torch.bfloat16), attention="flash"))
    optimizer = FlatAdamW(model, FUSED, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1, several=True)
    return TrainStep(model, optimizer, grad_clip=1.0)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_a_loss_that_is_held_is_seen(gpu: Gpu) -> None:
    """Its AccumulateGrad nodes remember the default stream. torch 2.13 refuses; earlier, the capture waits for it."""
    step = make_step()
    tokens = torch.zeros(SHAPE, dtype=torch.int64, device=gpu.device)
    held = step.model(tokens, tokens)[1]
    held.backward()
    with contextlib.suppress(Exception):
        GraphedStep(step, (1, *SHAPE))
    micro_step = gpu.captures[0]
    assert micro_step.failed or micro_step.strays
