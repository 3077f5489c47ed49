"""The registry: every kernel in every regime, with its plain-torch meaning. Tests walk it, the benchmark times it."""

from kernels.cases import adamw, cross_entropy, embedding, gelu, layer_norm, linear_gelu
from kernels.cases.case import Case, Traffic

CASES: list[Case] = [
    *layer_norm.CASES,
    *gelu.CASES,
    *linear_gelu.CASES,
    *cross_entropy.CASES,
    *embedding.CASES,
    *adamw.CASES,
]

__all__ = ["CASES", "Case", "Traffic"]
