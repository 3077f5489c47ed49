"""Which attention a run computes with: the one that is named, if it can run here, or the fastest, measured."""

import warnings
from collections.abc import Callable
from typing import NamedTuple, Self

import torch

from kernels.timing import milliseconds
from model import GPT
from model.attention import BACKENDS, causal_attention
from train.distributed import World
from train.errors import UserError, first_line
from train.hardware import synchronize

MEASURED = tuple(name for name in BACKENDS if name not in ("auto", "math"))  # math: never first, and holds (B, H, T, T)

Work = Callable[[], None]
Clock = Callable[[Work, torch.device], float]  # milliseconds that the work takes


class AttentionShape(NamedTuple):
    """What one layer's attention is given, a micro-step at a time."""

    batch: int
    length: int
    n_head: int
    head_size: int
    dropout: float
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: GPT, batch_size: int, device: torch.device) -> Self:
        """Of a model in training."""
        c = model.config
        return cls(batch_size, c.block_size, c.n_head, c.head_size, c.dropout, model.compute_dtype, device)


def choose_attention(name: str, shape: AttentionShape, world: World, clock: Clock | None = None) -> tuple[str, str]:
    """(backend of every rank, what to say of it or nothing). `name` is one of BACKENDS.

    `auto` is, on CUDA, what rank 0 measures to be the fastest, forward and backward; elsewhere it stays `auto`, the
    same in every run. clock: in place of CUDA's. Any other name is tried, and a UserError where it cannot
    run. Random state is afterwards as it was before.
    """
    devices = [shape.device] if shape.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if name != "auto":
            _insist(name, shape)
            return name, f"{name}, as set"
        if clock is None and not devices:
            return name, ""
        times = measure(shape, clock or milliseconds) if world.master else {}
    fastest = min(times, key=times.get, default="auto")
    backend = BACKENDS[world.from_master(BACKENDS.index(fastest))]
    if not times:
        return backend, f"torch's own choice; none of {', '.join(MEASURED)} runs here"
    each = ", ".join(f"{name} {times[name]:.2f} ms" for name in sorted(times, key=times.get))
    return backend, f"{backend}, fastest of {each} a layer, forward and backward"


def measure(shape: AttentionShape, clock: Clock, candidates: tuple[str, ...] = MEASURED) -> dict[str, float]:
    """Milliseconds of a layer's forward and backward pass, for each candidate that can run."""
    return {name: clock(layer_pass(name, shape), shape.device) for name in candidates if not why_not(name, shape)}


def layer_pass(backend: str, shape: AttentionShape) -> Work:
    """Forward and backward of one layer's attention, from a packed qkv to its gradient, random inputs."""
    width = shape.n_head * shape.head_size
    options = {"dtype": shape.dtype, "device": shape.device}
    qkv = torch.randn(shape.batch, shape.length, 3 * width, **options, requires_grad=True)
    dy = torch.randn(shape.batch, shape.length, width, **options)

    def work() -> None:
        y = causal_attention(qkv, shape.n_head, shape.dropout, backend)
        torch.autograd.grad(y, qkv, dy)

    return work


def why_not(backend: str, shape: AttentionShape) -> str:
    """Why a layer of this shape cannot be computed so, in one line; empty where it can."""
    with warnings.catch_warnings(record=True) as warned:  # what torch says of its own backends
        warnings.simplefilter("always")
        try:
            layer_pass(backend, shape)()
            synchronize(shape.device)
        except (
            Exception
        ) as error:  # from torch, a package that is missing, broken or built for another device: all kinds
            said = [str(w.message).split(" (Triggered internally")[0] for w in warned]
            reasons = [text for text in said if "not used because" not in text and "runtime disabled" not in text]
            text = reasons[0] if reasons else str(error) or type(error).__name__
            return first_line(text)
    return ""


def _insist(name: str, shape: AttentionShape) -> None:
    small = shape._replace(batch=1)
    if reason := why_not(name, small):
        here = ["auto", *(other for other in BACKENDS[1:] if not why_not(other, small))]
        raise UserError(f"attention: got {name!r}, expected one of: {', '.join(here)} (on {shape.device}): {reason}")
