"""torch.compile for the device that is not there: the fixture `inductor`.

Inductor writes its code for an H100, and Triton compiles the code's kernels for sm_90. The code runs on fake tensors,
and its launches are recorded instead of made. The project's own code calls torch.compile.
"""

import functools
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, lowering
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import joint_graph, post_grad, pre_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import unset_fake_temporarily
from triton.backends.compiler import GPUTarget

from kernels import targets
from tests.rehearsal.device import DEVICE, H100, Gpu, nothing


class Inductor:
    """What Inductor made, in order."""

    def __init__(self) -> None:
        self.codes: list[str] = []  # a Python module for each graph: forward, backward, evaluation
        self.spills: dict[str, int] = {}  # of each kernel, in the configuration with the most of those it would time
        self.unknown: list[torch._ops.OpOverload] = []  # our operations without a lowering when their graph came
        self.launches: list[int] = []  # bytes of each launch of those kernels, if every tensor is touched once

    def compile(self, graph: torch.fx.GraphModule, inputs: list, **options: object) -> Callable:
        """Replaces `compile_fx_inner`."""
        called = {node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
        self.unknown += [op for op in called if op not in lowering.lowerings and op.namespace == "nanofuse"]
        return compile_fx.compile_fx_inner(graph, inputs, **options)

    def run(self, autotuner: CachingAutotuner, args: tuple) -> None:
        """Replaces `CachingAutotuner.run`, which launches."""
        self.launches.append(sum(x.nbytes for x in args if isinstance(x, torch.Tensor)))

    def precompile(self, autotuner: CachingAutotuner) -> None:
        """Replaces `CachingAutotuner.precompile`, which would load and time the kernels."""
        autotuner._precompile_worker()
        for result in autotuner.compile_results:
            spills = targets.spills(targets.read_machine_code(result.kernel.asm["cubin"])[1])
            name = autotuner.fn.__name__
            self.spills[name] = max(spills, self.spills.get(name, 0))


DRIVER = types.SimpleNamespace(  # replaces the one that Triton and Inductor query before they compile
    get_current_target=lambda: GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size),
    get_current_device=lambda: 0,
    get_current_stream=lambda device=0: 0,
    get_active_torch_device=lambda: DEVICE,
    get_device_interface=lambda: torch.cuda,
    get_benchmarker=lambda: lambda *args, **kwargs: 0.0,
    is_active=lambda: True,
    map_python_to_cpp_type=lambda name: name,
)


def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Makes buffers for Inductor's code. It replaces a C++ function of torch that no fake tensor mode sees."""
    return torch.empty_strided(size, stride, dtype=dtype, device=DEVICE)


@pytest.fixture
def inductor(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Inductor]:
    """Makes `torch.compile` work on `gpu`. It reads no cache."""
    made = Inductor()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    with unset_fake_temporarily():  # patterns are traced with real tensors on the CPU
        for passes in (joint_graph, post_grad, pre_grad):
            lazy_init = functools.partial(passes.lazy_init, torch.device("cpu"))
            lazy_init()
            monkeypatch.setattr(passes, "lazy_init", lambda device=None, lazy_init=lazy_init: lazy_init())
    monkeypatch.setattr(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=made.compile))
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(made.codes.append))
    monkeypatch.setattr(CachingAutotuner, "precompile", lambda self, *args, **kwargs: made.precompile(self))
    monkeypatch.setattr(CachingAutotuner, "run", lambda self, *args, **kwargs: made.run(self, args))
    for name in ("_exchange_device", "_maybe_exchange_device"):  # the code's device guard calls these
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", empty)
    monkeypatch.setattr(guards, "_reinterpret_tensor", torch.as_strided)
    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", nothing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    asked = ("current_device", "device_count", "get_device_properties", "synchronize", "current_stream", "set_device")
    for name in (*asked, "memory_allocated", "is_bf16_supported"):
        monkeypatch.setattr(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    for name in ("exchange_device", "maybe_exchange_device"):
        monkeypatch.setattr(CudaInterface, name, staticmethod(lambda device: 0))
    triton.runtime.driver.set_active(DRIVER)
    settings = {
        "fx_graph_cache": False,
        "joint_graph_constant_folding": False,  # it would compute values
        "use_static_cuda_launcher": False,
    }
    with inductor_config.patch(settings), functorch_config.patch(enable_autograd_cache=False):
        yield made
    shutil.rmtree(tmp_path)
