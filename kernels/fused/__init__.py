"""The Triton kernels, a file each, read as a lecture: formula, kernels, launches, autograd rule, public function.

What each means is said by the function of the same name in `kernels/reference.py`. Importing these files needs Triton.
"""

from importlib import import_module

from kernels.fused.dropout import seeds
from kernels.fused.layer_norm import partial_rows, sum_partials
from kernels.ops import FILES, Ops

FUSED = Ops(
    "fused",
    **{op: getattr(import_module(f"kernels.fused.{file}"), op) for op, file in FILES.items()},
    seeds=seeds,
    partial_rows=partial_rows,
    sum_partials=sum_partials,
)
