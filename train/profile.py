"""--profile: a few steps under torch.profiler, a Chrome trace of them, and a table of where their time went.

`ProfiledStep` wraps the step of the master rank. The loop does not know, and the step computes the same bits.
`read` gives each instant of the profiled steps to one operation of the trace, so that times add up to the wall's.
`row_of` tells by an operation's name to which row of the table it belongs: a kernel's on a GPU, torch's on a CPU.
`report` prints the rows beside their floors: the least time of their work, at the rates measured on this device.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.profiler import ProfilerActivity, profile, record_function

from model.work import MATMULS, floor
from train.data import Batch
from train.dryrun import Job
from train.files import replace_together, staging_folder
from train.hardware import measure_bandwidth, measure_flops, synchronize
from train.plan import Plan
from train.step import StepResult, TrainStep

WARM_UP, STEPS = 5, 5  # iterations before those that are profiled, and those
MICRO_STEPS = 40  # at most: a larger trace opens in no viewer
TRACE = "trace.json"
WINDOW = "nanofuse: profiled steps"  # the annotation in the trace that spans what counts
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace's events
NAMED = 8  # operations that no row knows: so many are listed by name

# The rows of the table, in order. A part of `step_work` without a row of its own has one in ROW_OF_PART.
COMPILED, ELEMENTWISE, COPIES = "torch.compile", "elementwise, sums, views", "copies, memsets"
OTHER, IDLE = "other", "idle"
ROWS = ("matmuls", "attention forward", "attention backward", "LayerNorm forward", "LayerNorm backward")
ROWS += ("GELU forward", "GELU backward", "cross-entropy", "embeddings", "optimizer", COMPILED, ELEMENTWISE, COPIES)
ROWS += ("communication", OTHER, IDLE)
ROW_OF_PART = dict.fromkeys(MATMULS, "matmuls") | {
    "embedding forward": "embeddings",
    "embedding backward": "embeddings",
    "accumulation": ELEMENTWISE,
}
UNSPECIFIC = {ELEMENTWISE, COPIES, OTHER}  # part of whatever operation they run in, if any
FUSED_GELU = "linear_gelu"  # so begin the names of kernels that compute a matmul and GELU

# The first pattern that is found in a name decides. Special ones come first: Inductor's names list what they fuse, and
# many attention kernels have CUTLASS in theirs.
PATTERNS = (
    ("communication", r"^nccl|^gloo:|^c10d::|^_?all_?reduce"),
    ("matmuls", r"^triton_(tem|mm)_\w*?(mm|matmul)"),
    (COMPILED, r"^triton_[a-z0-9]+_|^cpp_fused|CompiledFxGraph|Torch-Compiled|CompiledFunction|AOTDispatcher"),
    (COMPILED, r"^TorchDynamo|^Pregraph"),
    (ELEMENTWISE, r"^autograd::|^torch::autograd::|^\w+Backward\d*$"),
    # cuDNN's fprop and bprop, flash-attn 2, 3 and 4, xformers' fmha; torch's on a CPU, where bmm is attention's
    ("attention backward", r"(flash|Flash|[aA]tt(entio)?n).*([bB]wd|bprop|[bB]ackward)|fmha_cutlassB"),
    ("attention backward", r"dot_do_o|convert_dq|^aten::_softmax_backward"),
    ("attention forward", r"flash|Flash|fmha|sdpa|[aA]ttention|^aten::(bmm|baddbmm|_?softmax|_safe_softmax)$"),
    ("matmuls", rf"^{FUSED_GELU}|^nanofuse::mlp"),
    ("LayerNorm backward", r"layer_norm_(bwd|backward|grad)|^sum_partials|GammaBeta|cuComputeGradInput"),
    ("LayerNorm forward", r"layer_norm|LayerNorm|RowwiseMoments"),
    ("GELU backward", r"gelu_b(wd|ackward)|GeluBackward"),
    ("GELU forward", r"gelu|Gelu"),
    ("cross-entropy", r"cross_entropy|nll_loss|[sS]oft_?[mM]ax|^count_kernel"),
    ("embeddings", r"[eE]mbedding|index_?[sS]elect|gather_kernel|RadixSort|SortKV|sum_and_scatter|krn_partial"),
    ("embeddings", r"compute_grad_weight|compute_num_of_partial|fill_reverse_indices"),  # the last one begins a sort
    ("embeddings", r"^aten::(sort|bincount|searchsorted)"),
    (COPIES, r"multi_tensor_apply.*Copy"),  # a batch, put where a graph reads it
    ("optimizer", r"adamw|Adam|multi_tensor_apply|NormTwoOps|vector_norm|_amp_"),
    ("matmuls", r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitK|sm\d\d_|mkldnn|^aten::(_?addmm|mm|linear|matmul)"),
    (COPIES, r"^Mem(cpy|set)|copy|Copy|FillFunctor|^aten::(to|clone|contiguous|cat|stack|fill_|zero_)$"),
    (COPIES, r"^aten::(zeros|ones|full)(_like)?$"),
    (ELEMENTWISE, r"at::native.*(elementwise|reduce|dropout|distribution)|^aten::|^nanofuse_cpu::random_keep|^detach$"),
)


@functools.cache
def row_of(name: str) -> str:
    """The row of ROWS that an operation of this name belongs to. OTHER where nothing is known of it."""
    return next((row for row, pattern in PATTERNS if re.search(pattern, name)), OTHER)


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


class ProfiledStep:
    """`step` of a run, the same call and the same results; some of its iterations are profiled.

    The profile spans from the end of the step before them to the end of the last of them: what the loop does between
    two steps counts too. first: the run's first iteration. say: prints lines.
    """

    def __init__(self, step: TrainStep, plan: Plan, first: int, say: Callable[[str], None]) -> None:
        config, self._job = plan.config, plan.job
        self._rates = measure_flops(plan.device, plan.precision.compute), measure_bandwidth(plan.device)
        self.which = profiled_iterations(first, config.max_iters, config.eval_interval, plan.accumulation)
        self._named = f"iterations {self.which.start} to {self.which.stop - 1}"
        self.step, self.scaler, self.evaluate = step, step.scaler, step.evaluate
        self.say, self._path = say, Path(config.out_dir) / TRACE
        self._iteration, self._device = first, plan.device
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
            self.say(f"profile: none; the run ended before {self._named} were done")

    def _begin(self) -> None:
        self.say(f"profile: {self._named} run under the profiler, which takes its part of their times")
        on_device = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        synchronize(self._device)
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_device], acc_events=True)
        self._running.enter_context(self._profile)
        self._running.enter_context(record_function(WINDOW))

    def _finish(self) -> None:
        synchronize(self._device)
        self._running.close()
        try:
            with staging_folder(self._path.parent) as staging:
                self._profile.export_chrome_trace(str(staging / TRACE))
                trace = json.loads((staging / TRACE).read_bytes())
                replace_together(staging, self._path.parent, (TRACE,))
            timeline = read(trace, cuda=self._device.type == "cuda")
        except (OSError, ValueError) as error:  # a full disk, for example, must not end a training run
            self.say(f"profile: {self._path} could not be written: {error}")
        else:
            self.say(report(timeline, len(self.which), self._job, self._rates))
            self.say(f"trace: {self._path}, for ui.perfetto.dev or chrome://tracing")
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
    """The timeline of a parsed Chrome trace. ValueError unless it has one event named WINDOW.

    On a CUDA device operations are kernels, copies and memsets of every stream, and those of replayed graphs. On a CPU
    they are torch's operations on the training thread.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    (window,) = [e for e in events if e.get("name") == WINDOW and e.get("cat") == "user_annotation"]
    if cuda:
        spans = [_span(e) for e in events if e.get("cat") in ON_DEVICE]
    else:
        spans = _nested([_span(e) for e in events if e.get("cat") == "cpu_op" and e["tid"] == window["tid"]])
    return attribute(spans, window["ts"], window["ts"] + window["dur"])


def _span(event: dict[str, Any]) -> Span:
    return Span(event["name"], row_of(event["name"]), event["ts"], event["ts"] + event["dur"])


def _nested(spans: list[Span]) -> Iterator[Span]:
    """Spans of one thread. An unspecific one has the row of its parent: a copy within AdamW is the optimizer's."""
    parents: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while parents and parents[-1].end <= span.start:
            parents.pop()
        if parents and span.row in UNSPECIFIC and parents[-1].row not in UNSPECIFIC:
            span = span._replace(row=parents[-1].row)
        parents.append(span)
        yield span


def attribute(spans: Iterable[Span], begin: float, end: float) -> Timeline:
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


def floors(timeline: Timeline, job: Job, rates: tuple[float, float]) -> Counter[str]:
    """row -> seconds of a step, at least: of the job's work, on a device of these rates, FLOP/s and bytes/s.

    Work whose own row took no time was done by torch.compile's kernels; without those, by some unknown operation.
    """
    fused = any(name.startswith(FUSED_GELU) for _, name in timeline.names)
    work, least = dict(job.work(fused_gelu=fused)), Counter[str]()
    if fused:
        for linear, gelu in (("mlp up", "GELU forward"), ("mlp down", "GELU backward")):
            work[linear] += work.pop(gelu)
    elsewhere = COMPILED if timeline.rows[COMPILED] > 0 else OTHER
    for part, needed in work.items():
        row = ROW_OF_PART.get(part, part)
        least[row if timeline.rows[row] > 0 else elsewhere] += floor(needed, *rates)
    return least


def report(timeline: Timeline, steps: int, job: Job, rates: tuple[float, float]) -> str:
    """The table as text: the rows that took time or must. Their seconds add up to those of a step, by the wall."""
    if timeline.rows[IDLE] == timeline.wall:
        return (
            "profile: no table: the profiler saw nothing run; on a GPU it needs CUPTI, which may lack a permission or "
            "serve another profiler"
        )
    wall, least = timeline.wall / 1e6 / steps, floors(timeline, job, rates)
    ceilings = f"{rates[0] / 1e12:.4g} TFLOP/s in a matmul, {rates[1] / 1e9:.4g} GB/s in a copy"
    lines = [
        f"profile: {steps} steps of {1e3 * wall:.3f} ms; floors are for {ceilings}, as measured",
        f"{'':<24}{'ms':>10}{'share':>9}{'floor ms':>11}{'reached':>10}",
    ]
    rows = [(name, timeline.rows[name] / 1e6 / steps, least[name]) for name in ROWS]
    for name, seconds, needed in [*rows, ("total", wall, least.total())]:
        line = f"{name:<24}{1e3 * seconds:>10.3f}{seconds / wall:>9.1%}"
        if needed:
            line += f"{1e3 * needed:>11.3f}" + (f"{needed / seconds:>10.0%}" if seconds else "")
        if seconds or needed:
            lines.append(line)
    unknown = [(name, time) for (row, name), time in timeline.names.most_common() if row == OTHER][:NAMED]
    if unknown:
        lines.append("other: " + ", ".join(f"{name[:60]} {time / 1e3 / steps:.3f} ms" for name, time in unknown))
    return "\n".join(lines)
