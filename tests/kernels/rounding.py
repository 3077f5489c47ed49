"""Triton's interpreter truncates float32 to bfloat16; devices round to the nearest, ties to even. So do tests."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the interpreter's bfloat16 numbers are those that a device would store."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), (bits >> 16) | 0x40, rounded)  # a NaN must not carry over to infinity
        return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
