"""What a kernel does to memory, watched while Triton's interpreter runs it: bytes moved, and accesses out of bounds."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


class OutOfBounds(AssertionError):
    """A lane that was not masked off read or wrote outside every tensor that its kernel was given."""


@dataclass
class Memory:
    """loaded, stored: bytes, of the lanes that were not masked off. `spans`: where the running kernel's tensors lie."""

    loaded: int = 0
    stored: int = 0
    spans: np.ndarray = None

    def enter(self, arguments: list) -> None:
        tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
        spans = [span(t) for t in tensors if isinstance(t, torch.Tensor) and t.numel()]
        self.spans = np.array(spans, dtype=np.uint64).reshape(-1, 2)

    def access(self, ptrs: np.ndarray, mask: np.ndarray, width: int) -> int:
        ptrs = np.broadcast_to(ptrs, np.broadcast_shapes(ptrs.shape, mask.shape)).astype(np.uint64)
        ptrs = ptrs[np.broadcast_to(mask, ptrs.shape).astype(bool)]
        if ptrs.size:
            inside = np.zeros(ptrs.shape, dtype=bool)
            for first, end in self.spans:
                inside |= (ptrs >= first) & (ptrs + np.uint64(width) <= end)
            if not inside.all():
                raise OutOfBounds(f"{(~inside).sum()} of {ptrs.size} accesses outside the kernel's tensors")
        return ptrs.size * width


def span(x: torch.Tensor) -> tuple[int, int]:
    """(first byte, byte after the last) of what x, a view of any strides, can reach."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def watch(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """A Memory that sees every load and store of the interpreter from here on; atomics are not counted."""
    memory, builder, executor = Memory(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, init = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        memory.loaded += memory.access(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        memory.stored += memory.access(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *args, **kwargs)

    def _init_args_hst(self, args, kwargs):
        on_host = init(self, args, kwargs)
        memory.enter([*on_host[0], *on_host[1].values()])
        return on_host

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)
    monkeypatch.setattr(executor, "_init_args_hst", _init_args_hst)
    return memory
