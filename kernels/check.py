"""The check of a kernel's results. Plain torch's error at the same precision says how large its error may be."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PIECE = 2**24  # elements that are compared at a time: in float64 they take 128 MB


def outputs_and_gradients(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What `function(**inputs)` returns, what it leaves of inputs that it may write over, and the gradients of those
    that require one, by name. The inputs themselves stay as they are.

    The gradients are of the outputs' dot products with fixed random numbers, the same ones at every precision.
    """
    floats = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {name: x for name, x in floats.items() if x.requires_grad}
    copies = {name: x.clone() for name, x in floats.items() if not x.requires_grad}
    outputs = [x for x in tree_leaves(function(**inputs | copies)) if isinstance(x, Tensor)]
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)} | copies
    if leaves:
        differentiable = [o for o in outputs if o.requires_grad]
        generator = torch.Generator().manual_seed(1)
        # rounded to bfloat16: exact in every dtype
        cotangents = [torch.randn(o.shape, generator=generator).to(torch.bfloat16).to(o) for o in differentiable]
        gradients = torch.autograd.grad(differentiable, list(leaves.values()), cotangents)
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64. An argument that is a dtype becomes float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return torch.float64 if isinstance(value, torch.dtype) else value

    return {name: widen(value) for name, value in inputs.items()}


def fault(fused: Callable[..., Any], reference: Callable[..., Any], inputs: dict[str, Any]) -> str:
    """What is wrong with `fused`'s results and gradients, in one line; empty if nothing is. See `disagreement`.

    `fused` runs first. So if it misses a store, the memory cannot hold the reference's right answer by chance.
    """
    got, plain = (outputs_and_gradients(function, inputs) for function in (fused, reference))
    return disagreement(got, plain, outputs_and_gradients(reference, in_float64(inputs)))


def disagreement(
    fused: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    *,
    times: float = 2.0,
) -> str:
    """What is wrong with `fused`, in one line; empty if nothing is.

    An element may differ from `exact` by `times` plain torch's largest error and one rounding. With few elements this
    error may be 0 by chance, so four float32 ulps of the largest element are always allowed.
    """
    if not fused.keys() == plain.keys() == exact.keys():
        return f"got {', '.join(fused)}, expected {', '.join(exact)}"
    for name, got in fused.items():
        if got.dtype != plain[name].dtype:
            return f"{name}: {got.dtype}, expected {plain[name].dtype}"
        if got.shape != exact[name].shape:
            return f"{name}: {got.shape}, expected {exact[name].shape}"
        if reason := _off(*(x.reshape(-1).split(PIECE) for x in (got, plain[name], exact[name])), times):
            return f"{name}: {reason}"
    return ""


def _off(got: tuple[Tensor, ...], plain: tuple[Tensor, ...], exact: tuple[Tensor, ...], times: float) -> str:
    slack = max(times * largest((p.double() - x.double()).abs()) for p, x in zip(plain, exact, strict=True))
    slack += 4 * torch.finfo(torch.float32).eps * max(largest(x.double().abs()) for x in exact)
    count, off, worst, most = 0, 0, 0.0, 0.0
    for piece, want in zip(got, exact, strict=True):
        piece, want = piece.double(), want.double()
        allowed = slack + torch.finfo(got[0].dtype).eps * want.abs()
        error = (piece - want).abs()
        agree = (error <= allowed) | (piece == want) | (piece.isnan() & want.isnan())
        count, off = count + agree.numel(), off + (~agree).sum().item()
        worst, most = max(worst, largest(error)), max(most, largest(allowed))
    return f"{off} of {count} elements off, the worst by {worst:.3g}, allowed {most:.3g}" if off else ""


def largest(x: Tensor) -> float:
    """The largest finite number in x, 0 if there is none. Infinities are compared elsewhere."""
    x = x[x.isfinite()]
    return x.max().item() if x.numel() else 0.0
