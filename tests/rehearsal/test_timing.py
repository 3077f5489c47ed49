"""Timing on the device that is not there: work that goes backward through prepared values is captured right."""

import gc

import pytest
import torch
from torch import Tensor

from kernels import FUSED
from kernels.timing import CudaMeter, Staged, by_turns
from tests.rehearsal.device import Gpu


def test_preparation_and_work_are_two_graphs_on_one_stream(gpu: Gpu) -> None:
    x, residual = (torch.randn(64, 32, device=gpu.device, requires_grad=True) for _ in range(2))
    weight = torch.ones(32, device=gpu.device, requires_grad=True)
    dy = torch.randn(64, 32, device=gpu.device)

    def forward() -> Tensor:
        return FUSED.add_layer_norm(x, residual, weight, None, torch.float32, 0.1)[1]

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, residual, weight), dy)

    gc.disable()  # so that a collection by chance cannot help; the process runs only this test
    dropped = [forward()]  # on the default stream, as in a check; only the garbage collector frees it
    dropped.append(dropped)
    del dropped
    work = Staged(forward, backward)
    samples = by_turns({"": work}, gpu.device, seconds=0, least=3)
    assert len(samples[""]) == 3
    assert len(gpu.captures) == 2
    assert len({capture.stream for capture in gpu.captures} - {0}) == 1
    assert [capture.strays for capture in gpu.captures] == [0, 0]
    assert len({capture.replays for capture in gpu.captures}) == 1
    assert gpu.stream == 0
    by_turns({"": work}, gpu.device, seconds=0, least=3)  # on the same stream: each costs a workspace of cuBLAS's
    assert len({capture.stream for capture in gpu.captures}) == 1


def test_a_capture_that_fails_is_timed_as_it_is(gpu: Gpu) -> None:
    x, calls = torch.ones(8, device=gpu.device), []

    def uncapturable() -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("operation not permitted when stream is capturing")
        calls.append(gpu.stream)
        return x * 2

    meter = CudaMeter(gpu.device)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            meter.capture(Staged(lambda: None, lambda nothing: uncapturable()))
        assert [capture.failed for capture in gpu.captures] == [False, True, False]  # the last one resets the generator
        assert gpu.draws
        assert not gpu.stuck
        gpu.captures.clear()
    meter.capture(Staged(lambda: x * 2, torch.sum))
    assert not any(capture.failed for capture in gpu.captures)
    calls.clear()
    samples = by_turns({"": uncapturable}, gpu.device, seconds=0, least=3)
    assert len(samples[""]) == 3
    assert calls[-1] == gpu.stream == 0
