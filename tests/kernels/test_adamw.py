"""adamw: skipped steps, and what the registry's cases leave open. Beside torch.optim: tests/train/test_step.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.check import disagreement, in_float64
from kernels.fused.adamw import adamw
from kernels.launch import INTERPRETED

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE = ("param", "exp_avg", "exp_avg_sq", "step", "compute")
implementations = pytest.mark.parametrize("function", [adamw, reference.adamw], ids=["fused", "reference"])


def scalar(value: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, device=device, dtype=dtype)


def made(n: int, device: torch.device, *, grad: torch.dtype = torch.float32, **changes) -> dict:
    """Arguments of adamw in the middle of a run."""
    generator = torch.Generator(device).manual_seed(n)

    def randn(scale: float) -> Tensor:
        return torch.randn(n, generator=generator, device=device) * scale

    return {
        "param": randn(0.02),
        "grad": randn(0.5).to(grad),
        "exp_avg": randn(0.01),
        "exp_avg_sq": randn(0.01).square(),
        "lr": scalar(1e-2, device),
        "step": scalar(3.0, device),
        "n_decay": n // 3,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "compute": None,
        **changes,
    }


def after(function, arguments: dict) -> dict[str, Tensor]:
    """What function makes of copies of the state, and what it returns."""
    state = {name: arguments[name].clone() for name in STATE if arguments[name] is not None}
    norm, found_inf = function(**arguments | state)
    return {**state, "norm": norm, "found_inf": found_inf}


def check(arguments: dict) -> None:
    runs = after(adamw, arguments), after(reference.adamw, arguments), after(reference.adamw, in_float64(arguments))
    assert len({run.pop("step").item() for run in runs}) == 1
    assert not disagreement(*runs)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.view(integers), b.view(integers))


# Bias corrections


@implementations
@pytest.mark.usefixtures("nan_filled")
@settings(deadline=None, max_examples=20)
@given(
    updates=st.one_of(st.integers(0, 20), st.integers(0, 10**6)),
    betas=st.tuples(*[st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.999999])] * 2),
    step_dtype=st.sampled_from([torch.float32, torch.int64]),
)
def test_bias_corrections_to_a_million_steps(function, updates: int, betas, step_dtype: torch.dtype) -> None:
    """From nothing, with a gradient of 1, the update is made of the two corrections alone."""
    device = torch.device("cpu" if INTERPRETED else "cuda")
    state = {name: torch.zeros(1, device=device) for name in ("param", "exp_avg", "exp_avg_sq")}
    step, one = scalar(updates, device, step_dtype), torch.ones(1, device=device)
    options = dict(n_decay=1, betas=betas, eps=0.0, weight_decay=0.0)
    function(**state, grad=one, lr=scalar(1.0, device), step=step, **options)
    m, v = ((1 - beta) / -math.expm1((updates + 1) * math.log(beta)) if beta else 1.0 for beta in betas)
    assert state["param"].item() == pytest.approx(-m / math.sqrt(v), rel=4 * EPS)
    assert step.item() == updates + 1


def test_int64_steps_past_what_float32_counts(device: torch.device) -> None:
    step = scalar(2**24 + 1, device, torch.int64)
    adamw(**made(4, device, step=step))
    assert step.item() == 2**24 + 2


def test_a_constant_gradient_keeps_its_moments(device: torch.device) -> None:
    """A float32 beta2 of 0.999 would lead them to 1.000013 times their value."""
    grad = torch.tensor([3.0, -0.3, 1e-4], device=device)
    arguments = made(3, device, grad=torch.float32) | {"grad": grad, "exp_avg": grad, "exp_avg_sq": grad * grad}
    got = after(adamw, arguments | {"betas": (0.9, 0.999)})
    assert torch.equal(got["exp_avg"], grad)
    assert torch.equal(got["exp_avg_sq"], grad * grad)


# Any length, boundary, alignment


@pytest.mark.usefixtures("nan_filled")
@settings(deadline=None, max_examples=20)
@given(
    n=st.one_of(st.integers(0, 40), st.integers(0, 2000)),
    decay=st.floats(0, 1),
    grad=st.sampled_from(DTYPES),
    compute=st.sampled_from([None, *DTYPES[1:]]),
    step=st.sampled_from([torch.float32, torch.int64]),
    inv_scale=st.sampled_from([None, 2.0**-10, 0.3, 1.7]),
    max_norm=st.sampled_from([0.0, 0.01, 1e6]),
    offset=st.integers(0, 5),
    stride=st.sampled_from([0, 1, 2]),
)
def test_any_length_boundary_and_alignment(n, decay, grad, compute, step, inv_scale, max_norm, offset, stride) -> None:
    device = torch.device("cpu" if INTERPRETED else "cuda")
    arguments = made(n + offset, device, grad=grad, step=scalar(3, device, step))
    for name in ("param", "exp_avg", "exp_avg_sq", "grad"):
        arguments[name] = arguments[name][offset:]
    arguments["grad"] = arguments["grad"][:1].expand(n) if stride == 0 and n else arguments["grad"][:: stride or 1]
    n = arguments["grad"].numel()
    for name in ("param", "exp_avg", "exp_avg_sq"):
        arguments[name] = arguments[name][:n]
    arguments |= {"n_decay": round(decay * n), "max_norm": max_norm}
    arguments["compute"] = None if compute is None else torch.full((n,), torch.nan, device=device, dtype=compute)
    arguments["inv_scale"] = None if inv_scale is None else scalar(inv_scale, device)
    check(arguments)


def test_views_are_updated_in_place_and_their_neighbours_left_alone(device: torch.device) -> None:
    n, arguments = 700, made(700, device)
    around = {name: torch.full((n + 9,), 5.0, device=device) for name in ("param", "exp_avg", "exp_avg_sq")}
    around["compute"] = torch.full((n + 9,), 5.0, device=device, dtype=torch.bfloat16)
    views = {name: x[3:-6] for name, x in around.items()}
    for name in ("param", "exp_avg", "exp_avg_sq"):
        views[name].copy_(arguments[name])
    want = after(adamw, arguments | {"compute": torch.zeros(n, device=device, dtype=torch.bfloat16)})
    adamw(**arguments | views)
    for name, x in around.items():
        assert torch.equal(views[name], want[name])
        assert x[:3].eq(5).all()
        assert x[-6:].eq(5).all()


# Steps that are skipped


@implementations
@pytest.mark.parametrize(
    ("value", "inv_scale", "max_norm"),
    [
        (-torch.inf, 1.0, 0.0),
        (torch.nan, 1.0, 1.0),
        (1e30, 1.0, 1.0),  # its square is infinite
        (1.0, torch.inf, 0.0),
        (1.0, torch.nan, 1.0),
    ],
)
def test_nothing_changes_where_the_norm_is_no_number(function, value, inv_scale, max_norm, device) -> None:
    arguments = made(1030, device, max_norm=max_norm, step=scalar(7, device, torch.int64))
    copy = arguments["param"].to(torch.float16)  # the reference writes it once more, the kernel writes nothing
    arguments["compute"] = torch.full_like(copy, 3.0) if function is adamw else copy
    arguments["grad"][1029] = value
    got = after(function, arguments | {"inv_scale": scalar(inv_scale, device)})
    assert all(same_bits(got[name], arguments[name]) for name in STATE)
    assert got["found_inf"] == 1
    assert not got["norm"].isfinite()


@implementations
def test_no_gradient_at_all_is_no_overflow(function, device: torch.device) -> None:
    arguments = made(30, device, max_norm=1.0) | {name: torch.zeros(30, device=device) for name in STATE[1:3]}
    got = after(function, arguments | {"grad": torch.zeros(30, device=device)})
    assert (got["norm"], got["found_inf"]) == (0, 0)
    decayed = arguments["param"][:10] * (1 - 1e-2 * 0.1)
    torch.testing.assert_close(got["param"][:10], decayed, rtol=2 * EPS, atol=0)
    assert torch.equal(got["param"][10:], arguments["param"][10:])


# As an op


def test_opcheck(device: torch.device) -> None:
    arguments, compute = made(40, device), torch.zeros(40, device=device, dtype=torch.bfloat16)
    tensors = [arguments[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq", "lr", "step")]
    numbers = (13, 0.9, 0.95, 1e-8, 0.1, 1.0)
    torch.library.opcheck(torch.ops.nanofuse.adamw.default, (*tensors, scalar(0.5, device), compute, *numbers))
