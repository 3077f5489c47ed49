"""A linear layer whose backward pass writes the weight's gradient where the optimizer reads it. By cuBLAS.

    y = x @ weight.T + bias,   dx = dy @ weight,   dweight = dy.T @ x,   dbias = sum of dy's rows

By itself autograd would keep dweight in memory of its own and then add it to the parameter's gradient: one launch more
for each weight, which reads two such tensors and writes one. Here the matmul has the gradient's place as its result,
or adds to it in its epilogue. In float32, which sums of several micro-steps have, its accumulators are not even
rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import custom_op, rows
from kernels.reference import Grads


@custom_op("nanofuse::put_product", mutates_args=("out",))
def put_product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a.T @ b, or out += a.T @ b: a (M, N) and b (M, K) of one dtype, out (N, K) of theirs, or float32
    to accumulate in."""
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a.t(), b)
        else:
            torch.mm(a.t(), b, out=out)
        return
    assert accumulate, "only sums have a dtype of their own"
    if a.device.type == "cpu":  # which has no product with another dtype
        out.addmm_(a.t().to(out.dtype), b.to(out.dtype))
    else:
        torch.addmm(out, a.t(), b, out_dtype=out.dtype, out=out)


@put_product.register_fake  # torch 2.11 does not have products with another dtype on shapes
def _(out, a, b, accumulate):
    return None


@custom_op("nanofuse::put_row_sum", mutates_args=("out",))
def put_row_sum(out: Tensor, x: Tensor, accumulate: bool) -> None:
    """out = sum of x's rows, or out += it: x (M, N), out (N,). Summed in float32, rounded once."""
    store(out, x.sum(0, dtype=torch.float32), accumulate)


def store(out: Tensor, x: Tensor, accumulate: bool) -> None:
    """out = x, or out += x."""
    if accumulate:
        out.add_(x)
    else:
        out.copy_(x)


@custom_op("nanofuse::linear")
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dweight: Tensor, dbias: Tensor | None, accumulate: bool
) -> Tensor:
    """y (M, N) of x (M, K). dweight, dbias: only for the backward pass."""
    return F.linear(x, weight, bias)


def _save_linear(ctx, inputs, output):
    x, weight, _, dweight, dbias, ctx.accumulate = inputs
    ctx.save_for_backward(x, weight, dweight, dbias)


def _differentiate_linear(ctx, dy):
    x, weight, dweight, dbias = ctx.saved_tensors
    put_product(dweight, dy, x, ctx.accumulate)
    if dbias is not None:
        put_row_sum(dbias, dy, ctx.accumulate)
    return dy @ weight if ctx.needs_input_grad[0] else None, *(None,) * 5


_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, grads: Grads | None = None) -> Tensor:
    """x @ weight.T + bias; the meaning of `reference.linear`.

    x (..., K), weight (N, K), bias (N,) or None, of one dtype. Returns (..., N). grads: where the gradients of weight
    and bias are put, (N, K) and (N,), in that dtype or float32; None: they are autograd's.
    """
    if grads is None or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _linear(rows(x), weight, bias, *grads).view(*x.shape[:-1], weight.shape[0])
