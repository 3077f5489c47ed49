"""How kernels are launched: on what device, with what arguments, and which inputs are refused.

An op puts a `Launch` together: kernel, grid, arguments, compile-time constants. `run` makes it.

An op can be run without a device too: in `recording(device)` it takes meta tensors, and `run` keeps the launches
instead of making them. `targets.py` compiles these, `train/dryrun.py` counts them: what is inspected is what runs.
"""

import functools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled import mark_graphs

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, in numpy

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Device:
    """What a launch depends on."""

    capability: int  # 90: sm_90, Hopper; 0: Triton's interpreter
    multiprocessors: int  # streaming multiprocessors; grids of persistent kernels are multiples of it


INTERPRETER = Device(capability=0, multiprocessors=2)


@functools.lru_cache
def _cuda_device(index: int | None) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def device_of(x: Tensor | torch.device) -> Device:
    """The device that a launch on x runs on; for a tensor without contents, where it would be told nothing else, the
    interpreter."""
    if (record := _RECORD.get()) is not None:
        return record.device
    device = x if isinstance(x, torch.device) else x.device
    return _cuda_device(device.index) if device.type == "cuda" and not INTERPRETED else INTERPRETER


@dataclass(frozen=True)
class Launch:
    """One launch: `kernel[grid](**args)`. args: tensors, tensor descriptors, numbers and None, by parameter name."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


def run(x: Tensor, *launches: Launch) -> None:
    """Run the launches, in order, on x's device. One with an empty grid is left out."""
    if (record := _RECORD.get()) is not None:
        record.launches.extend(launch for launch in launches if 0 not in launch.grid)
        return
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        for launch in launches:
            if 0 not in launch.grid:
                options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
                launch.kernel[launch.grid](**launch.args, **options)


class _Record(NamedTuple):
    device: Device
    launches: list[Launch]


_RECORD: ContextVar[_Record | None] = ContextVar("record", default=None)


@contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Inside, ops take meta and fake tensors; the list gets the launches that they would make on `device`."""
    record = _Record(device, [])
    token = _RECORD.set(record)
    try:
        yield record.launches
    finally:
        _RECORD.reset(token)


def address(x: Tensor) -> int:
    """Where x begins in memory; while recording, where it would if its storage began at an aligned place."""
    return x.storage_offset() * x.element_size() if _RECORD.get() is not None else x.data_ptr()


def specialised(launch: Launch) -> tuple:
    """What Triton compiles a kernel for: dtypes, which numbers are 1 or multiples of 16, `tl.constexpr`s, warps."""

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, address(value) % 16 == 0
        if name in launch.kernel.fn.__annotations__:  # only these parameters have one
            return value
        if isinstance(value, int):
            return "int", value == 1, value % 16 == 0, value >= 2**31
        return type(value).__name__

    arguments = tuple((name, kind(name, value)) for name, value in launch.args.items())
    return launch.kernel.fn.__name__, arguments, launch.num_warps, launch.num_stages


BODIES: dict[Any, Callable[..., Any]] = {}  # of each registered op, the function that runs on a device


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op`, whose fake is its body with the launches recorded: both make the same tensors.

    `BODIES` gives the body by the op's overload, `torch.ops.nanofuse.X.default`.
    """
    mark_graphs()

    def register(body: Callable[..., Any]) -> Any:
        def fake(*args: Any, **kwargs: Any) -> Any:
            if _RECORD.get() is not None:
                return body(*args, **kwargs)
            first = next(x for x in args if isinstance(x, Tensor))
            with recording(device_of(first)):  # as many partial sums as there: torch.compile's code asserts their shape
                return body(*args, **kwargs)

        op = torch.library.custom_op(name, body, mutates_args=mutates_args)
        op.register_fake(fake)
        namespace, short = name.split("::")
        BODIES[getattr(getattr(torch.ops, namespace), short).default] = body
        return functools.update_wrapper(op, body)

    return register


def refusal(name: str, got: object, expected: str) -> ValueError:
    """It names an argument, says what came and what was expected."""
    return ValueError(f"{name}: got {got}, expected {expected}")


def check_dtype(name: str, dtype: torch.dtype, known: tuple[torch.dtype, ...] = FLOATS) -> None:
    if dtype not in known:
        raise refusal(name, dtype, " or ".join(map(str, known)))


def check(name: str, x: Tensor | None, shape: tuple, *dtypes: torch.dtype, on: Tensor | None = None) -> None:
    """ValueError unless a kernel can take x, or x is None.

    shape: each size as a number, None for any, or a text such as "C > 0" for any but 0. dtypes: FLOATS if none is
    given. on: a tensor, on whose device x must be.
    """
    if x is None:
        return
    if x.ndim != len(shape) or not all(
        want is None or (got > 0 if isinstance(want, str) else got == want)
        for got, want in zip(x.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise refusal(name, f"shape {tuple(x.shape)}", f"({wanted})")
    check_dtype(name, x.dtype, dtypes or FLOATS)
    if on is not None and x.device != on.device:
        raise refusal(name, f"a tensor on {x.device}", f"{on.device}, where the other arguments are")
    if x.device.type not in ("cuda", "meta") and not INTERPRETED:
        raise refusal(name, f"a tensor on {x.device}", "cuda (or a CPU with TRITON_INTERPRET=1)")


def packed(bias: Tensor | None) -> Tensor | None:
    """bias (C,) with unit stride."""
    return None if bias is None else bias.contiguous()


def rows(x: Tensor) -> Tensor:
    """x (..., C) as (M, C) whose last stride is 1: a view where the strides allow it, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def trial_kernel(p_x):
    tl.store(p_x, 1.0)


def why_no_launch(device: torch.device) -> str:
    """Why Triton cannot run a kernel on `device`, in one line; empty if it can. Waits for the device.

    Triton builds its launcher at the first launch, with a C compiler and Python's headers. A machine may have a GPU,
    its driver and Triton, and lack these.
    """
    try:
        x = torch.zeros(1, device=device)
        run(x, Launch(trial_kernel, (1,), {"p_x": x}))
        stored = x.item()
    except subprocess.CalledProcessError as error:
        command = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"{command} could not build Triton's launcher, which takes a C compiler and Python's headers"
    except Exception as error:  # from Triton, its compiler, a driver: all kinds
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return "" if stored == 1.0 else f"a kernel of Triton's that stores 1.0 stored {stored}"
