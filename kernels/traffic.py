"""The bytes that an operation cannot do without: each input read once, each output written once, at their own widths.

M rows of C channels (B sequences of T tokens), N columns, V vocabulary entries, n parameters. b, s, g: bytes of one
element of the activations, of the residual stream, of a gradient. Statistics and other vectors are float32. Arithmetic
only: a case (`cases.py`) says how much more our kernel may move, and tests count that.
"""


def layer_norm_forward(M: int, C: int, b: int, s: int, *, bias: bool, add: bool) -> int:
    """x or, to be added, branch and stream -> y and, added, the new stream; mean and rstd of each row."""
    return M * C * (b + s) * (1 + add) + 8 * M + 4 * C * (1 + bias)


def layer_norm_backward(M: int, C: int, b: int, s: int, *, bias: bool, add: bool) -> int:
    """dy, the stream and, added, its gradient -> dstream and, where it has a dtype of its own, dbranch; the parameters'
    gradients."""
    elements = b + 2 * s + add * (s + (b if s != b else 0))
    return M * C * elements + 8 * M + 4 * C * (2 + bias)


def gelu_forward(M: int, N: int, b: int) -> int:
    """pre -> act."""
    return 2 * M * N * b


def gelu_backward(M: int, N: int, b: int) -> int:
    """dact, pre -> dpre."""
    return 3 * M * N * b


def cross_entropy_forward(M: int, V: int, b: int, *, counted: int, gradient: bool) -> int:
    """Logits of the `counted` rows that are not ignored, targets -> row losses; the gradient, or statistics for it."""
    return counted * V * b + (8 + 4) * M + (M * V * b if gradient else 8 * M)


def embedding_forward(M: int, T: int, C: int, b: int, s: int, *, distinct: int) -> int:
    """Tokens, the rows of `distinct` ones, the positions -> the stream."""
    return 8 * M + (distinct + T) * C * b + M * C * s


def embedding_backward(M: int, T: int, C: int, V: int, b: int, s: int) -> int:
    """dstream -> the gradients of both tables. V: 0 for rows that are added to what another operation wrote."""
    return M * C * s + (V + T) * C * b


def adamw(n: int, g: int, *, copy: int) -> int:
    """The gradient; parameters and two moments, read and written in float32; a copy of `copy` bytes an element.

    And a few scalars: lr; the step count, read and written; the norm and found_inf.
    """
    return n * (g + 12 + 12 + copy) + 4 + 8 + 4 + 4
