"""Philox4x32-10 in numpy (Salmon et al. 2011), apart from Triton's own: predicts dropout masks from their seeds."""

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)


def philox(counter: tuple[np.ndarray, ...], key: int) -> tuple[np.ndarray, ...]:
    """Four words, uint64 below 2^32, for each counter of four words; key: 64 bits."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p0, p1 = (np.uint64(m) * word for m, word in zip(MULTIPLIERS, (c[0], c[2]), strict=True))
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k[0]), p1 & LOW, high0 ^ c[3] ^ np.uint64(k[1]), p0 & LOW]
        k = [(word + weyl) & 0xFFFFFFFF for word, weyl in zip(k, WEYL, strict=True)]
    return tuple(c)


def keep_mask(seed: int, rows: int, cols: int, p: float) -> np.ndarray:
    """(rows, cols) bool: what `kernels/dropout.py` says is kept."""
    row, col = np.indices((rows, cols))
    zero = np.zeros_like(row)
    words = np.stack(philox((col // 4, row, zero, zero), seed))
    word = np.take_along_axis(words, (col % 4)[None], axis=0)[0]
    return (word >> np.uint64(8)) >= np.uint64(round(p * 2**24))
