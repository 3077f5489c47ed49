"""How a run computes its attention and its MLPs: the way that a setting names, if it runs here, or the fastest.

On CUDA each candidate is timed on one layer of the run's own shape, in a replayed graph, with cold caches. Rank 0
measures for all. The times are kept on disk, by device, versions and shape. So the next run starts sooner, makes the
same choice and computes the same bits. Elsewhere nothing is measured.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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

Clock = Callable[[Timeable, torch.device], float]  # milliseconds that the work takes
MLP = Callable[..., Tensor]


class Layer(NamedTuple):
    """One layer of a model, as a micro-step computes it."""

    config: GPTConfig
    batch_size: int
    dtype: torch.dtype
    device: torch.device


# Attention ------------------------------------------------------------------------------------------------------------


def choose_attention(name: str, layer: Layer, world: World, clock: Clock | None = None) -> tuple[str, str]:
    """(backend of every rank; a message about it, may be empty). `name` is one of BACKENDS.

    `auto` on CUDA is the backend that rank 0 measures as the fastest, forward and backward. Elsewhere it stays `auto`,
    the same in every run. Any other name is tried: UserError if it cannot run. clock: replaces CUDA's. The random state
    does not change.
    """
    devices = [layer.device] if layer.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if name != "auto":
            _require(name, layer)
            return name, f"{name}, as set"
        if clock is None and not devices:
            return name, ""
        times, when = {}, ""
        if world.master:

            def time(name: str) -> float:
                return (clock or milliseconds)(attention_pass(name, layer), layer.device)

            times, when = _times("attention", layer, [name for name in MEASURED if not why_not(name, layer)], time)
    backend = BACKENDS[world.from_master(BACKENDS.index(next(iter(times), "auto")))]
    if not times:
        return backend, f"torch's own choice; none of {', '.join(MEASURED)} runs here"
    return backend, f"{backend}, {_listed(times)} a layer, forward and backward{when}"


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
            text = reasons[0] if reasons else str(error) or type(error).__name__
            return first_line(text)
    return ""


def _require(name: str, layer: Layer) -> None:
    small = layer._replace(batch_size=1)
    if reason := why_not(name, small):
        here = ["auto", *(other for other in BACKENDS[1:] if not why_not(other, small))]
        raise UserError(f"attention: got {name!r}, expected one of: {', '.join(here)} (on {layer.device}): {reason}")


# The MLP --------------------------------------------------------------------------------------------------------------


def has_fused_matmul(ops: Ops, width: int, dtype: torch.dtype) -> bool:
    """Whether the fused matmul can be used: it needs 2-byte elements and rows that begin at multiples of 16 of them."""
    return ops.name == "fused" and dtype.itemsize == 2 and width % 16 == 0


def choose_mlp(ops: Ops, layer: Layer, world: World, clock: Clock | None = None) -> tuple[Ops, str]:
    """(the bundle, its MLP with the fastest matmuls; a message about them, may be empty).

    On CUDA cuBLAS and each of the fused matmul's tiles are timed, forward and backward separately. A candidate that
    differs from float64 more than the kernels' tests allow is not timed; the message names it. clock: replaces CUDA's.
    The random state does not change.
    """
    devices = [layer.device] if layer.device.type == "cuda" else []
    if not has_fused_matmul(ops, layer.config.n_embd, layer.dtype) or (clock is None and not devices):
        return ops, ""
    from kernels.fused.mlp import ways  # imported here: fused kernels were chosen, so Triton is installed

    taken, said = {}, []
    with torch.random.fork_rng(devices):
        both = ways(torch.empty(0, dtype=layer.dtype, device=layer.device))
        for direction, names in zip(("forward", "backward"), both, strict=True):
            by_name = {name: partial(ops.mlp, **{f"{direction}_tiles": n}) for n, name in enumerate(names)}
            fastest, words = _fastest_mlp(by_name, direction, layer, clock) if world.master else (names[0], "")
            taken[f"{direction}_tiles"] = world.from_master(names.index(fastest))
            said.append(f"{direction} {words}")
    return replace(ops, mlp=partial(ops.mlp, **taken)), "; ".join(said)


def _fastest_mlp(by_name: Mapping[str, MLP], direction: str, layer: Layer, clock: Clock | None) -> tuple[str, str]:
    """(the fastest of those that are correct; a message about it). The first one is not checked."""
    wrong = {name: reason for name in list(by_name)[1:] if (reason := what_is_wrong(by_name[name], layer))}
    right = [name for name in by_name if name not in wrong]

    def time(name: str) -> float:
        return (clock or milliseconds)(mlp_pass(by_name[name], direction, layer), layer.device)

    times, when = _times(f"mlp {direction}", layer, right, time)
    fastest = next(iter(times))
    left_out = "".join(f", without {name}, which is wrong: {reason}" for name, reason in wrong.items())
    return fastest, f"{fastest}, {_listed(times, digits=3)} a layer{when}{left_out}"


def rows_of(layer: Layer) -> int:
    """Rows that the MLP gets in a micro-step."""
    return layer.batch_size * layer.config.block_size


def mlp_inputs(layer: Layer, rows: int) -> dict[str, Any]:
    """Random arguments of `mlp`. All tensors require gradients."""

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, device=layer.device)).to(layer.dtype).requires_grad_()

    K, N = layer.config.n_embd, 4 * layer.config.n_embd
    return {
        "x": randn(rows, K),
        "fc_weight": randn(N, K, scale=K**-0.5),
        "fc_bias": randn(N) if layer.config.bias else None,
        "proj_weight": randn(K, N, scale=N**-0.5),
        "proj_bias": randn(K) if layer.config.bias else None,
        "approximate": layer.config.gelu,
    }


def mlp_pass(mlp: MLP, direction: str, layer: Layer) -> Timeable:
    """One layer's forward pass, or the backward pass through it, with random inputs."""
    inputs = mlp_inputs(layer, rows_of(layer))
    leaves = [x for x in inputs.values() if isinstance(x, Tensor)]
    dy = torch.randn_like(inputs["x"])
    if direction == "forward":
        return lambda: mlp(**inputs)
    return Staged(lambda: mlp(**inputs), lambda y: torch.autograd.grad(y, leaves, dy))


def what_is_wrong(mlp: MLP, layer: Layer) -> str:
    """What is wrong with an MLP's first CHECKED rows, or their gradients, in one line; empty if nothing is.

    The criterion is that of the kernels' tests.
    """
    inputs = mlp_inputs(layer, min(rows_of(layer), CHECKED))
    try:
        return fault(mlp, reference.mlp, inputs)
    except Exception as error:  # of any type: from Triton's compiler, its launcher, CUDA
        return first_line(error)


# Times that are kept --------------------------------------------------------------------------------------------------


def _times(kind: str, layer: Layer, names: Sequence[str], time: Callable[[str], float]) -> tuple[dict[str, float], str]:
    """(milliseconds by name, the fastest first; a note if they are an earlier run's). Times what is not stored yet."""
    path = cache_file()
    key = f"{kind}, {device_name(layer.device)}, {_versions()}, {layer.batch_size} x {layer.config}, {layer.dtype}"
    known = read_times(path)
    times, when = known.get(key, {}), ", as an earlier run measured"
    if times.keys() != set(names):
        times, when = {name: time(name) for name in names}, ""
        with suppress(OSError):  # if nothing can be stored, the next run measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(json.dumps(known | {key: times}, indent=1).encode())
    return {name: times[name] for name in sorted(times, key=times.get)}, when


def _listed(times: Mapping[str, float], digits: int = 2) -> str:
    return "fastest of " + ", ".join(f"{name} {ms:.{digits}f} ms" for name, ms in times.items())


def _versions() -> str:
    """The versions that times depend on."""
    try:
        import triton
    except ImportError:
        triton = None
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+(\.\d+)+", driver.read_text()) if driver.exists() else None
    return f"torch {torch.__version__}, triton {triton and triton.__version__}, driver {found and found[0]}"


def cache_file() -> Path:
    """The file that stores the times."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(folder):  # a user without a home
        folder = os.devnull
    return Path(folder, "nanofuse", "times.json")


def read_times(path: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by device, versions and shape, then by name. A damaged file counts as missing."""
    try:
        found = json.loads(path.read_bytes())
        return {key: {name: float(ms) for name, ms in times.items()} for key, times in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
