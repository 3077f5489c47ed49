"""Kernels, timed by turns: every case at GPT's shapes, each direction, ours beside plain torch and other people's.

A case is checked before it is timed, by the tests' own criterion (`kernels/check.py`), at the shape that is timed
or, where float64 is too large or too slow there, with fewer rows. Where ours fails, nothing of the case is timed. What
torch.compile and others make need only be the same function: they are allowed more error; what is not is left out.

`backward` is timed on a graph that was made for that sample, outside the clock; `both` is a forward pass and the
backward pass through it. Cotangents are random, or one for a scalar, as in training.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.entrants import ATTENTION, COMPILED, TIMED, Entrant, Function, entrants
from bench.results import WRONG, Kernel
from bench.timing import NO_TIME, RECOMPILED, Budget, compilations, compiling
from kernels.cases import Case, Shape
from kernels.check import disagreement, in_float64, outputs_and_gradients
from kernels.timing import Staged, Timeable, by_turns
from train.errors import first_line
from train.hardware import resolve_dtype

Inputs = dict[str, Any]
Graph = tuple[list[Tensor], list[Tensor]]  # outputs, and the inputs that they are differentiated by

OTHERS_TIMES = 16.0  # of plain torch's error, that others may make
CHECKED_FLOPS = 1e12  # of a forward pass in float64, which most GPUs compute slowly; above, fewer rows are checked
LEAST_SECONDS = 0.02  # of timing, however little is left
CASE = "case"  # for the budget: compiling and checking a case's variants


def directions(case: Case) -> tuple[str, ...]:
    return ("forward",) if case.backward_bytes is None else ("forward", "backward", "both")


def shapes(case: Case, device: torch.device) -> tuple[Shape, ...]:
    """The shapes at which a case is timed: GPT's, or smaller ones on a CPU."""
    return case.cpu_shapes if device.type == "cpu" else case.gpt_shapes


def work_of(case: Case, shape: Shape, dtype: torch.dtype, direction: str) -> tuple[int | None, int | None]:
    """(bytes, FLOPs) that a direction takes at least.

    Bytes only where memory is what counts: a case with FLOPs states the bytes of its own kernels beside those of
    cuBLAS's. FLOPs of the backward pass: two products for each of the forward's; attention makes the scores again.
    linear_cross_entropy's only for both: ours makes its gradients in the forward pass, torch in the backward pass.
    """
    if case.flops is not None:
        if case.name.startswith("linear_cross_entropy") and direction != "both":
            return None, None
        forward = case.flops(shape)
        backward = forward * 5 // 2 if case.name == ATTENTION.name else 2 * forward
        return None, {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    forward = case.forward_bytes(shape, dtype)
    backward = case.backward_bytes(shape, dtype) if case.backward_bytes else 0
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction], None


class Contest:
    """One case at one shape: its variants that can run here and are right, ready to be timed.

    skipped: why each of the others is not timed.
    """

    def __init__(self, case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.case, self.shape, self.dtype, self.device = case, shape, dtype, device
        self.entrants: list[Entrant] = entrants(case, device)
        self.skipped: dict[str, str] = {}
        self._functions: dict[str, Function] = {}
        for entrant in self.entrants:
            try:
                self._functions[entrant.name] = entrant.make()
            except (ImportError, ValueError) as error:
                self._skip(entrant.name, first_line(error))
        try:
            self._check()
            self._inputs = case.make_inputs(shape, dtype, device)
        except torch.OutOfMemoryError as error:
            for name in list(self._functions):
                self._skip(name, first_line(error))
        self._cotangents: list[Tensor] = []

    @compiling()
    def measure(self, direction: str, seconds: float, least: int = 5, budget: Budget | None = None) -> list[Kernel]:
        """A row of every variant, in their order; about `seconds` of samples, `least` of each or more.

        budget: where `least` of each do not fit into what is left of it, none is taken. None: as long as it takes.
        """
        skipped, works, begin = dict(self.skipped), {}, time.perf_counter()
        for entrant in self.entrants:
            if entrant.name in self._functions:
                work = self._work(entrant, direction)
                try:
                    reason = _objection(entrant, work)
                except torch.OutOfMemoryError as error:
                    reason = first_line(error)
                if reason:
                    skipped[entrant.name] = reason
                else:
                    works[entrant.name] = work
        once = time.perf_counter() - begin
        if budget and not budget.fits(more=(least + 1) * once):
            skipped, works = skipped | dict.fromkeys(works, NO_TIME), {}
        samples: dict[str, list[float]] = {}
        before = compilations()
        try:
            samples = by_turns(works, self.device, seconds=seconds, least=least) if works else {}
        except torch.OutOfMemoryError as error:  # each fits alone, but not all together
            skipped |= dict.fromkeys(works, first_line(error))
        if compilations() > before:
            samples.pop(COMPILED, None)
            skipped[COMPILED] = WRONG + RECOMPILED
        return _rows(self.case, self.shape, self.dtype, direction, self.entrants, samples, skipped)

    def _skip(self, name: str, reason: str) -> None:
        self._functions.pop(name, None)
        self.skipped[name] = reason

    @compiling()
    def _check(self) -> None:
        """Leave out what does not compute what the reference does, and everything where ours does not."""
        shape = self.shape
        while self.case.flops is not None and self.case.flops(shape) > CHECKED_FLOPS and shape[0] > 1:
            shape = fewer_rows(shape)
        while (reasons := self._wrong(shape)) is None:
            shape = fewer_rows(shape)
        for name, reason in reasons.items():
            self._skip(name, reason)
        for entrant in self.entrants:
            if entrant.ours and entrant.name in reasons:
                for name in list(self._functions):
                    self._skip(name, f"not timed, since {entrant.name} is wrong")

    def _wrong(self, shape: Shape) -> dict[str, str] | None:
        """What is wrong with those that are not as they should be; None where float64 does not fit at that shape."""
        try:
            inputs = self.case.make_inputs(shape, self.dtype, self.device)
            reference = self._functions["reference"]
            plain, exact = self._outcome(reference, inputs), self._outcome(reference, in_float64(inputs))
            reasons = {}
            for entrant in self.entrants:
                if entrant.name in self._functions and entrant.name != "reference":
                    reasons[entrant.name] = _objection(entrant, lambda e=entrant: self._judged(e, inputs, plain, exact))
            return {name: reason for name, reason in reasons.items() if reason}
        except torch.OutOfMemoryError:
            if self.case.in_place or shape[0] < 4:  # AdamW's shape has no rows
                raise
            return None

    def _judged(
        self, entrant: Entrant, inputs: Inputs, plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
    ) -> str:
        """What is wrong with an entrant's results; empty where nothing is."""

        def outcome() -> dict[str, Tensor]:
            given = copied(inputs) if entrant.own_inputs else inputs
            return self._outcome(self._functions[entrant.name], given)

        got = outcome()
        if not entrant.ours:
            return disagreement(got, plain, exact, times=OTHERS_TIMES)
        if reason := disagreement(got, plain, exact):
            return reason
        again = outcome()
        others = [name for name, x in got.items() if not torch.equal(x.nan_to_num(), again[name].nan_to_num())]
        return f"{others[0]}: other bits the second time" if others else ""

    def _outcome(self, function: Function, inputs: Inputs) -> dict[str, Tensor]:
        """What there is to compare: results, gradients and, of a function that works in place, its inputs after it."""
        if not self.case.in_place:
            return outputs_and_gradients(function, inputs)
        inputs = copied(inputs)
        results = outputs_and_gradients(function, inputs)
        return results | {name: x for name, x in inputs.items() if isinstance(x, Tensor)}

    def _work(self, entrant: Entrant, direction: str) -> Timeable:
        function, inputs = self._functions[entrant.name], self._inputs
        if self.case.in_place:
            inputs = copied(inputs)  # each variant's own, which it goes on changing

        def given() -> Inputs:
            return copied(inputs) if entrant.own_inputs else inputs

        def forward(given: Inputs) -> Graph:
            returned = function(**given)
            outputs = [o for o in (returned if isinstance(returned, tuple) else (returned,)) if _differentiable(o)]
            return outputs, [x for x in given.values() if _differentiable(x)]

        def backward(graph: Graph) -> object:
            outputs, leaves = graph
            if not self._cotangents:
                self._cotangents = [torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in outputs]
            return torch.autograd.grad(outputs, leaves, self._cotangents)

        if direction == "forward":
            return Staged(given, forward)
        if direction == "backward":
            return Staged(lambda: forward(given()), backward)
        return Staged(given, lambda given: backward(forward(given)))


def _objection(entrant: Entrant, attempt: Callable[[], object]) -> str:
    """Why an entrant is not timed: what the attempt raises or returns; empty if all is well."""
    try:
        said = attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that is missing, a package of another version: all kinds
        return (WRONG if entrant.ours else "") + first_line(error)
    return f"{WRONG if entrant.ours else 'disagrees with the reference: '}{said}" if said else ""


def fewer_rows(shape: Shape) -> Shape:
    return (max(1, shape[0] // 4), *shape[1:])


def copied(inputs: Inputs) -> Inputs:
    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return {name: copy(x) for name, x in inputs.items()}


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def rows(device: torch.device, seconds: float, cases: tuple[Case, ...] = TIMED) -> Iterator[Kernel]:
    """The rows of every case, as they are measured, in about `seconds`; the first shape of every case comes first.

    What there was no time for comes as skipped rows. A kernel of ours that is wrong gives a row whose `skipped` begins
    with WRONG; the caller ends with a failure then.
    """
    dtype = resolve_dtype("auto", device)
    turns = [(i, case, shape) for case in cases for i, shape in enumerate(shapes(case, device))]
    turns.sort(key=lambda turn: turn[0])  # stable
    budget = Budget(seconds)
    for done, (_, case, shape) in enumerate(turns):
        contest, of_case = None, budget.part(budget.left / (len(turns) - done))
        if budget.fits(CASE):
            with budget.task(CASE):
                contest = Contest(case, shape, dtype, device)
        for nth, direction in enumerate(directions(case)):
            if contest is None:
                every = entrants(case, device)
                yield from _rows(case, shape, dtype, direction, every, {}, {one.name: NO_TIME for one in every})
            else:
                share = of_case.left / (len(directions(case)) - nth)
                yield from contest.measure(direction, max(share, LEAST_SECONDS), budget=budget)


def _rows(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    direction: str,
    entrants: list[Entrant],
    samples: Mapping[str, list[float]],
    skipped: Mapping[str, str],
) -> list[Kernel]:
    """By entrants' names: their samples, or why there are none."""
    work = work_of(case, shape, dtype, direction)
    what = case.name, list(shape), str(dtype).removeprefix("torch."), direction
    return [
        Kernel(*what, name, samples.get(name, []), *work, skipped.get(name, ""))
        for name in (entrant.name for entrant in entrants)
    ]
