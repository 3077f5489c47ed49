"""What no kernel takes is refused by its name, with what came and what was expected."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cases import CASES

NAMED = {case.name: case for case in CASES}
LAYER_NORM, GELU, MLP, LOSS = "add_layer_norm", "gelu, erf", "mlp, erf, cublas", "cross_entropy"
HEAD, EMBEDDING, ADAMW = "linear_cross_entropy", "embedding", "adamw with a loss scale and a copy"
zeros = torch.zeros
BAD = [
    (LAYER_NORM, "x", zeros(2, 64), "got shape (2, 64), expected (1, 64)"),
    (LAYER_NORM, "residual", zeros(1, 64).double(), "got torch.float64, expected torch.float32 or"),
    (LAYER_NORM, "residual", zeros(1, 4097), "got 4097 channels, expected 1 to 4096"),
    (LAYER_NORM, "dtype", torch.float64, "got torch.float64, expected"),
    (LAYER_NORM, "p", 1.0, "got 1.0, expected 0 or more and less than 1"),
    (GELU, "approximate", "none", "got 'none', expected 'erf' or 'tanh'"),
    (GELU, "x", zeros(3, 0), "got shape (3, 0), expected (3, C > 0)"),
    (MLP, "fc_bias", zeros(32).half(), "got torch.float16, expected torch.float32"),
    (MLP, "proj_weight", zeros(32, 32, device="meta"), "got a tensor on meta, expected"),
    (MLP, "forward_tiles", 9, "got 9, expected 0 (cuBLAS) to "),
    (LOSS, "targets", zeros(1, dtype=torch.int32), "got torch.int32, expected torch.int64"),
    (HEAD, "chunk_rows", -1, "got -1, expected 0"),
    (EMBEDDING, "idx", zeros(2, 9), "got torch.float32, expected torch.int64 or torch.int32"),
    (EMBEDDING, "wpe", zeros(10, 37), "got shape (10, 37), expected (9, 37)"),
    (EMBEDDING, "wte", zeros(11, 8193), "got 8193 channels, expected 1 to 8192"),
    (ADAMW, "exp_avg", zeros(2000)[::2], "got stride 2, expected a contiguous buffer"),
    (ADAMW, "compute", zeros(1000), "got torch.float32, expected torch.bfloat16 or torch.float16"),
    (ADAMW, "step", zeros((), dtype=torch.int32), "got torch.int32, expected torch.float32 or torch.int64"),
    (ADAMW, "n_decay", 1001, "got 1001, expected 0 to 1000"),
    (ADAMW, "betas", [0.9, 1.0], "got [0.9, 1.0], expected two numbers of 0 or more and less than 1"),
    (ADAMW, "eps", -1e-8, "got -1e-08, expected 0 or more"),
    (ADAMW, "weight_decay", math.nan, "got nan, expected 0 or more"),
    (ADAMW, "max_norm", -1.0, "got -1.0, expected 0 or more"),
]


@pytest.mark.parametrize(("case", "name", "value", "message"), BAD)
def test_refused_with_what_came_and_what_was_expected(case: str, name: str, value: Any, message: str, device) -> None:
    shape = (1000, 601) if case == ADAMW else NAMED[case].shapes[0]
    arguments = NAMED[case].make_inputs(shape, torch.float32, device)
    arguments[name] = value.to(device) if isinstance(value, Tensor) and not value.is_meta else value
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        NAMED[case].fused(**arguments)
