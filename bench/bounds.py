"""What bounds a kernel: the ceiling of its device, matmul or copy, that its FLOPs or its bytes meet first."""

from dataclasses import dataclass

from bench.schema import Kernel, median


@dataclass(frozen=True)
class Bound:
    what: str  # "matmul" or "copy"
    rate: float  # FLOP/s or bytes/s, of the median
    share: float | None  # of the ceiling, 0 to 1; None where no ceiling is known


def bound(row: Kernel, matmul: float | None, copy: float | None) -> Bound | None:
    """Of a row with samples; `matmul` in FLOP/s, of its dtype, `copy` in bytes/s. None where it counts neither work.

    Without ceilings a row that counts FLOPs is taken for a matmul.
    """
    seconds = median(row.seconds)
    work = [("matmul", row.flops, matmul), ("copy", row.bytes, copy)]
    known = [(amount / ceiling, what, amount) for what, amount, ceiling in work if amount and ceiling]
    if known:
        least, what, amount = max(known)
        return Bound(what, amount / seconds, least / seconds)
    return next((Bound(what, amount / seconds, None) for what, amount, _ in work if amount), None)
