"""What no kernel takes is refused by its name, with what came and what was expected."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import FUSED, add_layer_norm, cross_entropy, gelu, linear_cross_entropy

TARGETS = torch.zeros(3, dtype=torch.int64)
ADAMW = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), (6,)) | {"lr": (), "step": ()}
ADAMW |= {"n_decay": 2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "max_norm": 0.0}
MLP = {"x": (3, 8), "fc_weight": (16, 8), "fc_bias": (16,), "proj_weight": (8, 16), "proj_bias": (8,)}
GOOD = {  # a tuple is a tensor's shape
    add_layer_norm: {"x": (3, 8), "residual": (3, 8), "weight": (8,), "bias": (8,), "dtype": torch.float32, "p": 0.0},
    gelu: {"x": (3, 8), "approximate": "erf"},
    FUSED.mlp: MLP | {"approximate": "erf", "forward_tiles": 0},
    cross_entropy: {"logits": (3, 8), "targets": TARGETS},
    linear_cross_entropy: {"x": (3, 8), "weight": (10, 8), "targets": TARGETS},
    FUSED.embedding: {"idx": TARGETS[None], "wte": (5, 8), "wpe": (3, 8), "dtype": torch.float32},
    FUSED.adamw: ADAMW | {"inv_scale": None, "compute": None},
}
BAD = [
    (add_layer_norm, "x", (2, 8), "got shape (2, 8), expected (3, 8)"),
    (add_layer_norm, "residual", torch.zeros(3, 8).double(), "got torch.float64, expected torch.float32 or"),
    (add_layer_norm, "residual", (3, 4097), "got 4097 channels, expected 1 to 4096"),
    (add_layer_norm, "dtype", torch.float64, "got torch.float64, expected"),
    (add_layer_norm, "p", 1.0, "got 1.0, expected 0 or more and less than 1"),
    (gelu, "approximate", "none", "got 'none', expected 'erf' or 'tanh'"),
    (gelu, "x", (3, 0), "got shape (3, 0), expected (3, C > 0)"),
    (FUSED.mlp, "fc_bias", torch.zeros(16).half(), "got torch.float16, expected torch.float32"),
    (FUSED.mlp, "proj_weight", torch.zeros(8, 16, device="meta"), "got a tensor on meta, expected"),
    (FUSED.mlp, "forward_tiles", 9, "got 9, expected 0 (cuBLAS) to "),
    (cross_entropy, "targets", torch.zeros(3, dtype=torch.int32), "got torch.int32, expected torch.int64"),
    (linear_cross_entropy, "chunk_rows", -1, "got -1, expected 0"),
    (FUSED.embedding, "idx", (1, 3), "got torch.float32, expected torch.int64 or torch.int32"),
    (FUSED.embedding, "wpe", (4, 8), "got shape (4, 8), expected (3, 8)"),
    (FUSED.embedding, "wte", (5, 8193), "got 8193 channels, expected 1 to 8192"),
    (FUSED.adamw, "exp_avg", torch.zeros(12)[::2], "got stride 2, expected a contiguous buffer"),
    (FUSED.adamw, "compute", (6,), "got torch.float32, expected torch.bfloat16 or torch.float16"),
    (FUSED.adamw, "step", torch.zeros((), dtype=torch.int32), "got torch.int32, expected torch.float32 or torch.int64"),
    (FUSED.adamw, "n_decay", 7, "got 7, expected 0 to 6"),
    (FUSED.adamw, "betas", [0.9, 1.0], "got [0.9, 1.0], expected two numbers of 0 or more and less than 1"),
    (FUSED.adamw, "eps", -1e-8, "got -1e-08, expected 0 or more"),
    (FUSED.adamw, "weight_decay", math.nan, "got nan, expected 0 or more"),
    (FUSED.adamw, "max_norm", -1.0, "got -1.0, expected 0 or more"),
]


@pytest.mark.parametrize(("function", "name", "value", "message"), BAD)
def test_refused_with_what_came_and_what_was_expected(function, name: str, value: Any, message: str, device) -> None:
    arguments = GOOD[function] | {name: value}
    for key, x in arguments.items():
        x = torch.zeros(x) if isinstance(x, tuple) else x
        arguments[key] = x.to(device) if isinstance(x, Tensor) and not x.is_meta else x
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        function(**arguments)
