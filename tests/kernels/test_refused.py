"""What no kernel takes is refused by its name, with what came and what was expected."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import FUSED, add_layer_norm, cross_entropy, gelu, linear_cross_entropy

INT64 = torch.int64
ADAMW = {name: (6,) for name in ("param", "grad", "exp_avg", "exp_avg_sq")} | {"lr": (), "step": ()}
ADAMW |= {"n_decay": 2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "max_norm": 0.0}
ADAMW |= {"inv_scale": None, "compute": None}
SIZES = {"x": (3, 8), "fc_weight": (16, 8), "fc_bias": (16,), "proj_weight": (8, 16), "proj_bias": (8,)}
GOOD = {
    add_layer_norm: {"x": (3, 8), "residual": (3, 8), "weight": (8,), "bias": (8,), "dtype": torch.float32, "p": 0.0},
    gelu: {"x": (3, 8), "approximate": "erf"},
    FUSED.mlp: SIZES | {"approximate": "erf"},
    cross_entropy: {"logits": (3, 8), "targets": torch.zeros(3, dtype=INT64)},
    linear_cross_entropy: {"x": (2, 3, 8), "weight": (10, 8), "targets": torch.zeros(2, 3, dtype=INT64)},
    FUSED.embedding: {
        "idx": torch.zeros(2, 3, dtype=INT64), "wte": (5, 8), "wpe": (3, 8), "dtype": torch.float32, "p": 0.0,
    },
    FUSED.adamw: ADAMW,
}  # fmt: skip
BAD = {
    add_layer_norm: [
        ("x", torch.zeros(2, 8), "got shape (2, 8), expected (3, 8)"),
        ("residual", torch.zeros(3, 8).double(), "got torch.float64, expected torch.float32 or"),
        ("weight", torch.zeros(7), "got shape (7,), expected (8)"),
        ("bias", torch.zeros(8, 1), "got shape (8, 1), expected (8)"),
        ("dtype", torch.float64, "got torch.float64, expected"),
        ("p", 1.0, "got 1.0, expected 0 or more and less than 1"),
    ],
    gelu: [
        ("approximate", "none", "got 'none', expected 'erf' or 'tanh'"),
        ("x", torch.zeros(3, 0), "got shape (3, 0), expected (3, C > 0)"),
    ],
    FUSED.mlp: [
        ("approximate", "none", "got 'none', expected 'erf' or 'tanh'"),
        ("x", torch.zeros(3, 0), "got shape (3, 0), expected (3, K > 0)"),
        ("fc_weight", torch.zeros(0, 8), "got shape (0, 8), expected (N > 0, 8)"),
        ("fc_bias", torch.zeros(16).half(), "got torch.float16, expected torch.float32"),
        ("proj_weight", torch.zeros(8, 16, device="meta"), "got a tensor on meta, expected"),
        ("proj_bias", torch.zeros(16), "got shape (16,), expected (8)"),
    ],
    cross_entropy: [
        ("logits", torch.zeros(3, 0), "got shape (3, 0), expected (any, V > 0)"),
        ("targets", torch.zeros(3, dtype=torch.int32), "got torch.int32, expected torch.int64"),
    ],
    linear_cross_entropy: [
        ("x", torch.zeros(2, 3, 0), "got shape (2, 3, 0), expected (2, 3, C > 0)"),
        ("weight", torch.zeros(10, 8).half(), "got torch.float16, expected torch.float32"),
        ("targets", torch.zeros(6, dtype=INT64), "got shape (6,), expected (2, 3)"),
        ("chunk_rows", -1, "got -1, expected 0"),
    ],
    FUSED.embedding: [
        ("idx", torch.zeros(2, 3), "got torch.float32, expected torch.int64 or torch.int32"),
        ("wpe", torch.zeros(4, 8), "got shape (4, 8), expected (3, 8)"),
        ("wte", torch.zeros(5, 8193), "got 8193 channels, expected 1 to 8192"),
        ("p", 1.0, "got 1.0, expected 0 or more and less than 1"),
    ],
    FUSED.adamw: [
        ("param", torch.zeros(2, 3), "got shape (2, 3), expected (any)"),
        ("exp_avg", torch.zeros(7), "got shape (7,), expected (6)"),
        ("exp_avg", torch.zeros(12)[::2], "got stride 2, expected a contiguous buffer"),
        ("compute", torch.zeros(6), "got torch.float32, expected torch.bfloat16 or torch.float16"),
        ("lr", torch.zeros(1), "got shape (1,), expected ()"),
        ("step", torch.zeros((), dtype=torch.int32), "got torch.int32, expected torch.float32"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("function", "bad"), [(function, bad) for function, rows in BAD.items() for bad in rows])
def test_refused_with_what_came_and_what_was_expected(function, bad: tuple[str, Any, str], device) -> None:
    name, value, message = bad
    arguments = {
        key: torch.zeros(value) if isinstance(value, tuple) and key != "betas" else value
        for key, value in GOOD[function].items()
    } | {name: value}
    on_device = {key: x.to(device) if isinstance(x, Tensor) and not x.is_meta else x for key, x in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        function(**on_device)
