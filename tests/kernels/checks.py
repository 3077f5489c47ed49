"""The criterion of `kernels/check.py` as an assertion."""

from torch import Tensor

from kernels.check import disagreement


def assert_as_good_as_torch(
    fused: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], summands: float = 0.0
) -> None:
    reason = disagreement(fused, plain, exact, summands=summands)
    assert not reason, reason
