"""What a run computes its attention and its MLPs with: what was named, if it can run here, or the fastest, measured.

On CUDA each candidate is timed on one layer of the run's own shape, as training makes it: a replayed graph, caches
cold. Rank 0 measures for all. The times are kept on disk, by device, versions and shape. The next run starts sooner and
takes the same, so that it computes the same bits. Elsewhere nothing is measured.
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
from typing import Any, NamedTuple, Self

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

MEASURED = tuple(name for name in BACKENDS if name not in ("auto", "math"))  # math: never first, and holds (B, H, T, T)
CHECKED = 4096  # rows of the MLP that are held to float64: enough for a program to take several tiles

Clock = Callable[[Timeable, torch.device], float]  # milliseconds that the work takes
MLP = Callable[..., Tensor]


# Attention ------------------------------------------------------------------------------------------------------------


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
    def of(cls, c: GPTConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Of a model in training."""
        return cls(batch_size, c.block_size, c.n_head, c.head_size, c.dropout, dtype, device)


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
        times, when = {}, ""
        if world.master:
            able = [name for name in MEASURED if not why_not(name, shape)]
            clock = clock or milliseconds
            times, when = _times("attention", shape, able, lambda name: clock(layer_pass(name, shape), shape.device))
    backend = BACKENDS[world.from_master(BACKENDS.index(next(iter(times), "auto")))]
    if not times:
        return backend, f"torch's own choice; none of {', '.join(MEASURED)} runs here"
    return backend, f"{backend}, {_listed(times)} a layer, forward and backward{when}"


def layer_pass(backend: str, shape: AttentionShape) -> Callable[[], None]:
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


# The MLP --------------------------------------------------------------------------------------------------------------


class MLPShape(NamedTuple):
    """What one layer's MLP is given, a micro-step at a time."""

    rows: int
    width: int
    bias: bool
    gelu: str
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, c: GPTConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Of a model in training."""
        return cls(batch_size * c.block_size, c.n_embd, c.bias, c.gelu, dtype, device)


def has_fused_matmul(ops: Ops, width: int, dtype: torch.dtype) -> bool:
    """Whether an MLP has more than one way to go: in 2-byte elements, with rows that begin at multiples of 16 bytes."""
    return ops.name == "fused" and dtype.itemsize == 2 and width % 8 == 0


def choose_mlp(ops: Ops, shape: MLPShape, world: World, clock: Clock | None = None) -> tuple[Ops, str]:
    """(the bundle, whose MLP takes for its matmuls what is fastest here; what to say of it or nothing).

    On CUDA cuBLAS and each of the fused matmul's tiles are timed, forward and backward apart. What is further from
    float64 than the kernels' tests allow is not timed, and said. clock: in place of CUDA's. Random state is afterwards
    as it was before.
    """
    devices = [shape.device] if shape.device.type == "cuda" else []
    if not has_fused_matmul(ops, shape.width, shape.dtype) or (clock is None and not devices):
        return ops, ""
    from kernels.fused.mlp import ways  # only here: where fused kernels were chosen, Triton is there

    taken, said = {}, []
    with torch.random.fork_rng(devices):
        both = ways(torch.empty(0, dtype=shape.dtype, device=shape.device))
        for direction, names in zip(("forward", "backward"), both, strict=True):
            by_name = {name: partial(ops.mlp, **{f"{direction}_tiles": n}) for n, name in enumerate(names)}
            fastest, words = _fastest_mlp(by_name, direction, shape, clock) if world.master else (names[0], "")
            taken[f"{direction}_tiles"] = world.from_master(names.index(fastest))
            said.append(f"{direction} {words}")
    return replace(ops, mlp=partial(ops.mlp, **taken)), "; ".join(said)


def _fastest_mlp(by_name: Mapping[str, MLP], direction: str, shape: MLPShape, clock: Clock | None) -> tuple[str, str]:
    """The fastest of those that are right, the first of which is the measure; what to say of it."""
    wrong = {name: reason for name in list(by_name)[1:] if (reason := what_is_wrong(by_name[name], shape))}
    right = [name for name in by_name if name not in wrong]

    def time(name: str) -> float:
        return (clock or milliseconds)(mlp_pass(by_name[name], direction, shape), shape.device)

    times, when = _times(f"mlp {direction}", shape, right, time)
    fastest = next(iter(times))
    left_out = "".join(f", without {name}, which is wrong: {reason}" for name, reason in wrong.items())
    return fastest, f"{fastest}, {_listed(times, digits=3)} a layer{when}{left_out}"


def mlp_inputs(shape: MLPShape, rows: int) -> dict[str, Any]:
    """Random arguments of `mlp`, which all want a gradient."""

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, device=shape.device)).to(shape.dtype).requires_grad_()

    K, N = shape.width, 4 * shape.width
    return {
        "x": randn(rows, K),
        "fc_weight": randn(N, K, scale=K**-0.5),
        "fc_bias": randn(N) if shape.bias else None,
        "proj_weight": randn(K, N, scale=N**-0.5),
        "proj_bias": randn(K) if shape.bias else None,
        "approximate": shape.gelu,
    }


def mlp_pass(mlp: MLP, direction: str, shape: MLPShape) -> Timeable:
    """One layer's forward pass, or the backward pass through it, random inputs."""
    inputs = mlp_inputs(shape, shape.rows)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor)]
    dy = torch.randn_like(inputs["x"])
    if direction == "forward":
        return lambda: mlp(**inputs)
    return Staged(lambda: mlp(**inputs), lambda y: torch.autograd.grad(y, leaves, dy))


def what_is_wrong(mlp: MLP, shape: MLPShape) -> str:
    """What is wrong with an MLP's first rows, or their gradients, in one line; empty where nothing is.

    The criterion is that of the kernels' tests.
    """
    inputs = mlp_inputs(shape, min(shape.rows, CHECKED))
    try:
        return fault(mlp, reference.mlp, inputs)
    except Exception as error:  # from Triton's compiler, its launcher, CUDA: all kinds
        return first_line(error)


# Times that are kept --------------------------------------------------------------------------------------------------


def _times(
    kind: str, shape: AttentionShape | MLPShape, names: Sequence[str], time: Callable[[str], float]
) -> tuple[dict[str, float], str]:
    """(milliseconds by name, the fastest first; when that was): an earlier run's of the same names, or `time`'s."""
    path = cache_file()
    key = ", ".join([kind, device_name(shape.device), _versions(), *map(str, shape[:-1])])
    known = read_times(path)
    times, when = known.get(key, {}), ", as an earlier run measured"
    if times.keys() != set(names):
        times, when = {name: time(name) for name in names}, ""
        with suppress(OSError):  # where nothing can be kept, the next run measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(json.dumps(known | {key: times}, indent=1).encode())
    return {name: times[name] for name in sorted(times, key=times.get)}, when


def _listed(times: Mapping[str, float], digits: int = 2) -> str:
    return "fastest of " + ", ".join(f"{name} {ms:.{digits}f} ms" for name, ms in times.items())


def _versions() -> str:
    """What times depend on beside the device."""
    try:
        import triton
    except ImportError:
        triton = None
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+(\.\d+)+", driver.read_text()) if driver.exists() else None
    return f"torch {torch.__version__}, triton {triton and triton.__version__}, driver {found and found[0]}"


def cache_file() -> Path:
    """Where times are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(folder):  # a user without a home
        folder = os.devnull
    return Path(folder, "nanofuse", "times.json")


def read_times(path: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by device, versions and shape, then by name. A file that is damaged counts as not there."""
    try:
        found = json.loads(path.read_bytes())
        return {key: {name: float(ms) for name, ms in times.items()} for key, times in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
