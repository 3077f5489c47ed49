"""The registry: every kernel in every regime, with its plain-torch meaning. Tests walk it, the benchmark times it."""

from kernels.cases import layer_norm
from kernels.cases.case import Case, Traffic

CASES: list[Case] = [*layer_norm.CASES]

__all__ = ["CASES", "Case", "Traffic"]
