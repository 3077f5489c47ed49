"""The kernels on a CUDA device: the registry's regimes and GPT's own shapes, eager, compiled and captured.

Needs torch, triton, numpy and pytest, nothing else.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from kernels import FUSED, add_layer_norm, cross_entropy, reference
from kernels.cases import CASES, Case, Shape
from kernels.check import disagreement, fault, in_float64, outputs_and_gradients
from kernels.launch import INTERPRETED
from tests.kernels.test_cases import REGIMES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CUDA = torch.device("cuda")
GPT_SHAPES = [
    pytest.param(case, shape, id=f"{case.name}-{'x'.join(map(str, shape))}")
    for case in CASES
    for shape in case.gpt_shapes
]


def refused(case: Case, shape: Shape, dtype: torch.dtype) -> bool:
    """The fused matmul where its rows are not aligned: on a GPU, unlike the interpreter, test_mlp.py's."""
    fused = case.name.startswith("mlp") and "tiles" in case.name
    return fused and dtype.itemsize == 2 and any(n % 8 for n in shape[1:])


EVERY_REGIME = [regime for regime in REGIMES if not refused(*regime.values)]
BY_NAME = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])


def assert_room_for(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, there are {free / 2**30:.1f}")


@pytest.mark.parametrize(("case", "shape", "dtype"), EVERY_REGIME)
def test_every_regime(case: Case, shape: Shape, dtype: torch.dtype, nan_filled: None) -> None:
    assert not fault(case.fused, case.reference, case.make_inputs(shape, dtype, CUDA))


@pytest.mark.parametrize(("case", "shape"), GPT_SHAPES)
def test_gpt_shapes(case: Case, shape: Shape) -> None:
    torch.cuda.empty_cache()
    if "cross_entropy" in case.name and 50304 in shape:
        assert_room_for(55)  # for logits and their gradients in float64
    inputs = case.make_inputs(shape, torch.bfloat16, CUDA)
    fused = outputs_and_gradients(case.fused, inputs)
    again = outputs_and_gradients(case.fused, inputs)
    for name, got in fused.items():
        assert torch.equal(got.nan_to_num(), again[name].nan_to_num()), f"{name}: other bits the second time"
    del again
    plain = outputs_and_gradients(case.reference, inputs)
    exact = {name: x.cpu() for name, x in outputs_and_gradients(case.reference, in_float64(inputs)).items()}
    on_host = [{name: x.cpu() for name, x in results.items()} for results in (fused, plain)]
    assert not disagreement(*on_host, exact)


def one_regime(case: Case) -> list[tuple[Shape, torch.dtype]]:
    """The most ragged shape, in bfloat16: few kernels to compile. The other dtypes where sums are long."""
    dtypes = case.dtypes if case.name in ("add_layer_norm", "linear_cross_entropy") else [torch.bfloat16]
    shapes = [shape for shape in case.shapes if not refused(case, shape, torch.bfloat16)]
    shape = max(shapes, key=lambda shape: sum(n % 16 != 0 for n in shape))
    return [(shape, dtype) for dtype in dtypes]


@pytest.mark.smoke
@BY_NAME
def test_one_regime(case: Case, nan_filled: None) -> None:
    for shape, dtype in one_regime(case):
        test_every_regime(case, shape, dtype, None)


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """What run launches as a graph, and the results that each replay overwrites."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        run()  # compiles the kernels, fills the caches
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        results = run()
    return graph, results


@BY_NAME
def test_captured_in_a_graph_and_compiled(case: Case) -> None:
    """Replayed on other values, the graph gives what an eager call gives. The host never waits for the device."""
    inputs = case.make_inputs(case.shapes[-1], torch.bfloat16, CUDA)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    cotangents: list[torch.Tensor] = []

    def run() -> list[torch.Tensor]:
        outputs = [x for x in tree_leaves(case.fused(**inputs)) if isinstance(x, torch.Tensor)]
        if not leaves:
            return outputs
        differentiable = [x for x in outputs if x.requires_grad]
        cotangents.extend(torch.randn_like(x) for x in differentiable[len(cotangents) :])
        return [x.detach() for x in outputs] + list(torch.autograd.grad(differentiable, leaves, cotangents))

    graph, results = captured(run)
    with torch.no_grad():
        for x in leaves:
            x.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    got = [x.clone() for x in results]
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())

    compiled = torch.compile(case.fused, fullgraph=True)
    eager, by_inductor = outputs_and_gradients(case.fused, inputs), outputs_and_gradients(compiled, inputs)
    assert not disagreement(by_inductor, eager, eager)


def test_dropout_masks_are_new_at_every_replay_and_the_same_in_the_backward_pass() -> None:
    x, residual = torch.ones(256, 384, device=CUDA, requires_grad=True), torch.zeros(256, 384, device=CUDA)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        stream, _ = add_layer_norm(x, residual, torch.ones_like(x[0]), None, torch.bfloat16, 0.2)
        return stream.detach(), *torch.autograd.grad(stream.sum(), x)

    graph, (stream, dx) = captured(step)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(stream == 0)
        assert torch.equal(masks[-1], dx == 0)
        assert abs(masks[-1].float().mean().item() - 0.2) < 0.01
    assert not torch.equal(*masks)


@pytest.mark.parametrize("V", [50304, 50257])
def test_more_logits_than_32_bits_count(V: int) -> None:
    M = 2**31 // V + 700
    assert_room_for(2 * 2 * M * V / 2**30 + 4)
    logits = torch.empty(M, V, dtype=torch.bfloat16, device=CUDA).normal_().requires_grad_()
    targets = torch.randint(V, (M,), device=CUDA)
    loss = M * cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    tail = slice(M - 64, M)  # beyond element 2^31
    wide = logits[tail].detach().double().requires_grad_()
    want = torch.nn.functional.cross_entropy(wide, targets[tail], reduction="sum")
    (expected,) = torch.autograd.grad(want, wide)
    torch.testing.assert_close(gradient[tail].double(), expected, rtol=1e-2, atol=1e-4)


def test_adamw_on_more_elements_than_32_bits_count() -> None:
    assert_room_for(42)  # the state, and the gradient once more, in float32
    n, options = 2**31 + 5000, dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_norm=0.0, inv_scale=None)
    grad = torch.full((n,), 2.0**-10, dtype=torch.bfloat16, device=CUDA)
    state = {name: torch.full((n,), 0.01, device=CUDA) for name in ("param", "exp_avg", "exp_avg_sq")}
    compute = torch.zeros(n, dtype=torch.bfloat16, device=CUDA)
    tail = slice(2**31 - 5000, n)  # on both sides of element 2^31
    grad[tail].normal_()
    small = {name: x[tail].clone() for name, x in (state | {"grad": grad, "compute": compute}).items()}
    lr, steps = torch.tensor(1e-3, device=CUDA), [torch.zeros((), device=CUDA) for _ in range(2)]
    n_decay = 2**31 + 77
    norm, found_inf = FUSED.adamw(grad=grad, lr=lr, step=steps[0], n_decay=n_decay, compute=compute, **state, **options)
    reference.adamw(lr=lr, step=steps[1], n_decay=n_decay - tail.start, **small, **options)
    for name, x in (state | {"compute": compute}).items():
        torch.testing.assert_close(x[tail], small[name], rtol=1e-5 if name != "compute" else 1e-2, atol=1e-7)
    expected = grad.float().square_().sum(dtype=torch.float64).sqrt().float()
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    assert found_inf == 0
