"""On a CUDA device: attention by each of torch's backends. `pytest -m gpu`"""

import pytest
import torch

from model import GPTConfig
from model.attention import SDPA, causal_attention
from tests.model.held import Made
from tests.model.test_attention import truth
from train.choices import Layer, why_not

CUDA = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def need(backend: str, dtype: torch.dtype, dropout: float = 0.0) -> None:
    """Skip what the device lacks; what it surely has must run."""
    config = GPTConfig(block_size=200, n_head=3, n_embd=192, dropout=dropout)
    reason = why_not(backend, Layer(config, 2, dtype, CUDA))
    half = dtype != torch.float32
    surely = {"cudnn": half, "flash": half, "efficient": True, "math": True}[backend]
    if torch.cuda.get_device_capability() >= (9 if backend == "cudnn" else 8, 0) and surely:
        assert reason == ""
    elif reason:
        pytest.skip(f"{backend} does not run here: {reason}")


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv, dy = (torch.randn(2, 200, n * 192, generator=generator).to(CUDA, dtype) for n in (3, 1))
    return qkv.requires_grad_(), dy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", SDPA)
def test_the_formula(backend: str, dtype: torch.dtype) -> None:
    """As near to float64 as math is, twice over. Nothing is copied: there are the kernel's own results, and the three
    gradients become one."""
    need(backend, dtype)
    qkv, dy = inputs(dtype)
    exact = truth(qkv.cpu(), dy.cpu())
    errors = {}
    for name in ("math", backend):
        with Made() as made:
            y = causal_attention(qkv, 3, 0.0, name)
            (dqkv,) = torch.autograd.grad(y, qkv, dy)
        errors[name] = [(x.double().cpu() - e).abs().max().item() for x, e in zip((y, dqkv), exact, strict=True)]
    largest = max(e.abs().max().item() for e in exact)
    slack = largest * torch.finfo(dtype).eps
    for error, allowed in zip(errors[backend], errors["math"], strict=True):
        assert error <= 2 * allowed + slack
    if dtype == torch.bfloat16 and backend != "math":
        kernels = [name for name in made.written if name.startswith("_scaled_dot_product")]
        assert len(kernels) == 2
        assert [name for name in made.written if name not in kernels] == ["stack"]


@pytest.mark.parametrize("backend", SDPA)
def test_dropout_is_a_function_of_the_seed(backend: str) -> None:
    need(backend, torch.bfloat16, 0.25)
    qkv, dy = inputs(torch.bfloat16)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = causal_attention(qkv, 3, 0.25, backend)
        results.append((y, torch.autograd.grad(y, qkv, dy)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=2e-2)  # summed in no fixed order
    assert not torch.equal(results[0][0], results[2][0])
