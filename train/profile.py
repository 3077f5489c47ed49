"""--profile: a few steps under torch.profiler, a Chrome trace of them, and a table of where their time went.

`ProfiledStep` wraps the step of the master rank. The loop does not know, and the step computes the same bits.
`read` gives each instant of the profiled steps to one operation of the trace, so that times add up to the wall's.
`row_of` tells by an operation's name to which row of the table it belongs: a kernel's on a GPU, torch's on a CPU.
`report` prints the rows beside their floors: the least time of their work, at the rates measured on this device.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.profiler import ProfilerActivity, profile, record_function

from model.work import MATMULS, Work, floor
from train.data import Batch
from train.dryrun import Job
from train.files import replace_together, staging_folder
from train.graph import GraphedStep
from train.hardware import Ceilings, measure_ceilings, synchronize
from train.memory import as_planned_for, job_of
from train.plan import Plan
from train.step import StepResult, TrainStep

WARM_UP, STEPS = 5, 5  # iterations before those that are profiled, and those
MICRO_STEPS = 40  # at most: a larger trace opens in no viewer
TRACE = "trace.json"
WINDOW = "nanofuse: profiled steps"  # the annotation in the trace that spans what counts
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace's events
NAMED = 8  # operations that no row knows: so many are listed by name

# The rows of the table, in order. A part of `step_work` without a row of its own has one in ROW_OF_PART.
COMPILED, ELEMENTWISE, COPIES, BOOKKEEPING = "torch.compile", "elementwise, sums", "copies, memsets", "bookkeeping"
GELU_FORWARD, GELU_BACKWARD = "matmul + GELU forward", "matmul + GELU backward"  # one kernel each
OTHER, IDLE = "other", "idle"
ROWS = ("matmuls", GELU_FORWARD, GELU_BACKWARD, "attention forward", "attention backward")
ROWS += ("LayerNorm forward", "LayerNorm backward", "GELU forward", "GELU backward", "cross-entropy", "embeddings")
ROWS += ("optimizer", COMPILED, ELEMENTWISE, COPIES, "communication", BOOKKEEPING, OTHER, IDLE)
ROW_OF_PART = dict.fromkeys(MATMULS, "matmuls") | {
    "embedding forward": "embeddings",
    "embedding backward": "embeddings",
    "accumulation": ELEMENTWISE,
}
UNSPECIFIC = {ELEMENTWISE, COPIES, BOOKKEEPING, OTHER}  # part of whatever operation they run in, if any

# The first pattern that is found in a name decides. Special ones come first: Inductor's names list what they fuse, and
# many attention kernels have CUTLASS in theirs.
PATTERNS = tuple(
    (row, re.compile(pattern))
    for row, pattern in (
        ("communication", r"^nccl|^gloo:|^c10d::|^_?all_?reduce"),
        ("matmuls", r"^triton_(tem|mm)_\w*?(mm|matmul)"),
        (COMPILED, r"^triton_[a-z0-9]+_|^cpp_fused|CompiledFxGraph|Torch-Compiled|CompiledFunction|AOTDispatcher"),
        (COMPILED, r"^TorchDynamo|^Pregraph"),
        (BOOKKEEPING, r"^autograd::|^torch::autograd::|^\w+Backward\d*$"),
        # cuDNN's fprop and bprop, flash-attn 2, 3 and 4, xformers' fmha; torch's on a CPU, where bmm is attention's
        ("attention backward", r"(flash|Flash|[aA]tt(entio)?n).*([bB]wd|bprop|[bB]ackward)|fmha_cutlassB"),
        ("attention backward", r"dot_do_o|convert_dq|^aten::_softmax_backward"),
        ("attention forward", r"flash|Flash|fmha|sdpa|[aA]ttention|^aten::(bmm|baddbmm|_?softmax|_safe_softmax)$"),
        (GELU_FORWARD, r"^linear_gelu_fwd_kernel"),
        (GELU_BACKWARD, r"^linear_gelu_bwd_kernel"),
        ("matmuls", r"^nanofuse::mlp"),
        ("LayerNorm backward", r"layer_norm_(bwd|backward|grad)|^sum_partials|GammaBeta|cuComputeGradInput"),
        ("LayerNorm forward", r"layer_norm|LayerNorm|RowwiseMoments"),
        ("GELU backward", r"gelu_b(wd|ackward)|GeluBackward"),
        ("GELU forward", r"gelu|Gelu"),
        ("cross-entropy", r"cross_entropy|nll_loss|[sS]oft_?[mM]ax|^(scale|count)_kernel"),
        ("embeddings", r"[eE]mbedding|index_?[sS]elect|gather_kernel|RadixSort|SortKV|sum_and_scatter|krn_partial"),
        ("embeddings", r"compute_grad_weight|compute_num_of_partial|^aten::(sort|bincount|searchsorted)"),
        ("optimizer", r"adamw|Adam|multi_tensor_apply|NormTwoOps|vector_norm|_amp_"),
        ("matmuls", r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitK|sm\d\d_|mkldnn"),
        ("matmuls", r"^aten::(mm|addmm|_addmm|linear|matmul)"),
        (COPIES, r"^Mem(cpy|set)|copy|Copy|FillFunctor|^aten::(to|clone|contiguous|cat|stack|fill_|zero_)$"),
        (COPIES, r"^aten::(zero|one)s(_like)?$|^aten::full(_like)?$"),
        (ELEMENTWISE, r"at::native.*(elementwise|reduce|dropout|distribution)|^aten::_foreach_"),
        (ELEMENTWISE, r"^aten::(add|sub|mul|div|neg|abs|pow|sqrt|rsqrt|reciprocal|clamp|where|sum|mean|any|all)_?$"),
        (ELEMENTWISE, r"^aten::(eq|ne|gt|ge_?|lt|le|is\w+|logical_\w+|bitwise_\w+|bernoulli_|native_dropout|dropout)$"),
        (ELEMENTWISE, r"^aten::(rand\w*|triu_?)$|^nanofuse_cpu::random_keep"),
        (BOOKKEEPING, r"^aten::(as_strided|view|_unsafe_view|reshape|flatten|t|transpose|permute|expand|slice\w*)$"),
        (BOOKKEEPING, r"^aten::(select|narrow|unsqueeze|unbind|split|alias|detach_?|empty\w*|resize_|resolve_\w+|mT)$"),
        (BOOKKEEPING, r"^aten::(item|_local_scalar_dense|lift_fresh)$|^detach$"),
    )
)


def row_of(name: str) -> str:
    """The row of ROWS that an operation of this name belongs to. OTHER where nothing is known of it."""
    return next((row for row, pattern in PATTERNS if pattern.search(name)), OTHER)


# Steps under the profiler


def profiled_iterations(first: int, max_iters: int, eval_interval: int, accumulation: int) -> range:
    """Which iterations of a run that begins with `first` are profiled: some after a warm-up, no evaluation among them.

    Empty where there are none such before max_iters.
    """
    count = min(STEPS, max(1, MICRO_STEPS // accumulation), eval_interval - 1)
    begin = first + WARM_UP
    evaluated = -(-begin // eval_interval) * eval_interval  # the next iteration that begins with an evaluation
    if evaluated < begin + count:
        begin = evaluated + 1
    return range(begin, min(begin + count, max_iters))


def profiled_step(step: TrainStep | GraphedStep, plan: Plan, first: int, say: Callable[[str], None]) -> "ProfiledStep":
    """`step` of a run, profiled as its plan says. first: the run's first iteration."""
    config, dtype = plan.config, plan.precision.compute
    at = as_planned_for(plan.device)  # the residual stream's dtype depends on it
    job = job_of(config, plan.shape, plan.ops, dtype, plan.world, chunk=0, resumed=False, **at)
    floors = Floors(measure_ceilings(plan.device, dtype), job)
    which = profiled_iterations(first, config.max_iters, config.eval_interval, plan.accumulation)
    return ProfiledStep(step, which, first, floors=floors, out_dir=Path(config.out_dir), say=say)


@dataclass
class ProfiledStep:
    """`step`, the same call and the same results; iterations `which` of a run that begins with `first` are profiled.

    The profile spans from the end of the step before them to the end of the last of them: what the loop does between
    two steps counts too. say: prints lines.
    """

    step: TrainStep | GraphedStep
    which: range
    first: int
    floors: "Floors"
    out_dir: Path
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.scaler = self.step.scaler
        self._iteration, self._device = self.first, self.scaler.scale.device
        self._running = ExitStack()  # the profiler and the annotation of its window

    def __call__(self, batch: Batch, lr: float) -> StepResult:
        i, which = self._iteration, self.which
        with record_function(f"iteration {i}") if i in which else nullcontext():
            result = self.step(batch, lr)
        self._iteration += 1
        if which and self._iteration == which.start:
            self._begin()
        elif which and self._iteration == which.stop:
            self._finish()
        return result

    def end(self) -> None:
        """The run is over: say so if it was before there was anything to show.

        To be called however it ended: Python cannot exit while a profiler runs.
        """
        self._running.close()
        if not self.which:
            self.say(f"profile: none; it takes more than {WARM_UP} iterations, and two of them between evaluations")
        elif self._iteration < self.which.stop:
            self.say(f"profile: none; the run ended before {self._iterations} were done")

    @property
    def _iterations(self) -> str:
        return f"iterations {self.which.start} to {self.which.stop - 1}"

    def _begin(self) -> None:
        self.say(f"profile: {self._iterations} run under the profiler, which takes its part of their times")
        on_device = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        synchronize(self._device)
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_device], acc_events=True)
        self._running.enter_context(self._profile)
        self._running.enter_context(record_function(WINDOW))

    def _finish(self) -> None:
        synchronize(self._device)
        self._running.close()
        path, on_cuda = self.out_dir / TRACE, self._device.type == "cuda"
        try:
            with staging_folder(self.out_dir) as staging:
                self._profile.export_chrome_trace(str(staging / TRACE))
                trace = json.loads((staging / TRACE).read_bytes())
                replace_together(staging, self.out_dir, (TRACE,))
        except (OSError, ValueError) as error:  # a full disk, for example, must not end a training run
            self.say(f"profile: {path} could not be written: {error}")
        else:
            self.say(report(read(trace, cuda=on_cuda), len(self.which), self.floors))
            self.say(f"trace: {path}, for ui.perfetto.dev or chrome://tracing")
        del self._profile  # its events take memory


# The trace


class Span(NamedTuple):
    name: str
    row: str
    start: float  # microseconds, as all times of a trace
    end: float


class Timeline(NamedTuple):
    wall: float
    rows: Counter[str]  # row -> its time; with idle, they add up to `wall`
    names: Counter[tuple[str, str]]  # (row, name) -> its time


def read(trace: dict[str, Any], *, cuda: bool) -> Timeline:
    """The timeline of a parsed Chrome trace. ValueError if it has no event named WINDOW, or more than one.

    On a CUDA device operations are kernels, copies and memsets of every stream, and those of replayed graphs. On a CPU
    they are torch's operations on the training thread.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    windows = [e for e in events if e.get("name") == WINDOW and e.get("cat") == "user_annotation"]
    if len(windows) != 1:
        raise ValueError(f"trace: got {len(windows)} events named {WINDOW!r}, expected 1")
    (window,) = windows
    if cuda:
        spans = [_span(e) for e in events if e.get("cat") in ON_DEVICE]
    else:
        spans = _nested([_span(e) for e in events if e.get("cat") == "cpu_op" and e["tid"] == window["tid"]])
    return attribute(spans, window["ts"], window["ts"] + window["dur"])


def _span(event: dict[str, Any]) -> Span:
    return Span(event["name"], row_of(event["name"]), event["ts"], event["ts"] + event["dur"])


def _nested(spans: list[Span]) -> list[Span]:
    """Spans of one thread. An unspecific one has the row of its parent: a copy within AdamW is the optimizer's."""
    result: list[Span] = []
    parents: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while parents and parents[-1].end <= span.start:
            parents.pop()
        if parents and span.row in UNSPECIFIC and parents[-1].row not in UNSPECIFIC:
            span = span._replace(row=parents[-1].row)
        parents.append(span)
        result.append(span)
    return result


def attribute(spans: list[Span], begin: float, end: float) -> Timeline:
    """Every instant from `begin` to `end` to the running span that began last, or to IDLE.

    Of nested operations that is the innermost, so each has its own time. Communication counts only where nothing else
    runs. As in painting, what comes later covers what was there: idle, then communication, then the rest by start.
    """
    cut = [Span("", IDLE, begin, end)]
    cut += [s._replace(start=max(s.start, begin), end=min(s.end, end)) for s in spans]
    cut = [s for s in cut if s.start < s.end]
    cut.sort(key=lambda s: (s.row != IDLE, s.row != "communication", s.start, -s.end))
    ends = np.array([(s.start, s.end) for s in cut])  # (spans, 2)
    instants = np.unique(ends)  # between two of them nothing begins or ends
    owner = np.zeros(len(instants) - 1, dtype=np.int64)
    for i, (first, last) in enumerate(np.searchsorted(instants, ends)):
        owner[first:last] = i
    times = np.bincount(owner, np.diff(instants), len(cut)).tolist()
    rows, names = Counter[str](), Counter[tuple[str, str]]()
    for span, microseconds in zip(cut, times, strict=True):
        rows[span.row] += microseconds
        names[span.row, span.name] += microseconds
    return Timeline(end - begin, rows, names)


# The table


class Row(NamedTuple):
    name: str
    seconds: float  # a step
    floor: float = 0.0  # seconds a step, at least; 0: nothing that a step needs


class Floors:
    """The least time of the parts of a job's step, on a device of these ceilings."""

    def __init__(self, ceilings: Ceilings, job: Job) -> None:
        self.ceilings = ceilings
        self._apart, self._fused = (job.work(fused_gelu=fused) for fused in (False, True))

    def seconds(self, work: Work) -> float:
        return floor(work, self.ceilings.flops, self.ceilings.bandwidth)

    def by_row(self, seen: set[str]) -> Counter[str]:
        """row -> seconds of a step, at least. seen: the rows that took time.

        Work whose own row took no time was done by torch.compile's kernels; without those, by some unknown operation.
        """
        work, floors = dict(self._apart), Counter[str]()
        fused = (GELU_FORWARD, "mlp up", "GELU forward"), (GELU_BACKWARD, "mlp down", "GELU backward")
        for row, linear, gelu in fused:
            if row in seen:  # one of the linear layer's three products is not among the other matmuls
                product = Work(work[linear].flops // 3, work[linear].bytes // 3)
                work[linear] = product * 2
                floors[row] = self.seconds(product + self._fused[gelu])
                del work[gelu]
        elsewhere = COMPILED if COMPILED in seen else OTHER
        for part, least in work.items():
            row = ROW_OF_PART.get(part, part)
            floors[row if row in seen else elsewhere] += self.seconds(least)
        return floors


def breakdown(timeline: Timeline, steps: int, floors: Floors) -> list[Row]:
    """The rows that took time or must, in the order of ROWS. Their seconds add up to those of a step, by the wall."""
    least = floors.by_row({row for row, microseconds in timeline.rows.items() if microseconds > 0})
    rows = [Row(name, timeline.rows[name] / 1e6 / steps, least[name]) for name in ROWS]
    return [row for row in rows if row.seconds > 0 or row.floor > 0]


def report(timeline: Timeline, steps: int, floors: Floors) -> str:
    """The table as text."""
    rows, wall = breakdown(timeline, steps, floors), timeline.wall / 1e6 / steps
    flops, bandwidth = floors.ceilings.flops / 1e12, floors.ceilings.bandwidth / 1e9
    rates = f"{flops:.4g} TFLOP/s in a matmul, {bandwidth:.4g} GB/s in a copy"
    lines = [
        f"profile: {steps} steps of {1e3 * wall:.3f} ms; floors are for {rates}, as measured",
        f"{'':<24}{'ms':>10}{'share':>9}{'floor ms':>11}{'reached':>10}",
    ]
    for row in [*rows, Row("total", sum(row.seconds for row in rows), sum(row.floor for row in rows))]:
        line = f"{row.name:<24}{1e3 * row.seconds:>10.3f}{row.seconds / wall:>9.1%}"
        if row.floor:
            line += f"{1e3 * row.floor:>11.3f}" + (f"{row.floor / row.seconds:>10.0%}" if row.seconds else "")
        lines.append(line)
    unknown = [(name, time) for (row, name), time in timeline.names.most_common() if row == OTHER][:NAMED]
    if unknown:
        lines.append("other: " + ", ".join(f"{name[:60]} {time / 1e3 / steps:.3f} ms" for name, time in unknown))
    return "\n".join(lines)
