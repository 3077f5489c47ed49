"""How a kernel is held to its reference: the error that plain torch makes at that precision is the measure."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def outputs_and_gradients(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What `function(**inputs)` returns, and the gradients of the inputs that require one, by name.

    The gradients are of the outputs' dot products with fixed random numbers, the same ones at every precision.
    """
    returned = function(**inputs)
    outputs = [o for o in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(o, Tensor)]
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    if leaves:
        differentiable = [o for o in outputs if o.requires_grad]
        generator = torch.Generator().manual_seed(1)
        # rounded to bfloat16: exact in every dtype
        cotangents = [torch.randn(o.shape, generator=generator).to(torch.bfloat16).to(o) for o in differentiable]
        gradients = torch.autograd.grad(differentiable, list(leaves.values()), cotangents)
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values, and what is asked for as a dtype, in float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return torch.float64 if isinstance(value, torch.dtype) else value

    return {name: widen(value) for name, value in inputs.items()}


def assert_as_good_as_torch(
    fused: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], what: str = "", summands: float = 0.0
) -> None:
    """Every element of `fused` lies within twice plain torch's largest error, and one rounding, of `exact`.

    Torch's error over a handful of elements may be nought by luck: four float32 ulps of the largest are always allowed,
    or of `summands`, the size of what was summed, where a result may be small because it cancels.
    """
    assert fused.keys() == plain.keys() == exact.keys()
    for name, got in fused.items():
        assert got.dtype == plain[name].dtype, f"{what} {name}: {got.dtype}, expected {plain[name].dtype}"
        assert got.shape == exact[name].shape, f"{what} {name}: {got.shape}, expected {exact[name].shape}"
        want = exact[name].double()
        allowed = 2 * largest((plain[name].double() - want).abs()) + torch.finfo(got.dtype).eps * want.abs()
        allowed += 4 * torch.finfo(torch.float32).eps * max(largest(want.abs()), summands)
        error = (got.double() - want).abs()
        agree = (error <= allowed) | (got.double() == want) | (got.isnan() & want.isnan())
        assert agree.all(), (
            f"{what} {name}: {(~agree).sum()} of {agree.numel()} elements off, the worst by "
            f"{largest(error):.3g}, allowed {largest(allowed):.3g}"
        )


def largest(x: Tensor) -> float:
    """The largest number in x that is one: infinities cancel elsewhere."""
    x = x[x.isfinite()]
    return x.max().item() if x.numel() else 0.0
