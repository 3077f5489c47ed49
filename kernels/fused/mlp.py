"""A transformer block's MLP: a linear layer, GELU, a linear layer. By cuBLAS and `gelu.py`, or by `matmul.py`.

    pre = x @ fc_weight.T + fc_bias,   act = gelu(pre),   y = act @ proj_weight.T + proj_bias
    dpre = (dy @ proj_weight) * gelu'(pre),   dx = dpre @ fc_weight
    dfc_weight = dpre.T @ x,   dfc_bias = sum of dpre's rows
    dproj_weight = dy.T @ act,   dproj_bias = sum of dy's rows

The fused matmul's epilogue adds the bias, stores pre and stores its GELU; in the backward pass it multiplies
dy @ proj_weight by gelu'(pre), so that the gradient of act is never stored. The other products have nothing to fuse and
are cuBLAS's.

Bytes, with M of 32 x 1024 rows, K of 768, N of 3072, in bfloat16: x and y are 50 MB, pre and act 201 MB. Next to cuBLAS
with elementwise kernels, forward saves reading pre (201 MB), backward writing and reading the gradient of act (403 MB):
together 0.2 ms a layer at 3 TB/s. All of it is lost where the kernel multiplies more slowly than cuBLAS, so a table of
measurements chooses (`kernels/tuned.py`). float32 has no such table: it is cuBLAS's unless forced.

Saved for backward: x, pre and act. act is dproj_weight's operand. It could be computed again from pre, which would free
its 201 MB a layer; but then the backward kernel, which has pre at hand, would have to write it: 0.07 ms a layer at
3 TB/s. Time was preferred. Where nothing needs a gradient neither is kept, and pre is not written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused.gelu import check_form, gelu_backward, gelu_forward
from kernels.fused.matmul import (
    BACKWARD_TILES,
    FORWARD_TILES,
    Tiles,
    linear_gelu,
    linear_gelu_backward,
    servable,
    tiles_for,
)
from kernels.launch import check, custom_op, device_of, rows
from kernels.tuned import PATHS, Problem, choose


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_pre: bool, tiles: Tiles | None
) -> tuple[Tensor, Tensor | None]:
    """(act, pre) of x (M, K), weight (N, K); pre is None unless kept. tiles: None for cuBLAS."""
    if tiles is None:
        pre = F.linear(x, weight, bias)
        act = torch.empty_like(pre) if keep_pre else pre
        gelu_forward(pre, approximate, act)
        return act, pre if keep_pre else None
    act = x.new_empty(x.shape[0], weight.shape[0])
    pre = torch.empty_like(act) if keep_pre else None
    linear_gelu(rows(x), rows(weight), bias, approximate, pre, act, tiles)
    return act, pre


def backward(
    dy: Tensor, weight: Tensor, pre: Tensor, approximate: str, wants_dbias: bool, tiles: Tiles | None
) -> tuple[Tensor, Tensor | None]:
    """(dpre, dbias) of dy (M, K), weight (K, N), pre (M, N); dbias is None unless wanted. tiles: None for cuBLAS."""
    if tiles is None:
        dpre = dy @ weight  # the gradient of act, until the kernel overwrites it
        return dpre, gelu_backward(dpre, pre, approximate, dpre, wants_dbias)
    dpre = torch.empty_like(pre)
    return dpre, linear_gelu_backward(rows(dy), rows(weight), pre, approximate, dpre, wants_dbias, tiles)


def _tiles(
    op: str, table: dict[int, tuple[Tiles, ...]], x: Tensor, weight: Tensor, N: int, K: int, path: str
) -> Tiles | None:
    """How the fused kernel is cut up for this product, N wide; None for cuBLAS, also where the kernel would spill."""
    problem, device = Problem(op, x.dtype, x.shape[0], N, K), device_of(x)
    fits = servable(device, N, rows(x), rows(weight))
    return choose(path, problem, x, tiles_for(table, device, x.dtype) if fits else ())


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """What an op, which cannot return None, returns for it."""
    return like.new_empty(0) if x is None else x


@custom_op("nanofuse::mlp")
def _mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str,
    keep: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, act, pre); act and pre are empty unless they are kept for backward."""
    tiles = _tiles("linear_gelu", FORWARD_TILES, x, fc_weight, *fc_weight.shape, path)
    act, pre = forward(x, fc_weight, fc_bias, approximate, keep, tiles)
    y = F.linear(act, proj_weight, proj_bias)
    return y, _or_empty(act if keep else None, y), _or_empty(pre, y)


@_mlp.register_fake
def _(x, fc_weight, fc_bias, proj_weight, proj_bias, approximate, keep, path):
    size = (x.shape[0], fc_weight.shape[0]) if keep else (0,)
    return x.new_empty(x.shape[0], proj_weight.shape[0]), x.new_empty(size), x.new_empty(size)


@custom_op("nanofuse::mlp_dpre")
def _mlp_dpre(
    dy: Tensor, proj_weight: Tensor, pre: Tensor, approximate: str, wants_dbias: bool, path: str
) -> tuple[Tensor, Tensor]:
    """(dpre, dfc_bias); dfc_bias is empty unless wanted."""
    K, N = proj_weight.shape
    tiles = _tiles("mlp_dpre", BACKWARD_TILES, dy, proj_weight, N, K, path)
    dpre, dbias = backward(dy, proj_weight, pre, approximate, wants_dbias, tiles)
    return dpre, _or_empty(dbias, dpre)


@_mlp_dpre.register_fake
def _(dy, proj_weight, pre, approximate, wants_dbias, path):
    return torch.empty_like(pre), pre.new_empty(pre.shape[1] if wants_dbias else 0)


def _save_mlp(ctx, inputs, output):
    x, fc_weight, _, proj_weight, _, ctx.approximate, _, ctx.path = inputs
    ctx.set_materialize_grads(False)  # act and pre have no gradients of their own
    ctx.save_for_backward(x, fc_weight, proj_weight, *output[1:])


def _differentiate_mlp(ctx, dy, _dact, _dpre):
    x, fc_weight, proj_weight, act, pre = ctx.saved_tensors
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = ctx.needs_input_grad[:5]
    if need_x or need_fc_weight or need_fc_bias:
        dpre, dfc_bias = _mlp_dpre(dy, proj_weight, pre, ctx.approximate, need_fc_bias, ctx.path)
    return (
        dpre @ fc_weight if need_x else None,
        dpre.t() @ x if need_fc_weight else None,
        dfc_bias if need_fc_bias else None,
        dy.t() @ act if need_proj_weight else None,
        dy.sum(0) if need_proj_bias else None,
        None,
        None,
        None,
    )


_mlp.register_autograd(_differentiate_mlp, setup_context=_save_mlp)


def _check_layer(name: str, weight: Tensor, bias: Tensor | None, x: Tensor, width: int) -> None:
    """ValueError unless rows of x's dtype, `width` wide, can go through the layer."""
    check(f"{name}_weight", weight, shape=(None, width), dtypes=(x.dtype,), device=x.device)
    if not weight.shape[0]:
        raise ValueError(f"{name}_weight: got shape {tuple(weight.shape)}, expected at least one row")
    if bias is not None:
        check(f"{name}_bias", bias, shape=weight.shape[:1], dtypes=(x.dtype,), device=x.device)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str,
    path: str = "auto",
) -> Tensor:
    """GELU(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias; the meaning of `reference.mlp`.

    x (..., K), fc_weight (N, K), fc_bias (N,) or None, proj_weight (C, N), proj_bias (C,) or None: float32, bfloat16 or
    float16, of one dtype; approximate: "erf" or "tanh". path: "auto" takes what was measured to be faster, "triton" the
    fused matmul, "cublas" the other. Returns (..., C). ValueError for what cannot be served.
    """
    check_form(approximate)
    check("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., K) with K of 1 or more")
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}, expected {', '.join(PATHS[:-1])} or {PATHS[-1]}")
    _check_layer("fc", fc_weight, fc_bias, x, x.shape[-1])
    _check_layer("proj", proj_weight, proj_bias, x, fc_weight.shape[0])
    kept_for = (x, fc_weight, fc_bias, proj_weight)  # proj_bias's gradient takes neither act nor pre
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in kept_for)
    y, _, _ = _mlp(
        x.reshape(-1, x.shape[-1]), fc_weight, fc_bias, proj_weight, proj_bias, approximate, keep, path
    )  # fmt: skip
    return y.view(*x.shape[:-1], proj_weight.shape[0])
