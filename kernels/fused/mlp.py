"""A transformer block's MLP: a linear layer, GELU, a linear layer. By cuBLAS and `gelu.py`, or by `matmul.py`.

    pre = x @ fc_weight.T + fc_bias,   act = gelu(pre),   y = act @ proj_weight.T + proj_bias
    dpre = (dy @ proj_weight) * gelu'(pre),   dx = dpre @ fc_weight
    dfc_weight = dpre.T @ x,   dfc_bias = sum of dpre's rows
    dproj_weight = dy.T @ act,   dproj_bias = sum of dy's rows

The fused matmul adds the bias, stores pre and stores its GELU. In the backward pass it multiplies dy @ proj_weight by
gelu'(pre), so the gradient of act is never stored. The other products have nothing to fuse and are cuBLAS's.

Bytes in bfloat16, with M of 32 x 1024 rows, K of 768, N of 3072: x and y have 50 MB, pre and act 201 MB. Compared with
cuBLAS and elementwise kernels, forward saves one reading of pre (201 MB), and backward one writing and one reading of
the gradient of act (403 MB): together 0.2 ms a layer at 3 TB/s. All of this is lost if the kernel multiplies more
slowly than cuBLAS. So the caller chooses, for forward and backward apart. A training run measures both when it starts
(`train/choices.py`).

Saved for the backward pass: x, pre and act. dproj_weight needs act. Computing act again from pre would free its 201 MB
a layer, but the backward kernel would have to write it, 0.07 ms a layer at 3 TB/s. Time was preferred. If nothing needs
a gradient, neither is kept, and pre is not written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused.gelu import check_form, gelu_backward, gelu_forward
from kernels.fused.linear import put_product, put_row_sum, store
from kernels.fused.matmul import BACKWARD_TILES, FORWARD_TILES, Tiles, linear_gelu, linear_gelu_backward, tiles_for
from kernels.launch import check, custom_op, device_of, refusal, rows
from kernels.reference import Grads

CUBLAS = 0  # in the place of the number of the fused matmul's tiles


def ways(x: Tensor) -> tuple[list[str], list[str]]:
    """What `mlp` can be computed with on x's device and in its dtype, forward and backward, in the order of the numbers
    that it takes: cuBLAS, then the fused matmul's tiles."""
    both = (tiles_for(table, device_of(x), x.dtype) for table in (FORWARD_TILES, BACKWARD_TILES))
    forward, backward = (["cuBLAS", *(f"fused {tiles}" for tiles in known)] for known in both)
    return forward, backward


def _tiles(name: str, n: int, table: dict[int, tuple[Tiles, ...]], x: Tensor) -> Tiles | None:
    """The fused matmul's n-th tiles on x's device; None for cuBLAS."""
    found = (None, *tiles_for(table, device_of(x), x.dtype))
    if not 0 <= n < len(found):
        raise refusal(name, n, f"0 (cuBLAS) to {len(found) - 1}")
    return found[n]


@custom_op("nanofuse::mlp")
def _mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str,
    keep: bool,
    forward_tiles: int,
    backward_tiles: int,
    dfc_weight: Tensor | None = None,
    dfc_bias: Tensor | None = None,
    dproj_weight: Tensor | None = None,
    dproj_bias: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, act, pre); act and pre are empty unless they are kept for backward. The last five are only for that."""
    if tiles := _tiles("forward_tiles", forward_tiles, FORWARD_TILES, x):
        act, pre = linear_gelu(rows(x), rows(fc_weight), fc_bias, approximate, keep, tiles)
    else:
        pre = F.linear(x, fc_weight, fc_bias)
        act = torch.empty_like(pre) if keep else pre
        gelu_forward(pre, approximate, act)
    y = F.linear(act, proj_weight, proj_bias)
    return (y, act, pre) if keep else (y, y.new_empty(0), y.new_empty(0))


@custom_op("nanofuse::mlp_dpre", mutates_args=("into",))
def _mlp_dpre(
    dy: Tensor,
    proj_weight: Tensor,
    pre: Tensor,
    approximate: str,
    wants_dbias: bool,
    backward_tiles: int,
    into: Tensor,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """(dpre, the gradient of fc_bias, empty if it is not wanted or put into `into`). `into` may be empty: torch 2.11
    takes no None for what is written to.

    The device decides how many partial rows a kernel writes. They are summed here, because torch.compile must know the
    shapes of results without the device.
    """
    if tiles := _tiles("backward_tiles", backward_tiles, BACKWARD_TILES, dy):
        dpre, partials = linear_gelu_backward(rows(dy), rows(proj_weight), pre, approximate, wants_dbias, tiles)
    else:
        dpre = dy @ proj_weight  # the gradient of act, until the kernel overwrites it
        partials = gelu_backward(dpre, pre, approximate, dpre, wants_dbias)
    if partials is None:
        return dpre, dpre.new_empty(0)
    if into.numel() == 0:
        return dpre, partials.sum(0).to(dpre.dtype)
    store(into, partials.sum(0), accumulate)
    return dpre, dpre.new_empty(0)


def _save_mlp(ctx, inputs, output):
    x, fc_weight, _, proj_weight, _, ctx.approximate, _, _, ctx.tiles, *gradients, ctx.accumulate = inputs
    ctx.set_materialize_grads(False)  # act and pre have no gradients of their own
    ctx.save_for_backward(x, fc_weight, proj_weight, *output[1:], *gradients)


def _differentiate_mlp(ctx, dy, _dact, _dpre):
    x, fc_weight, proj_weight, act, pre, dfc_weight, dfc_bias, dproj_weight, dproj_bias = ctx.saved_tensors
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = ctx.needs_input_grad[:5]
    if need_x or need_fc_weight or need_fc_bias:
        into = dy.new_empty(0) if dfc_bias is None else dfc_bias
        dpre, dbias = _mlp_dpre(dy, proj_weight, pre, ctx.approximate, need_fc_bias, ctx.tiles, into, ctx.accumulate)
    if dfc_weight is not None:
        put_product(dfc_weight, dpre, x, ctx.accumulate)
        put_product(dproj_weight, dy, act, ctx.accumulate)
        if dproj_bias is not None:
            put_row_sum(dproj_bias, dy, ctx.accumulate)
        return dpre @ fc_weight if need_x else None, *(None,) * 13
    return (
        dpre @ fc_weight if need_x else None,
        dpre.t() @ x if need_fc_weight else None,
        dbias if need_fc_bias else None,
        dy.t() @ act if need_proj_weight else None,
        dy.sum(0) if need_proj_bias else None,
        *(None,) * 9,
    )


_mlp.register_autograd(_differentiate_mlp, setup_context=_save_mlp)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str,
    fc_grads: Grads | None = None,
    proj_grads: Grads | None = None,
    forward_tiles: int = CUBLAS,
    backward_tiles: int = CUBLAS,
) -> Tensor:
    """GELU(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias; the meaning of `reference.mlp`.

    float32, bfloat16 or float16. fc_grads, proj_grads, both or neither: where the gradients of the layers' weights and
    biases are put, as in `linear`. forward_tiles, backward_tiles: 0 for cuBLAS, n for the fused matmul with the n-th of
    its tiles, as `ways` names them. ValueError for what cannot be served: on a GPU the fused matmul takes 2-byte
    elements only where every row begins at a multiple of 16 elements.
    """
    check_form(approximate)
    check("x", x, (*x.shape[:-1], "K > 0"))
    check("fc_weight", fc_weight, ("N > 0", x.shape[-1]), x.dtype, on=x)
    check("fc_bias", fc_bias, fc_weight.shape[:1], x.dtype, on=x)
    check("proj_weight", proj_weight, ("C > 0", fc_weight.shape[0]), x.dtype, on=x)
    check("proj_bias", proj_bias, proj_weight.shape[:1], x.dtype, on=x)
    kept_for = (x, fc_weight, fc_bias, proj_weight)  # proj_bias's gradient takes neither act nor pre
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in kept_for)
    weights = fc_weight, fc_bias, proj_weight, proj_bias
    gradients, accumulate = (None,) * 4, False
    if fc_grads is not None and proj_grads is not None:
        gradients, accumulate = (*fc_grads[:2], *proj_grads[:2]), fc_grads.accumulate
    rows_of_x = x.reshape(-1, x.shape[-1])
    y, _, _ = _mlp(rows_of_x, *weights, approximate, keep, forward_tiles, backward_tiles, *gradients, accumulate)
    return y.view(*x.shape[:-1], proj_weight.shape[0])
