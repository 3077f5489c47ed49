"""A linear layer with a GELU, in one matmul kernel; and a transformer block's MLP, whose backward is fused likewise.

    pre = x @ weight.T + bias,   act = gelu(pre),   y = act @ proj_weight.T + proj_bias                     (mlp: all)
    dpre = (dy @ proj_weight) * gelu'(pre),   dx = dpre @ weight,   dweight = dpre.T @ x,   dbias = sum of dpre's rows
    dproj_weight = dy.T @ act,   dproj_bias = sum of dy's rows

Forward, the epilogue of the first product adds the bias, stores pre and stores its GELU. Backward, the epilogue of
dy @ proj_weight multiplies by gelu'(pre): the gradient of act is never stored. That product belongs to the second
layer, so only the two layers together, as `mlp`, can be fused there; `linear_gelu` alone takes an elementwise kernel.
The other products have nothing to fuse and are cuBLAS's.

Bytes, with M of 32 x 1024 rows, K of 768, N of 3072, in bfloat16: x and y are 50 MB, pre and act 201 MB. Next to cuBLAS
with elementwise kernels, forward saves reading pre (201 MB), backward writing and reading the gradient of act (403 MB):
together 0.2 ms a layer at 3 TB/s. All of it is lost where the kernel multiplies more slowly than cuBLAS, so a table of
measurements chooses (`kernels/tuned.py`). float32 has no such table: it is cuBLAS's unless forced.

Saved for backward: x, pre and act. act is dproj_weight's operand. It could be made again from pre, which would free its
201 MB a layer; but then the backward kernel, which has pre at hand, had to write it: 0.07 ms a layer at 3 TB/s. Time
was preferred. Where nothing needs a gradient neither is kept, and pre is not written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import gelu, matmul
from kernels.gelu import check_form
from kernels.launch import check, custom_op, device_of, packed, rows, run
from kernels.matmul import BACKWARD_TILES, FORWARD_TILES, Tiles, servable, tiles_for
from kernels.tuned import PATHS, Problem, choose


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_pre: bool, tiles: Tiles | None
) -> tuple[Tensor, Tensor | None]:
    """(act, pre) of x (M, K), weight (N, K); pre is None unless kept. tiles: None for cuBLAS."""
    device = device_of(x)
    if tiles is None:
        pre = F.linear(x, weight, bias)
        act = torch.empty_like(pre) if keep_pre else pre
        run(x, *gelu.plan_forward(device, pre, None, approximate, act))
        return act, pre if keep_pre else None
    act = x.new_empty(x.shape[0], weight.shape[0])
    pre = torch.empty_like(act) if keep_pre else None
    run(x, *matmul.plan_forward(device, rows(x), rows(weight), packed(bias), approximate, pre, act, tiles))
    return act, pre


def backward(
    dy: Tensor, weight: Tensor, pre: Tensor, approximate: str, wants_dbias: bool, tiles: Tiles | None
) -> tuple[Tensor, Tensor | None]:
    """(dpre, dbias) of dy (M, K), weight (K, N), pre (M, N); dbias is None unless wanted. tiles: None for cuBLAS."""
    (M, N), device = pre.shape, device_of(dy)
    if tiles is None:
        dpre = dy @ weight  # the gradient of act, until the kernel overwrites it
        partial = _partial(pre, gelu.partial_rows(device, M, N), wants_dbias)
        run(dy, *gelu.plan_backward(device, dpre, pre, None, approximate, dpre, partial))
    else:
        dpre, partial = torch.empty_like(pre), _partial(pre, matmul.partial_rows(M, tiles), wants_dbias)
        run(dy, *matmul.plan_backward(device, rows(dy), rows(weight), pre, approximate, dpre, partial, tiles))
    return dpre, None if partial is None else partial.sum(0).to(pre.dtype)


def _partial(pre: Tensor, count: int, wanted: bool) -> Tensor | None:
    return pre.new_empty(count, pre.shape[1], dtype=torch.float32) if wanted else None


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """What an op, which cannot return None, returns for it."""
    return like.new_empty(0) if x is None else x


def _forward_tiles(x: Tensor, weight: Tensor, path: str) -> Tiles | None:
    problem = Problem("linear_gelu", x.dtype, x.shape[0], *weight.shape)
    return choose(path, problem, x, _candidates(FORWARD_TILES, weight.shape[0], rows(x), rows(weight)))


def _backward_tiles(dy: Tensor, weight: Tensor, path: str) -> Tiles | None:
    K, N = weight.shape
    problem = Problem("mlp_dpre", dy.dtype, dy.shape[0], N, K)
    return choose(path, problem, dy, _candidates(BACKWARD_TILES, N, rows(dy), rows(weight)))


def _candidates(table: dict[int, tuple[Tiles, ...]], N: int, *operands: Tensor) -> tuple[Tiles, ...]:
    """How the fused kernel may be cut up for these operands; none where it would spill."""
    device = device_of(operands[0])
    return tiles_for(table, device, operands[0].dtype) if servable(device, N, *operands) else ()


@custom_op("nanofuse::linear_gelu")
def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep: bool, path: str
) -> tuple[Tensor, Tensor]:
    """(act, pre); pre is empty unless it is kept for backward."""
    act, pre = forward(x, weight, bias, approximate, keep, _forward_tiles(x, weight, path))
    return act, _or_empty(pre, act)


@_linear_gelu.register_fake
def _(x, weight, bias, approximate, keep, path):
    act = x.new_empty(x.shape[0], weight.shape[0])
    return act, torch.empty_like(act) if keep else x.new_empty(0)


def _save_linear_gelu(ctx, inputs, output):
    x, weight, _, ctx.approximate, _, _ = inputs
    ctx.set_materialize_grads(False)  # pre has no gradient of its own
    ctx.save_for_backward(x, weight, output[1])


def _differentiate_linear_gelu(ctx, dact, _):
    x, weight, pre = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dpre, dbias = gelu.gelu_backward(dact, pre, None, ctx.approximate, need_bias)
    dx, dweight = dpre @ weight if need_x else None, dpre.t() @ x if need_weight else None
    return dx, dweight, dbias if need_bias else None, None, None, None


_linear_gelu.register_autograd(_differentiate_linear_gelu, setup_context=_save_linear_gelu)


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
    act, pre = forward(x, fc_weight, fc_bias, approximate, keep, _forward_tiles(x, fc_weight, path))
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
    tiles = _backward_tiles(dy, proj_weight, path)
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


def _check_linear(name: str, weight: Tensor, bias: Tensor | None, x: Tensor, width: int) -> None:
    """ValueError unless x, whose last dimension is `width` wide, can go through the layer."""
    check(f"{name}weight", weight, shape=(None, width), dtypes=(x.dtype,), device=x.device)
    if not weight.shape[0]:
        raise ValueError(f"{name}weight: got shape {tuple(weight.shape)}, expected at least one row")
    if bias is not None:
        check(f"{name}bias", bias, shape=weight.shape[:1], dtypes=(x.dtype,), device=x.device)


def _check(x: Tensor, approximate: str, path: str) -> None:
    check_form(approximate)
    check("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., K) with K of 1 or more")
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}, expected {', '.join(PATHS[:-1])} or {PATHS[-1]}")


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, path: str = "auto") -> Tensor:
    """GELU(x @ weight.T + bias); the meaning of `reference.linear_gelu`.

    x (..., K), weight (N, K), bias (N,) or None: float32, bfloat16 or float16, of one dtype; approximate: "erf" or
    "tanh". path: "auto" takes what was measured to be faster, "triton" the fused kernel, "cublas" two steps. Returns
    (..., N). ValueError for what cannot be served.
    """
    _check(x, approximate, path)
    _check_linear("", weight, bias, x, x.shape[-1])
    keep = _differentiable(x, weight, bias)
    act, _ = _linear_gelu(x.reshape(-1, x.shape[-1]), weight, bias, approximate, keep, path)
    return act.view(*x.shape[:-1], weight.shape[0])


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
    float16, of one dtype; approximate and path as for `linear_gelu`. Returns (..., C). ValueError for what cannot be
    served.
    """
    _check(x, approximate, path)
    _check_linear("fc_", fc_weight, fc_bias, x, x.shape[-1])
    _check_linear("proj_", proj_weight, proj_bias, x, fc_weight.shape[0])
    keep = _differentiable(x, fc_weight, fc_bias, proj_weight)  # proj_bias's gradient takes neither act nor pre
    y, _, _ = _mlp(
        x.reshape(-1, x.shape[-1]), fc_weight, fc_bias, proj_weight, proj_bias, approximate, keep, path
    )  # fmt: skip
    return y.view(*x.shape[:-1], proj_weight.shape[0])
