"""How a run computes its attention and its MLPs: the way that a setting names, if it runs here, or the fastest.

On CUDA each candidate is timed on one layer of the run's own shape, in a replayed graph, with cold caches. Rank 0
measures for all. The times are kept on disk, by device, versions and shape. So the next run starts sooner, makes the
same choice and computes the same bits. Elsewhere nothing is measured.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from kernels import Ops, reference
from kernels.check import fault
from kernels.timing import Staged, Timeable, milliseconds
from model import GPTConfig
from model.attention import BACKENDS, causal_attention
from train.distributed import World
from train.errors import UserError, first_line
from train.files import replacing
from train.hardware import device_name, synchronize

MEASURED = tuple(name for name in BACKENDS if name not in ("auto", "math"))  # not math: slow, holds (B, H, T, T)
CHECKED = 4096  # rows of the MLP that are compared with float64: enough for a program to take several tiles
TIMED = ("cuda",)  # types of devices whose ways are timed

MLP = Callable[..., Tensor]


class Layer(NamedTuple):
    """One layer of a model, as a micro-step computes it."""

    config: GPTConfig
    batch_size: int
    dtype: torch.dtype
    device: torch.device


def choose_attention(name: str, layer: Layer, world: World) -> tuple[str, str]:
    """(backend of every rank; a message about it, may be empty). `name` is one of BACKENDS.

    `auto` on CUDA is the backend that rank 0 measures as the fastest, forward and backward. Elsewhere it stays `auto`,
    the same in every run. Any other name is tried: UserError if it cannot run.
    """
    if name != "auto":
        small = layer._replace(batch_size=1)
        if reason := why_not(name, small):
            here = ["auto", *(other for other in BACKENDS[1:] if not why_not(other, small))]
            expected = f"expected one of: {', '.join(here)} (on {layer.device})"
            raise UserError(f"attention: got {name!r}, {expected}: {reason}")
        return name, f"attention: {name}, as set"
    if layer.device.type not in TIMED:
        return name, ""
    able = [name for name in MEASURED if not why_not(name, layer)] if world.master else []
    said = f"torch's own choice; none of {', '.join(MEASURED)} runs here"
    if able:
        works = {name: partial(attention_pass, name, layer) for name in able}
        name, said = _fastest("attention", works, layer, "a layer, forward and backward", digits=2)
    (index,) = world.from_master(BACKENDS.index(name))
    return BACKENDS[int(index)], f"attention: {said}"


def attention_pass(backend: str, layer: Layer) -> Callable[[], None]:
    """A function that runs one layer's attention forward and backward, from a random packed qkv to its gradient."""
    c, options = layer.config, {"dtype": layer.dtype, "device": layer.device}
    qkv = torch.randn(layer.batch_size, c.block_size, 3 * c.n_embd, **options, requires_grad=True)
    dy = torch.randn(layer.batch_size, c.block_size, c.n_embd, **options)

    def work() -> None:
        y = causal_attention(qkv, c.n_head, c.dropout, backend)
        torch.autograd.grad(y, qkv, dy)

    return work


def why_not(backend: str, layer: Layer) -> str:
    """Why this backend cannot compute the layer's attention, in one line; empty if it can."""
    with warnings.catch_warnings(record=True) as warned:  # torch warns why a backend of its own cannot run
        warnings.simplefilter("always")
        try:
            attention_pass(backend, layer)()
            synchronize(layer.device)
        except Exception as error:  # of any type: from torch, or from a package that is missing or broken
            said = [str(w.message).split(" (Triggered internally")[0] for w in warned]
            reasons = [text for text in said if "not used because" not in text and "runtime disabled" not in text]
            return first_line(reasons[0] if reasons else error)
    return ""


def has_fused_matmul(ops: Ops, width: int, dtype: torch.dtype) -> bool:
    """Whether the fused matmul can be used: it needs 2-byte elements and rows that begin at multiples of 16 of them."""
    return ops.name == "fused" and dtype.itemsize == 2 and width % 16 == 0


def choose_mlp(ops: Ops, layer: Layer, world: World) -> tuple[Ops, str]:
    """(the bundle, its MLP with the fastest matmuls; a message about them, may be empty).

    On CUDA cuBLAS and each of the fused matmul's tiles are timed, forward and backward separately. A candidate that
    differs from float64 more than the kernels' tests allow is not timed; the message names it.
    """
    if not has_fused_matmul(ops, layer.config.n_embd, layer.dtype) or layer.device.type not in TIMED:
        return ops, ""
    import triton  # imported here: fused kernels were chosen, so it is installed

    from kernels.fused.mlp import ways

    taken, said = {}, []
    both = ways(torch.empty(0, dtype=layer.dtype, device=layer.device))
    for direction, names in zip(("forward", "backward"), both, strict=True):
        tiles, fastest, words = f"{direction}_tiles", names[0], ""
        if world.master:
            mlps = {name: partial(ops.mlp, **{tiles: n}) for n, name in enumerate(names)}
            wrong = {name: reason for name in names[1:] if (reason := what_is_wrong(mlps[name], layer))}
            works = {name: partial(mlp_pass, mlps[name], direction, layer) for name in names if name not in wrong}
            kind = f"mlp {direction}, triton {triton.__version__}"
            fastest, words = _fastest(kind, works, layer, "a layer", digits=3)
            words += "".join(f", without {name}, which is wrong: {reason}" for name, reason in wrong.items())
        (index,) = world.from_master(names.index(fastest))
        taken[tiles] = int(index)
        said.append(f"{direction} {words}")
    return replace(ops, mlp=partial(ops.mlp, **taken)), f"mlp: {'; '.join(said)}"


def mlp_inputs(layer: Layer, most: int | None = None) -> dict[str, Any]:
    """Random arguments of `mlp`, of as many rows as in a micro-step, or the first `most`. All tensors require
    gradients."""

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, device=layer.device)).to(layer.dtype).requires_grad_()

    rows, K, N = layer.batch_size * layer.config.block_size, layer.config.n_embd, 4 * layer.config.n_embd
    return {
        "x": randn(min(rows, most or rows), K),
        "fc_weight": randn(N, K, scale=K**-0.5),
        "fc_bias": randn(N) if layer.config.bias else None,
        "proj_weight": randn(K, N, scale=N**-0.5),
        "proj_bias": randn(K) if layer.config.bias else None,
        "approximate": layer.config.gelu,
    }


def mlp_pass(mlp: MLP, direction: str, layer: Layer) -> Timeable:
    """One layer's forward pass, or the backward pass through it, with random inputs."""
    inputs = mlp_inputs(layer)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor)]
    dy = torch.randn_like(inputs["x"])
    if direction == "forward":
        return lambda: mlp(**inputs)
    return Staged(lambda: mlp(**inputs), lambda y: torch.autograd.grad(y, leaves, dy))


def what_is_wrong(mlp: MLP, layer: Layer) -> str:
    """What is wrong with an MLP's first CHECKED rows, or their gradients, in one line; empty if nothing is.

    The criterion is that of the kernels' tests.
    """
    try:
        return fault(mlp, reference.mlp, mlp_inputs(layer, CHECKED))
    except Exception as error:  # of any type: from Triton's compiler, its launcher, CUDA
        return first_line(error)


def _fastest(
    kind: str, works: Mapping[str, Callable[[], Timeable]], layer: Layer, unit: str, digits: int
) -> tuple[str, str]:
    """(the name of the fastest, a message). Calls and times what makes the works, unless an earlier run did."""
    path, when = cache_file(), ", as an earlier run measured"
    key = f"{kind}, {device_name(layer.device)}, torch {torch.__version__}, {layer.batch_size} x {layer.config}"
    key += f", {layer.dtype}"
    known: dict[str, dict[str, float]] = {}  # milliseconds, by key, then by name
    with suppress(OSError, msgspec.MsgspecError):  # it is missing, or damaged
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, float]])
    if known.get(key, {}).keys() != works.keys():
        known[key], when = {name: milliseconds(make(), layer.device) for name, make in works.items()}, ""
        with suppress(OSError):  # if nothing can be stored, the next run measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(msgspec.json.format(msgspec.json.encode(known), indent=1))
    times = sorted(known[key].items(), key=lambda item: item[1])
    listed = ", ".join(f"{name} {ms:.{digits}f} ms" for name, ms in times)
    return times[0][0], f"{times[0][0]}, fastest of {listed} {unit}{when}"


def cache_file() -> Path:
    """The file that stores the times."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    # a user without a home, whose "~" stays, has none: nothing can be made below this name
    return (folder if folder.is_absolute() else Path(os.devnull)) / "nanofuse" / "times.json"
