"""Every op as torch.library wants it: what its schema says of its arguments, and its fake of its results."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import kernels.fused  # noqa: F401 (it registers them)
from kernels import cpu

OPS, ON_CPU = torch.ops.nanofuse, torch.ops.nanofuse_cpu
BFLOAT16 = torch.bfloat16
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
Calls = Iterator[tuple]


def draw(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def gelu(device: torch.device) -> Calls:
    x = draw(5, 24, device=device)
    yield OPS.gelu, x, "erf"
    yield OPS.gelu_backward, x, x, "tanh"


def mlp(device: torch.device) -> Calls:
    sizes = (5, 16), (24, 16), (24,), (16, 24), (16,)
    x, fc_weight, fc_bias, *proj = (draw(*size, device=device) for size in sizes)
    yield OPS.mlp, x, fc_weight, fc_bias, *proj, "erf", True, 1, 1
    yield OPS.mlp, x, fc_weight, None, proj[0], None, "tanh", False, 0, 0
    pre, nowhere = draw(5, 24, device=device), x.new_empty(0)
    for tiles, wants_dbias, into in ((0, True, nowhere), (1, True, nowhere), (0, False, nowhere), (0, True, fc_bias)):
        yield OPS.mlp_dpre, x, proj[0], pre, "erf", wants_dbias, tiles, into, False


def add_layer_norm(device: torch.device) -> Calls:
    x, residual = draw(4, 24, device=device, dtype=BFLOAT16), draw(4, 24, device=device)
    weight, bias = (draw(24, device=device) for _ in range(2))
    seed, nowhere = torch.tensor([3], device=device), residual.new_empty(0)
    yield OPS.add_layer_norm, x, residual, weight, bias, seed, 0.5, BFLOAT16, True
    yield OPS.add_layer_norm, None, residual, weight, None, None, 0.0, BFLOAT16, False
    mean, rstd, dy = draw(4, device=device), draw(4, device=device), draw(4, 24, device=device, dtype=BFLOAT16)
    yield OPS.add_layer_norm_backward, dy, None, residual, weight, mean, rstd, seed, 0.5, BFLOAT16, True, nowhere
    yield OPS.add_layer_norm_backward, dy, residual, residual, weight, mean, rstd, None, 0.0, None, False, nowhere


def embedding(device: torch.device) -> Calls:
    seed, idx = torch.tensor([3], device=device), torch.tensor([4, 0, 4, 1, 1, 4], device=device)
    wte, wpe, dx = (draw(rows, 24, device=device) for rows in (5, 3, 6))
    yield OPS.embedding, idx, wte, wpe, BFLOAT16, seed, 0.5, True
    yield OPS.embedding_dwte, dx, idx, seed, 0.5, torch.zeros_like(wte)
    yield OPS.embedding_dwpe, dx, seed, 0.5, 3, dx.new_zeros(4, 24), True


def cross_entropy(device: torch.device) -> Calls:
    logits, targets = draw(5, 37, device=device, dtype=BFLOAT16), torch.tensor([0, 1, -1, 2, 30], device=device)
    yield OPS.cross_entropy, logits, targets, -1
    loss, *saved = OPS.cross_entropy(logits.detach(), targets, -1)
    yield OPS.cross_entropy_backward, loss, logits, targets, *saved, -1


def head(device: torch.device, chunk_rows: int = 0) -> Calls:
    x, weight = draw(5, 8, device=device, dtype=BFLOAT16), draw(37, 8, device=device, dtype=BFLOAT16)
    targets = torch.tensor([0, 1, -1, 2, 30], device=device)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = x, weight, targets, -1, chunk_rows, *needs
        yield OPS.linear_cross_entropy, *arguments
        with torch.no_grad():
            loss, *saved = OPS.linear_cross_entropy(*arguments)
        operands = (None, None) if chunk_rows else (x, weight)
        for known, into in ((False, x.new_empty(0)), (True, torch.zeros_like(weight)))[: 1 + needs[1]]:
            yield OPS.linear_cross_entropy_backward, loss, known, *saved, *operands, *needs, into, False


def head_in_chunks(device: torch.device) -> Calls:
    return head(device, 2)


def adamw(device: torch.device) -> Calls:
    buffers, compute = torch.rand(4, 40, device=device), torch.zeros(40, device=device, dtype=BFLOAT16)
    scalars = torch.tensor([1e-2, 3.0, 0.5], device=device)
    yield OPS.adamw, *buffers.clone().unbind(), *scalars.clone().unbind(), compute, 13, 0.9, 0.95, 1e-8, 0.1, 1.0


def linear(device: torch.device) -> Calls:
    x, weight, bias = (draw(*size, device=device) for size in ((5, 8), (7, 8), (7,)))
    yield OPS.linear, x, weight, bias, torch.zeros_like(weight), torch.zeros_like(bias), True
    yield OPS.put_product, torch.zeros_like(weight), draw(5, 7, device=device), x, False
    yield OPS.put_row_sum, torch.zeros_like(bias), draw(5, 7, device=device), False


def on_a_cpu(device: torch.device) -> Calls:
    qkv, dy = draw(3, 4, 5, 4), draw(4, 5, 4)
    for p in (0.3, 0.0):
        keep = cpu.random_mask(qkv, p, (4, 5, 5))[0] if p else None
        yield ON_CPU.attention, qkv.detach(), keep
        _, *read = ON_CPU.attention(qkv, keep)
        yield ON_CPU.attention_backward, dy, qkv, *read, keep
    idx = torch.ones(2, 5, dtype=torch.int64)
    yield ON_CPU.embedding, idx, draw(3, 4)
    yield ON_CPU.embedding_backward, draw(2, 5, 4), idx, 3
    yield ON_CPU.gelu, dy.detach(), "none"
    yield ON_CPU.gelu_backward, dy, dy, "tanh"


FAMILIES = [gelu, mlp, add_layer_norm, embedding, cross_entropy, head, head_in_chunks, adamw, linear, on_a_cpu]


@pytest.mark.parametrize("family", FAMILIES)
def test_registered_as_torch_wants_it(family: Callable[[torch.device], Calls], device: torch.device) -> None:
    """The first of each, the forward op, also for its gradient and for shapes that are not known."""
    for i, (op, *arguments) in enumerate(family(device)):
        if i:
            arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        torch.library.opcheck(op.default, tuple(arguments), test_utils=CHECKS[:2] if i else CHECKS)
