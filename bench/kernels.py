"""Kernels, timed by turns: every case at GPT's shapes, each direction, ours beside plain torch and other people's.

A case is checked before it is timed, by the tests' own criterion (`kernels/check.py`). The check uses the timed shape,
or fewer rows where float64 would be too large or too slow. If ours fails, nothing of the case is timed. torch.compile
and other people's kernels are allowed more error. Those with still more error are left out.

For `backward`, each sample has its own graph, made before the clock starts. `both` is a forward pass and its backward
pass. Cotangents are random, or 1 for a scalar, as in training.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.results import WRONG, Kernel
from bench.rules import NO_TIME, RECOMPILED, TimeBudget, compilations, compiling, only_compiled
from kernels import reference, select
from kernels.cases import CASES, Case, Shape, draw
from kernels.check import disagreement, in_float64, outputs_and_gradients
from kernels.launch import INTERPRETED
from kernels.timing import Staged, Timeable, by_turns
from model.attention import BACKENDS, causal_attention
from train.errors import first_line
from train.hardware import resolve_dtype

Function = Callable[..., Any]
Inputs = dict[str, Any]
Graph = tuple[list[Tensor], list[Tensor]]  # outputs, and the inputs that get gradients

OTHERS_TIMES = 16.0  # others' largest error, as a multiple of plain torch's
CHECKED_BYTES = 1e9  # of a forward pass; with more, fewer rows are checked
LEAST_SECONDS = 0.02  # of timing, even if less time is left
CASE = "case"  # the budget's task of compiling and checking a case's variants
OURS, PLAIN, COMPILED = "fused", "reference", "compiled"  # variants; the last is the second one under torch.compile


def variants(case: Case, device: torch.device) -> dict[str, Callable[[], Function]]:
    """The variants of a case, also those that cannot run here. Each gives a function of the case's inputs, or raises
    ImportError or ValueError."""
    fused, plain = case.fused, case.reference
    found = {PLAIN: lambda: plain, COMPILED: lambda: only_compiled(plain)}
    if case.name == ATTENTION.name:
        return found | {name: partial(partial, plain, backend=name) for name in BACKENDS if name != "auto"}

    def ours() -> Function:
        require_gpu(device)
        return fused

    def ligers() -> Function:
        return partial(LIGER[case.name], importlib.import_module("liger_kernel.transformers.functional"))

    return {OURS: ours} | found | ({"liger": ligers} if case.name in LIGER else {})


def require_gpu(device: torch.device) -> None:
    """ValueError if our kernels are not timed on this device."""
    if INTERPRETED or device.type != "cuda":
        raise ValueError("Triton's kernels need a CUDA device; its interpreter is no benchmark")
    select("fused", device)


# Liger-Kernel (https://github.com/linkedin/Liger-Kernel): how its module is called for each case that it has too.
LIGER: dict[str, Function] = {
    "layer_norm": lambda liger, x, weight, bias, dtype: liger.liger_layer_norm(
        x, weight, bias, reference.LAYER_NORM_EPS
    ).to(dtype),
    "cross_entropy": lambda liger, logits, targets: liger.liger_cross_entropy(logits, targets, ignore_index=-1).float(),
    "linear_cross_entropy": lambda liger, x, weight, targets, chunk_rows: liger.liger_fused_linear_cross_entropy(
        x, weight, targets, ignore_index=-1
    ).float(),
}
LIGER["linear_cross_entropy in chunks"] = LIGER["linear_cross_entropy"]  # it chooses its own chunks


def _qkv(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    B, T, H, Q = shape
    return {"qkv": draw(device)(B, T, 3 * H * Q, dtype=dtype), "n_head": H}


def _attention_bytes(B: int, T: int, H: int, Q: int, b: int) -> int:
    """Bytes of qkv and y, or of their gradients."""
    return 4 * B * T * H * Q * b


ATTENTION = Case(  # no kernel of ours: its entrants are the backends of model/attention.py
    name="attention",
    fused=causal_attention,
    reference=causal_attention,
    make_inputs=_qkv,
    shapes=((2, 64, 2, 32),),
    gpt_shapes=((32, 1024, 12, 64), (64, 256, 6, 64), (8, 1024, 25, 64)),
    cpu_shapes=((4, 256, 6, 64),),
    forward_bytes=_attention_bytes,
    backward_bytes=_attention_bytes,
    flops=lambda B, T, H, Q: 2 * B * T**2 * H * Q,  # two matmuls, half of each masked
)

TIMED: tuple[Case, ...] = (*CASES, ATTENTION)


# What is measured of a case


def directions(case: Case) -> tuple[str, ...]:
    return ("forward",) if case.backward_bytes is None else ("forward", "backward", "both")


def shapes(case: Case, device: torch.device) -> tuple[Shape, ...]:
    """The shapes at which a case is timed: GPT's, or smaller ones on a CPU."""
    return case.cpu_shapes if device.type == "cpu" else case.gpt_shapes


def work_of(case: Case, shape: Shape, dtype: torch.dtype, direction: str) -> tuple[int | None, int | None]:
    """(bytes, FLOPs) that a direction needs at least.

    A case with FLOPs gives no bytes, because it knows only those of its own kernels, not cuBLAS's. The backward pass
    has two matmuls for each one of the forward pass. Attention's has one more for the scores, which it computes again.
    linear_cross_entropy has FLOPs only for `both`: ours computes gradients in the forward pass, torch in the backward
    pass.
    """
    if case.flops and case.name.startswith("linear_cross_entropy") and direction != "both":
        return None, None
    if case.flops:
        forward = case.flops(*shape)
        backward = forward * 5 // 2 if case.name == ATTENTION.name else 2 * forward
    else:
        forward = case.forward_bytes(*shape, dtype.itemsize)
        backward = case.backward_bytes(*shape, dtype.itemsize) if case.backward_bytes else 0
    least = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return (None, least) if case.flops else (least, None)


class Contest:
    """One case at one shape: the variants that can run here and are right, ready to be timed.

    skipped: for each other variant, why it is not timed.
    """

    @compiling()
    def __init__(self, case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.case, self.shape, self.dtype, self.device = case, shape, dtype, device
        self.skipped: dict[str, str] = {}
        self._functions: dict[str, Function] = {}
        self._cotangents: list[Tensor] = []
        for name, make in variants(case, device).items():
            try:
                self._functions[name] = make()
            except (ImportError, ValueError) as error:
                self.skipped[name] = first_line(error)
        try:
            self._check()
            self._inputs = case.make_inputs(shape, dtype, device)
        except torch.OutOfMemoryError as error:
            self._skip(list(self._functions), first_line(error))

    @compiling()
    def measure(self, direction: str, seconds: float, least: int = 5) -> list[Kernel]:
        """A row of every variant, in order; about `seconds` of samples, at least `least` of each variant."""
        works = {name: self._work(name, direction) for name in self._functions}
        skipped = {name: reason for name, work in works.items() if (reason := _fault(name, work))}
        works = {name: work for name, work in works.items() if name not in skipped}
        samples: dict[str, list[float]] = {}
        before = compilations()
        try:
            samples = by_turns(works, self.device, seconds=seconds, least=least) if works else {}
        except torch.OutOfMemoryError as error:  # each fits alone, but all together do not
            skipped |= dict.fromkeys(works, first_line(error))
        if compilations() > before:
            samples.pop(COMPILED, None)
            skipped[COMPILED] = WRONG + RECOMPILED
        skipped |= self.skipped
        names = variants(self.case, self.device)
        given = self.case, self.shape, self.dtype, direction
        return [row(*given, name, samples.get(name, []), skipped.get(name, "")) for name in names]

    def _skip(self, names: list[str], reason: str) -> None:
        for name in names:
            del self._functions[name]
            self.skipped[name] = reason

    def _check(self) -> None:
        """Skip variants that disagree with the reference. If ours does, skip all."""
        inputs = self.case.make_inputs(checked(self.case, self.shape, self.dtype), self.dtype, self.device)
        plain, exact = (outputs_and_gradients(self._functions[PLAIN], given) for given in (inputs, in_float64(inputs)))

        def compare(name: str) -> str:
            got, allowed = outputs_and_gradients(self._functions[name], inputs), {"times": OTHERS_TIMES}
            return disagreement(got, plain, exact, **({} if name == OURS else allowed))

        for name in [name for name in self._functions if name != PLAIN]:
            if reason := _fault(name, partial(compare, name)):
                self._skip([name], reason)
                if name == OURS:
                    return self._skip(list(self._functions), f"not timed, since {OURS} is wrong")

    def _work(self, name: str, direction: str) -> Timeable:
        function = self._functions[name]

        def forward(given: Inputs) -> Graph:
            returned = function(**given)
            outputs = [o for o in (returned if isinstance(returned, tuple) else (returned,)) if _differentiable(o)]
            return outputs, [x for x in given.values() if _differentiable(x)]

        def backward(graph: Graph) -> object:
            outputs, leaves = graph
            if not self._cotangents:
                self._cotangents = [torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in outputs]
            return torch.autograd.grad(outputs, leaves, self._cotangents)

        given = partial(copied, self._inputs)
        if direction == "forward":
            return Staged(given, forward)
        if direction == "backward":
            return Staged(lambda: forward(given()), backward)
        return Staged(given, lambda given: backward(forward(given)))


def _fault(name: str, attempt: Callable[[], str | None]) -> str:
    """Why a variant is not timed: the attempt's error or returned text; empty if all is well."""
    wrong = WRONG if name == OURS else ""
    try:
        said = attempt()
    except torch.OutOfMemoryError as error:
        return first_line(error)
    except Exception as error:  # any kind: a compiler may be missing, a package may be of another version
        return wrong + first_line(error)
    return f"{wrong or 'disagrees with the reference: '}{said}" if said else ""


def checked(case: Case, shape: Shape, dtype: torch.dtype) -> Shape:
    """The shape at which a case is checked: that at which it is timed, or fewer rows. AdamW's shape has no rows."""
    while shape[0] > 1 and case.forward_bytes(*shape, dtype.itemsize) > CHECKED_BYTES and case.backward_bytes:
        shape = (max(1, shape[0] // 4), *shape[1:])
    return shape


def copied(inputs: Inputs) -> Inputs:
    """Some functions write over their inputs."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    return inputs | {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in tensors.items()}


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def rows(device: torch.device, seconds: float, cases: tuple[Case, ...] = TIMED) -> Iterator[Kernel]:
    """The rows of every case, as they are measured, in about `seconds`; the first shape of every case comes first.

    Rows without time left come as skipped. If our kernel is wrong, its row's `skipped` begins with WRONG, and the
    caller must end with a failure.
    """
    dtype = resolve_dtype("auto", device)
    turns = [(i, case, shape) for case in cases for i, shape in enumerate(shapes(case, device))]
    turns.sort(key=lambda turn: turn[0])  # stable
    budget = TimeBudget(seconds)
    for done, (_, case, shape) in enumerate(turns):
        contest, of_case = None, budget.part(budget.left / (len(turns) - done))
        if budget.fits(CASE):
            with budget.task(CASE):
                contest = Contest(case, shape, dtype, device)
        for nth, direction in enumerate(directions(case)):
            if contest is None or not budget.left:
                given = case, shape, dtype, direction
                yield from (row(*given, name, skipped=NO_TIME) for name in variants(case, device))
            else:
                share = of_case.left / (len(directions(case)) - nth)
                yield from contest.measure(direction, max(share, LEAST_SECONDS))


def row(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    direction: str,
    variant: str,
    seconds: Sequence[float] = (),
    skipped: str = "",
) -> Kernel:
    what = case.name, list(shape), str(dtype).removeprefix("torch."), direction, variant
    return Kernel(*what, list(seconds), *work_of(case, shape, dtype, direction), skipped)
