"""A training step without its device: what it would launch, read, write and hold, found by running it on shapes.

`dry_run` builds the model, its optimizer and its step with the project's own code, but with tensors that have shapes
and no contents. It runs a micro-step, an update and an evaluation under a `Recorder`. Nothing is computed and no memory
is taken, so a model of any size takes a fraction of a second. For a GPU the tensors are torch's meta tensors, and the
fused kernels only plan their launches (`kernels.launch.recording`). For a CPU they are fake CPU tensors, because torch
runs other operations there.

The recorder sees eager execution. A compiled step makes other launches, but holds about as much.
"""

import dataclasses
import functools
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import Ops
from model import GPT, GPTConfig, Precision
from model.work import Work, step_work
from train.hardware import CARDS, Card, resolve_stream
from train.optim import FlatAdamW, LossScale
from train.step import TrainStep

if TYPE_CHECKING:
    from kernels.launch import Device, Launch

VIEWS = frozenset(["_unsafe_view", "lift_fresh", "_reshape_alias"])  # views that torch does not mark as views
ALLOCATIONS = frozenset(["empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"])
FILLS = frozenset(["zero_", "fill_", "zeros", "zeros_like", "ones_like", "full", "full_like"])  # these only write
MATMUL_OPS = frozenset(["mm", "addmm", "addmm_", "bmm", "baddbmm"])
WORKSPACES = 2 * 2**25  # bytes that cuBLAS takes: 32 MiB on recent GPUs, for each of two streams
# parameters and both moments, which an update reads and writes: arguments of our kernel, and of torch's operation
UPDATED = {"adamw_update_kernel": ("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"), "_fused_adamw_": (0, 2, 3)}
GRANULE = 512  # bytes: torch's allocator for CUDA rounds the size of every tensor up to a multiple


@dataclass(frozen=True)
class Call:
    """One launch on the device: a kernel of ours, or an operation of torch, counted as one kernel."""

    name: str  # "mm", or "triton:gelu_fwd_kernel"
    bytes: int  # read and written, if each of its tensors is touched once, and AdamW's read and written
    flops: int  # of a matmul or of attention (only the causal half), else 0


class Recorder(TorchDispatchMode):
    """Sees every operation below autograd and records what a device would have to do.

    calls: all launches since `restart`, in order. launches: only those of Triton kernels, since the beginning. parts:
    the most bytes that were alive at a time since `restart`, by label.
    """

    def __init__(self, device: "Device | None", on: str, vocab_size: int = 0) -> None:
        """device: the one that fused kernels plan for. on: the type of the tensors that replace its own, "meta", "cuda"
        or "cpu". vocab_size: a tensor with this many columns counts as logits."""
        super().__init__()
        self.device, self.on = device, on
        self.granule = 1 if on == "cpu" else GRANULE
        self._logits = {vocab_size, -(-vocab_size // 16) * 16} - {0}
        self.launches: list[Launch] = []
        self.alive: Counter[str] = Counter()  # bytes by label
        self._sizes: dict[int, tuple[int, str]] = {}
        self.restart("state")

    def restart(self, label: str) -> None:
        """From now on new tensors get this label. The peak starts at the bytes that are alive now, the calls anew."""
        self.label, self.parts, self.calls = label, Counter(self.alive), []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "nanofuse":
            return self._fused(func, args, kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "addmm" and kwargs.get("out") is not None:
            result = kwargs["out"]  # torch 2.11 cannot run it on shapes if the result has another dtype
        elif name == "_fused_adamw_":
            result = None  # no torch can run it on shapes; it writes in place
        else:
            result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._track(outputs)
        if func.is_view or name in VIEWS or name in ALLOCATIONS or not any(map(self._on_device, inputs + outputs)):
            return result
        written = [x for x in outputs if x is not kwargs.get("out")]
        moved = written if name in FILLS else inputs + ([] if name == "copy_" else written)
        moved += [x for i in UPDATED.get(name, ()) for x in args[i]]
        total = sum(x.nbytes for x in moved if self._on_device(x))
        self.calls.append(Call(name, total, _flops(name, [x for x in args if isinstance(x, Tensor)])))
        return result

    def _fused(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the body of one of our operations, planned for the device."""
        from kernels.launch import BODIES, recording

        with recording(self.device) as launches, self:
            result = BODIES[func](*args, **kwargs)
        for launch in launches:
            name = launch.kernel.fn.__name__
            again = [launch.args[updated] for updated in UPDATED.get(name, ())]
            moved = sum(x.nbytes for x in map(_tensor, [*launch.args.values(), *again]) if x is not None)
            self.calls.append(Call(f"triton:{name}", moved, 0))
            self.launches.append(dataclasses.replace(launch, args=_shapes_of(launch.args)))
        self._track(tree_leaves(result))
        return result

    def _track(self, made: list[Any]) -> None:
        for x in made:
            if not isinstance(x, Tensor) or not self._on_device(x):
                continue
            storage = x.untyped_storage()
            if (key := storage._cdata) in self._sizes:
                continue
            size = -(-storage.nbytes() // self.granule) * self.granule
            label = "logits" if x.ndim > 1 and x.shape[-1] in self._logits else self.label
            if label == "activations" and torch._C._current_graph_task_id() != -1:  # in the backward pass
                label = "workspace"
            self._sizes[key] = size, label
            self.alive[label] += size
            if self.alive.total() > self.parts.total():
                self.parts = Counter(self.alive)
            weakref.finalize(storage, self._free, key).atexit = False

    def _on_device(self, x: Tensor) -> bool:
        return x.device.type == self.on

    def _free(self, key: int) -> None:
        size, label = self._sizes.pop(key)
        self.alive[label] -= size


def _tensor(value: Any) -> Tensor | None:
    """The tensor behind a kernel's argument: the argument itself, or a tensor descriptor's base. Else None."""
    value = getattr(value, "base", value)
    return value if isinstance(value, Tensor) else None


def _shapes_of(args: dict[str, Any]) -> dict[str, Any]:
    """A kernel's arguments, with meta tensors of the same layout: a stored launch keeps no tensor alive."""
    twins = {}
    for name, value in args.items():
        x = _tensor(value)
        if x is not None:
            whole = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device="meta")
            twin = whole.as_strided(x.shape, x.stride(), x.storage_offset())
            value = twin if value is x else dataclasses.replace(value, base=twin)
        twins[name] = value
    return twins


def _flops(name: str, args: list[Tensor]) -> int:
    if name in MATMUL_OPS:
        a, b = args[-2:]
        return 2 * a.numel() * b.shape[-1]
    if "_dot_product_" in name and "attention" in name:
        B, H, T, Q = next(x.shape for x in args if x.ndim == 4)
        return (5 if name.endswith("backward") else 2) * B * H * T * T * Q
    return 0


@dataclass(frozen=True)
class Job:
    """One device's part in a training step: everything that decides what it launches and holds."""

    shape: GPTConfig
    batch_size: int  # sequences in a micro-step
    ops: Ops
    accumulation: int = 1  # micro-steps of this device
    several: bool = False  # whether gradients of several micro-steps or ranks are summed
    dtype: torch.dtype = torch.bfloat16  # the compute dtype
    residual_dtype: str = "auto"  # the setting
    loss_chunk: int = 0  # rows of logits at a time, fused; 0: all
    recompute: str = "none"  # one of model.recompute.MODES
    attention: str = "auto"  # one of model.attention.BACKENDS
    resumed: bool = False  # from a checkpoint, whose tensors exist twice while they are loaded
    shards: int = 1  # ranks that share weights, moments and gradients
    on: str = "meta"  # "cpu": a CPU; "meta": a GPU; "cuda": in tests, a GPU with fake tensors
    card: Card = CARDS["h100"]  # which GPU

    @property
    def stream(self) -> torch.dtype:
        """The residual stream's dtype."""
        return resolve_stream(self.residual_dtype, self.dtype, "cpu" if self.on == "cpu" else "cuda")

    def work(self, *, fused_gelu: bool = False) -> dict[str, Work]:
        """The least work of the step, by part (`model/work.py`)."""
        return step_work(
            self.shape,
            self.batch_size,
            accumulation=self.accumulation,
            compute=self.dtype.itemsize,
            stream=self.stream.itemsize,
            gradients=4 if self.several else self.dtype.itemsize,
            shards=self.shards,
            fused_gelu=fused_gelu,
        )


@dataclass(frozen=True)
class DryRun:
    """What a step does: its launches by part, and the most bytes that it holds, by their use."""

    micro_step: list[Call]
    update: list[Call]
    launches: "list[Launch]"  # Triton's, of these and of an evaluation
    memory: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return sum(self.memory.values())


def dry_run(job: Job) -> DryRun:
    """Run a micro-step, an update and an evaluation of the job on shapes."""
    device, planning = None, nullcontext()
    if job.ops.name != "reference":
        from kernels.launch import INTERPRETER, Device, recording

        device = INTERPRETER if job.on == "cpu" else Device(job.card.capability, job.card.multiprocessors)
        planning = recording(device)  # the device decides how many partial sums there are
    recorder = Recorder(device, job.on, job.shape.vocab_size)
    calls, peaks = [], []  # of each part
    with planning, FakeTensorMode() if job.on != "meta" else nullcontext(), recorder:
        step = build(job)
        x, y = (torch.zeros(job.batch_size, job.shape.block_size, dtype=torch.int64, device=job.on) for _ in range(2))
        step.micro_step(x, y)  # not counted: the first one makes things that later ones reuse
        state, recorder.launches = recorder.alive.total(), []
        for label, part in (
            ("activations", lambda: step.micro_step(x, y)),
            ("workspace", step.update),
            ("workspace", lambda: step.evaluate(x, y)),
        ):
            recorder.restart(label)
            part()
            calls.append(recorder.calls)
            peaks.append(recorder.parts)
        memory = _memory(job, step, state, peaks)
    micro_step, update, _ = calls
    update = [dataclasses.replace(call, bytes=call.bytes // job.shards) for call in update]  # each rank has its share
    return DryRun(micro_step, update, recorder.launches, memory)


def build(job: Job) -> TrainStep:
    """The step of a job, on tensors without contents."""
    ops = job.ops
    if job.loss_chunk:
        loss = functools.partial(ops.linear_cross_entropy, chunk_rows=job.loss_chunk)
        ops = dataclasses.replace(ops, linear_cross_entropy=loss)
    with torch.device(job.on):
        precision = Precision(job.dtype, job.stream)
        model = GPT(job.shape, ops, precision=precision, attention=job.attention, recompute=job.recompute)
    optimizer = FlatAdamW(model, ops, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.1, several=job.several)
    scaler = LossScale(torch.device(job.on), enabled=job.dtype == torch.float16)
    return TrainStep(model, optimizer, grad_clip=1.0, accumulation=job.accumulation, scaler=scaler)


def _memory(job: Job, step: TrainStep, state: int, peaks: list[Counter[str]]) -> dict[str, int]:
    """Bytes by their use, at the step's peak. CUDA graphs change nothing: they share one pool. state: bytes that are
    alive before a micro-step. peaks: of the step's parts."""
    flat = step.optimizer.flat
    weights, copies, gradients, partials = (
        0 if buffer is None else buffer.nbytes for buffer in (flat.param, flat.compute, flat.grad, flat.partials)
    )
    parts = {"weights": weights, "copies": copies, "moments": 2 * weights, "gradients": gradients + partials}
    # two steps' tokens and targets, and small tensors
    data = 2 * 16 * job.accumulation * job.batch_size * job.shape.block_size + max(0, state - sum(parts.values()))
    if job.shards > 1:
        parts = _shard(job, flat.param.numel())
    most = max(peaks, key=Counter.total)
    beyond = {name: most[name] for name in ("activations", "logits", "workspace")}
    loading = weights * (2 if job.resumed and job.on != "cpu" else 1) // job.shards  # copies, until all is in place
    beyond["workspace"] += max(0, loading - sum(beyond.values()))
    beyond["workspace"] += 0 if job.on == "cpu" else WORKSPACES
    return parts | beyond | {"data": data}


def _shard(job: Job, n: int) -> dict[str, int]:
    """Bytes of the state of one of several ranks that share n parameters (`train/shard.py`). FSDP2 keeps it, and no dry
    run sees it: the rank's share in float32; in the compute dtype, the whole embeddings and two whole blocks, one of
    them on its way; for a moment the largest gradient in float32."""
    c = job.shape
    embeddings = (c.vocab_size + c.block_size) * c.n_embd
    block = (n - embeddings) // c.n_layer
    share = -(-4 * n // job.shards)
    whole = job.dtype.itemsize * (embeddings + min(2, c.n_layer) * block)
    return {"weights": share, "copies": whole, "moments": 2 * share, "gradients": share + 4 * max(embeddings, block)}
