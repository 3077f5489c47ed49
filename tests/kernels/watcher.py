"""What a kernel does to memory, watched while Triton's interpreter runs it: bytes moved, accesses out of bounds, and
races: addresses that one program of a launch writes while another reads or writes them, in an order nobody knows."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

PROGRAMS = np.uint64(2**16)  # more than a launch has here


@dataclass
class Memory:
    """loaded, stored: bytes, of the lanes that were not masked off. spans: (first byte, byte after the last) of each
    of the running kernel's tensors; reads, writes: where its programs have been, address / 2 * PROGRAMS + program."""

    loaded: int = 0
    stored: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    reads: list[np.ndarray] = field(default_factory=list)
    writes: list[np.ndarray] = field(default_factory=list)

    def enter(self, arguments: list) -> None:
        self.reads, self.writes = [], []
        tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
        self.spans = [span(t) for t in tensors if isinstance(t, torch.Tensor) and t.numel()]

    def access(self, visits: list[np.ndarray], ptrs: np.ndarray, mask: np.ndarray, width: int, program: int) -> int:
        """The bytes of an access of `width` bytes a lane."""
        assert program < PROGRAMS
        ptrs, mask = np.broadcast_arrays(ptrs.astype(np.uint64), np.asarray(mask, dtype=bool))
        ptrs = ptrs[mask]
        inside = np.zeros(ptrs.shape, dtype=bool)
        for first, end in self.spans:
            inside |= (ptrs >= np.uint64(first)) & (ptrs + np.uint64(width) <= np.uint64(end))
        assert inside.all(), f"{(~inside).sum()} of {ptrs.size} accesses outside the kernel's tensors"
        halves = np.unique((ptrs >> np.uint64(1))[:, None] + np.arange(max(width // 2, 1), dtype=np.uint64))
        visits.append(halves * PROGRAMS + np.uint64(program))
        return ptrs.size * width

    def leave(self, kernel: str) -> None:
        """The launch is over."""
        nowhere = np.array([], dtype=np.uint64)
        read, written = (np.unique(np.concatenate([nowhere, *visits])) for visits in (self.reads, self.writes))
        places = written // PROGRAMS
        assert (places[1:] != places[:-1]).all(), f"{kernel}: several programs write to one address"
        others = np.setdiff1d(read, written) // PROGRAMS
        assert not np.isin(others, places).any(), f"{kernel}: a program reads what another writes"


def span(x: torch.Tensor) -> tuple[int, int]:
    """(first byte, byte after the last) of what x, a view of any strides, can reach."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def watch(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """A Memory that sees every load and store of the interpreter from here on; atomics are not seen."""
    memory, builder, executor = Memory(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    to_host, call = executor._init_args_hst, executor.__call__

    def access(self, visits: list[np.ndarray], ptrs, mask) -> int:
        x, y, z = self.grid_idx
        program = (z * self.grid_dim[1] + y) * self.grid_dim[0] + x
        return memory.access(visits, ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8, program)

    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        memory.loaded += access(self, memory.reads, ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        memory.stored += access(self, memory.writes, ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    def _init_args_hst(self, args, kwargs):
        on_host = to_host(self, args, kwargs)
        memory.enter([*on_host[0], *on_host[1].values()])
        return on_host

    def __call__(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        memory.leave(self.fn.__name__)
        return result

    for owner, method in (
        (builder, create_masked_load), (builder, create_masked_store), (executor, _init_args_hst), (executor, __call__)
    ):  # fmt: skip
        monkeypatch.setattr(owner, method.__name__, method)
    return memory
