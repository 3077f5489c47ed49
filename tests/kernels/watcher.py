"""What a kernel does to memory, watched while Triton's interpreter runs it: bytes moved, accesses out of bounds, and
races: addresses that one program of a launch writes while another reads or writes them, in an order nobody knows."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


class OutOfBounds(AssertionError):
    """A lane that was not masked off read or wrote outside every tensor that its kernel was given."""


class Race(AssertionError):
    """Two programs of one launch met at an address, and not both to read."""


@dataclass
class Memory:
    """loaded, stored: bytes, of the lanes that were not masked off. `spans`: where the running kernel's tensors lie;
    `reads`, `writes`: where its programs have been, (addresses / 2, the program's number)."""

    loaded: int = 0
    stored: int = 0
    spans: np.ndarray = None
    reads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    writes: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def enter(self, arguments: list) -> None:
        self.reads, self.writes = [], []
        tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
        spans = [span(t) for t in tensors if isinstance(t, torch.Tensor) and t.numel()]
        self.spans = np.array(spans, dtype=np.uint64).reshape(-1, 2)

    def access(self, ptrs: np.ndarray, mask: np.ndarray, width: int, program: int, *, store: bool) -> int:
        ptrs = np.broadcast_to(ptrs, np.broadcast_shapes(ptrs.shape, mask.shape)).astype(np.uint64)
        ptrs = ptrs[np.broadcast_to(mask, ptrs.shape).astype(bool)]
        if ptrs.size:
            inside = np.zeros(ptrs.shape, dtype=bool)
            for first, end in self.spans:
                inside |= (ptrs >= first) & (ptrs + np.uint64(width) <= end)
            if not inside.all():
                raise OutOfBounds(f"{(~inside).sum()} of {ptrs.size} accesses outside the kernel's tensors")
            halves = (ptrs.ravel() >> np.uint64(1))[:, None] + np.arange(max(width // 2, 1), dtype=np.uint64)
            (self.writes if store else self.reads).append((np.unique(halves), program))
        return ptrs.size * width

    def leave(self, kernel: str) -> None:
        """The launch is over: Race if its programs met."""
        written, writers = _places(self.writes)
        if (written[1:] == written[:-1]).any():
            raise Race(f"{kernel}: several programs write to one address")
        read, readers = _places(self.reads)
        at = np.minimum(np.searchsorted(written, read), max(len(written) - 1, 0))
        if len(written) and ((written[at] == read) & (writers[at] != readers)).any():
            raise Race(f"{kernel}: a program reads what another writes")
        self.reads, self.writes = [], []


def _places(visits: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Every address with every program that was there, once, by address."""
    programs = np.uint64(1 + max((program for _, program in visits), default=0))
    keys = [addresses * programs + np.uint64(program) for addresses, program in visits]
    places = np.unique(np.concatenate(keys)) if keys else np.array([], dtype=np.uint64)
    return places // programs, places % programs


def span(x: torch.Tensor) -> tuple[int, int]:
    """(first byte, byte after the last) of what x, a view of any strides, can reach."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def watch(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """A Memory that sees every load and store of the interpreter from here on; atomics are not seen."""
    memory, builder, executor = Memory(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, init = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    call = executor.__call__

    def access(self, ptrs, mask, *, store: bool) -> int:
        x, y, z = self.grid_idx
        program = (z * self.grid_dim[1] + y) * self.grid_dim[0] + x
        width = ptrs.get_element_ty().primitive_bitwidth // 8
        return memory.access(ptrs.data, mask.data, width, program, store=store)

    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        memory.loaded += access(self, ptrs, mask, store=False)
        return load(self, ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        memory.stored += access(self, ptrs, mask, store=True)
        return store(self, ptrs, value, mask, *args, **kwargs)

    def _init_args_hst(self, args, kwargs):
        on_host = init(self, args, kwargs)
        memory.enter([*on_host[0], *on_host[1].values()])
        return on_host

    def __call__(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        memory.leave(self.fn.__name__)
        return result

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)
    monkeypatch.setattr(executor, "_init_args_hst", _init_args_hst)
    monkeypatch.setattr(executor, "__call__", __call__)
    return memory
