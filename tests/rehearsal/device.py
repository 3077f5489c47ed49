"""An H100 that is not there: the fixture `gpu`.

torch's queries about CUDA return an H100's answers. Tensors on `gpu.device` are fake: they have shape, dtype, strides
and device, but no memory, and operations on them compute nothing. The autograd engine and its threads are real.
torch.cuda's streams, events and captures are replaced by stand-ins. Waits of one stream for another are seen, whether
Python or autograd made them.
"""

import ctypes
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

DEVICE = torch.device("cuda:0")
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85_029_158_912,
    L2_cache_size=50 * 2**20,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    uuid="00000000-0000-0000-0000-000000000000",
)


def nothing(*args: object, **kwargs: object) -> None:
    """Does nothing."""


class Graph:
    """Replaces torch.cuda.CUDAGraph: a recorded one."""

    stream: int  # of its recording
    strays = 0  # waits between that stream and others: a device would fail, or capture the other stream too
    failed = True  # ended by an exception
    replays = 0
    __init__ = nothing

    def replay(self) -> None:
        self.replays += 1


class Gpu:
    """What a test can use: the device, the current stream (0 is the default one), and the captures in their order."""

    device = DEVICE

    def __init__(self) -> None:
        self._guard = ctypes.CDLL(os.environ["NANOFUSE_GUARD"])
        self._guard.guard_stream.restype = ctypes.c_int64
        self._ids = count(1)
        self._capturing = False
        self._recording: set[tuple[int, int]] = set()  # pools of captures that did not end
        self.stuck: set[tuple[int, int]] = set()  # those of them for which the allocator frees no cached memory
        self.captures: list[Graph] = []
        self.waits: list[tuple[int, int]] = []  # of a stream for another, in Python
        self.draws = True  # whether the generator draws random numbers outside captures

    @property
    def stream(self) -> int:
        """The current stream of this thread. Autograd's threads have their own."""
        return self._guard.guard_stream()

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Make `stream` the current stream of this thread."""
        before = self.stream
        self._guard.guard_set_stream(ctypes.c_int64(stream))
        try:
            yield
        finally:
            self._guard.guard_set_stream(ctypes.c_int64(before))

    @contextmanager
    def capturing(self, graph: Graph, stream: int, pool: tuple[int, int]) -> Iterator[None]:
        """Like `torch.cuda.graph`: launches inside are recorded in the graph. One that fails is not ended, as where
        CUDA has invalidated it."""
        if pool in self._recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._recording.add(pool)
        self.stuck.add(pool)
        self.draws = False
        graph.stream = stream
        self.captures.append(graph)
        self._capturing = True
        self._guard.guard_capture(ctypes.c_int64(stream))
        try:
            with self.on(stream):
                yield
            graph.failed = False
            self._recording.remove(pool)
            self.stuck.remove(pool)
            self.draws = True
        finally:
            self._capturing = False
            graph.strays = self._guard.guard_capture(ctypes.c_int64(-1))

    def stand_ins(self) -> dict[str, object]:
        """More of these, of this device's streams."""
        gpu = self

        class Stream:
            device, device_index, device_type, cuda_stream = DEVICE, 0, 1, 0

            def __init__(self, device: object = None, priority: int = 0, *, stream_id: int | None = None) -> None:
                self.stream_id = next(gpu._ids) if stream_id is None else stream_id

            def wait_stream(self, other: "Stream") -> None:
                gpu.waits.append((self.stream_id, other.stream_id))
                gpu._guard.guard_wait(ctypes.c_int64(self.stream_id), ctypes.c_int64(other.stream_id))

        return {
            "Stream": Stream,
            "graph": lambda graph, pool, stream, **options: gpu.capturing(graph, stream.stream_id, pool),
            "graph_pool_handle": lambda: (0, next(gpu._ids)),
            "is_current_stream_capturing": lambda: gpu._capturing,
            "current_stream": lambda device=None: Stream(stream_id=gpu.stream),
            "default_stream": lambda device=None: Stream(stream_id=0),
            "stream": lambda stream: nullcontext() if stream is None else gpu.on(stream.stream_id),
        }


class Event:
    """Replaces torch.cuda.Event."""

    __init__ = record = synchronize = nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


ANSWERS: dict[str, object] = {  # what replaces names in torch.cuda
    "Event": Event,
    "CUDAGraph": Graph,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda device=None: (H100.major, H100.minor),
    "get_device_name": lambda device=None: H100.name,
    "get_device_properties": lambda device=None: H100,
    "mem_get_info": lambda device=None: (H100.total_memory - 2**29, H100.total_memory),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "device": lambda device: nullcontext(),
    "device_of": lambda x: nullcontext(),
    "_is_in_bad_fork": lambda: False,
    **dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "set_device", "set_rng_state"), nothing),
    **dict.fromkeys(("manual_seed", "manual_seed_all", "reset_peak_memory_stats"), nothing),
}


@torch.compiler.assume_constant_result
def takes_cudnn() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Replaces F.scaled_dot_product_attention, which uses CUDA's kernels only in a CUDA build with a driver: by cuDNN's
    where `torch.nn.attention.sdpa_kernel` enables it, else flash attention."""
    if not takes_cudnn():
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False)[0]
    grad = torch.is_grad_enabled() and q.requires_grad
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, grad, dropout_p, is_causal, False)[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The device that is not there. Every tensor made in the test is fake."""
    device = Gpu()
    for name, answer in {**ANSWERS, **device.stand_ins()}.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: device.stuck.remove(pool))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", nothing)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0)  # launch plans check its alignment
    if hasattr(fake_tensor, "init_gpu_context"):  # torch 2.13
        monkeypatch.setattr(fake_tensor, "init_gpu_context", nothing)
    with FakeTensorMode():
        yield device
