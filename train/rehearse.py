"""`python -m train ... --rehearse=CARD`: all that a run would do before its first step, for a GPU that is not there.

The settings, the data and the output folder are checked as for a run. The step runs on shapes (`train/dryrun.py`),
which shows its launches, bytes and memory. Triton compiles the step's kernels for the card; this needs no GPU. The
effect of torch.compile is not counted, because Inductor needs the device. Nothing is trained, and nothing is written
except Triton's own cache. The exit status is 0 if the run would start. Else it is 2, and the last line names the
setting to change.
"""

import os
from collections import Counter
from collections.abc import Iterator

import torch

from kernels import REFERENCE, Ops, select, too_wide
from model.work import ATTAINED, POOR, Shares, Work, duration, flops_per_token, mfu, num_params
from train.choices import has_fused_matmul
from train.config import TrainConfig
from train.corpora import CORPORA, dataset_folder, docs_text, how_to_make
from train.data import Dataset
from train.distributed import World
from train.dryrun import Call, DryRun, Job, dry_run
from train.errors import UserError
from train.hardware import DTYPES, Card, card, data_sheet
from train.log import check_sinks
from train.memory import amount, check_memory, job_of, rows_at_a_time
from train.plan import check_data, check_together, model_shape
from train.text import GPT2_TOKENS, padded_vocab_size

# What good and poor kernels reach, and seconds between two launches: of a graph, and of the host. Estimates from
# published figures.
GOOD, BAD = (ATTAINED, 1e-6, 8e-6), (POOR, 3e-6, 25e-6)


def rehearse(config: TrainConfig, named: set[str], why: str, checkpoint: dict | None, world: World) -> Iterator[str]:
    """What the run would do on the card `config.rehearse`, line by line. UserError if it would not run.

    named, why, checkpoint: as for `decide`. world: the ranks that the run would have.
    """
    target = card(config.rehearse)
    dtype = torch.bfloat16 if config.dtype == "auto" else DTYPES[config.dtype]
    check_together(config, world, "cuda", dtype)
    yield f"rehearsal on {target.name} x {world.size}: nothing is trained, nothing is written"
    yield f"settings: {why}"
    check_sinks(config)
    dataset, vocab_size, line = _data(config)
    yield line
    shape = model_shape(config, named, checkpoint, vocab_size, download=False)
    if dataset is not None:
        check_data(config, dataset, shape, checkpoint)
    ops, without = _ops(config.kernels, shape.n_embd)
    chunk = 0  # without Triton the reference is counted: it holds all logits
    if ops.name == "fused" or config.kernels == "reference":
        chunk = rows_at_a_time(config, ops, dtype, shape.vocab_size, shape.block_size, target.memory)
    resumed = checkpoint is not None
    job = job_of(config, world, shape, ops, dtype, loss_chunk=chunk, resumed=resumed, card=target)
    tokens = config.gradient_accumulation_steps * config.batch_size * shape.block_size
    yield f"number of parameters: {num_params(shape) / 1e6:.2f}M; tokens per iteration: {tokens:,}"
    yield check_memory(job, target.name, target.memory, world.size)
    measured = ["attention"] * (config.attention == "auto")
    measured += ["the MLP's matmuls"] * has_fused_matmul(ops, shape.n_embd, dtype)
    if measured:
        yield f"measured on the card when the run starts: {', '.join(measured)}; counted here: torch's own and cuBLAS"
    run = dry_run(job)
    yield from _launches(run, job)
    yield from _times(run, job, config, target, world)
    yield from [f"kernels: not compiled: {without}"] if without else compiled(run, target.capability)
    yield f"it would run: {amount(target.memory - run.total)} of memory would be left"


def _data(config: TrainConfig) -> tuple[Dataset | None, int, str]:
    """(the dataset, None if it is not prepared; a new model's vocabulary size, without a dataset an assumption; a line
    about them)."""
    folder = dataset_folder(config.dataset)
    if os.path.isfile(folder / "train.bin"):
        dataset = Dataset(folder)
        size = f"{len(dataset.train):,} tokens to train on, a vocabulary of {dataset.vocab_size:,}"
        return dataset, dataset.vocab_size, f"data: {folder}, {size}"
    how = f"{how_to_make(folder)} makes it"
    if config.dataset == "docs":
        size, how = len(set(docs_text())), "the run makes it"
    elif config.dataset in CORPORA and CORPORA[config.dataset].tokenizer == "char":
        size = 65
    else:
        size = padded_vocab_size(GPT2_TOKENS)
    return None, size, f"data: {folder} is not prepared yet: {how}; its vocabulary is taken to be {size:,}"


def _ops(kernels: str, width: int) -> tuple[Ops, str]:
    """The kernels that the run would use, and why they cannot be compiled here, "" if they can. UserError for fused
    ones that cannot compute a model of this width."""
    if kernels == "reference":
        return REFERENCE, "the reference has none of its own"
    try:
        from kernels.launch import INTERPRETED
    except ImportError as error:
        return REFERENCE, f"Triton is not installed here ({error}); what follows is counted with the reference kernels"
    reason = too_wide(width)
    try:
        ops = select(kernels, torch.device("cuda"), lambda device: reason)
    except ValueError as error:
        raise UserError(f"kernels: {error}") from None
    if reason:
        return ops, f"the run would take the reference's, without a kernel of its own: {reason}"
    return ops, "TRITON_INTERPRET is set, the interpreter takes the compiler's place" if INTERPRETED else ""


def _launches(run: DryRun, job: Job) -> Iterator[str]:
    yield f"launches: {len(run.micro_step)} a micro-step, {len(run.update)} an update"
    small = sum(call.bytes < 2e6 for call in run.micro_step)
    step = job.accumulation * _bytes(run.micro_step) + _bytes(run.update)
    without = "torch.compile" if job.shards == 1 else "torch.compile, FSDP's copies and torch's AdamW"
    yield (
        f"bytes: {amount(_bytes(run.micro_step))} a micro-step, {amount(_bytes(run.update))} an update, {amount(step)} "
        f"a step; {small} launches of a micro-step move less than 2 MB; counted without {without}"
    )


def _bytes(calls: list[Call]) -> int:
    return sum(call.bytes for call in calls)


def _times(run: DryRun, job: Job, config: TrainConfig, target: Card, world: World) -> Iterator[str]:
    """The least time of a step and the expected time, if the card's data sheet is known."""
    sheet = data_sheet(target.name)
    if sheet is None:
        yield f"time: no data sheet of {target.name} is known here"
        return
    peak = sheet.peak(job.dtype)
    rates, of = (peak.flops, sheet.bandwidth * 1e9), config.peak_flops or peak.flops  # `of`: what MFU is a share of
    tokens = job.accumulation * job.batch_size * job.shape.block_size
    flops = flops_per_token(job.shape, config.mfu_formula) * tokens
    least = duration(job.work(fused_gelu=True).items(), *rates)  # as the fused matmul can, which a run may choose
    graphed = config.cuda_graphs and job.shards == 1
    best, worst = (expected(run, job, rates, graphed, *assumed) for assumed in (GOOD, BAD))
    as_set = f"; mfu is of {of / 1e12:.4g} TFLOP/s, as set" if config.peak_flops else ""
    yield f"peak: {rates[0] / 1e12:.4g} TFLOP/s, {sheet.bandwidth:,} GB/s: {peak.source}{as_set}"
    yield f"floor: {1e3 * least:.2f} ms/iter, mfu {mfu(flops, least, of):.1%}: every part at the card's peaks"
    low, high = (f"{1e3 * seconds:.4g}" if seconds < 1 else f"{1e3 * seconds:,.0f}" for seconds in (best, worst))
    yield (
        f"expected: {low} to {high} ms/iter, mfu {mfu(flops, worst, of):.0%} to "
        f"{mfu(flops, best, of):.0%}, {tokens * world.size / worst:,.0f} to {tokens * world.size / best:,.0f} "
        "tokens/s: an estimate, nothing was measured" + (", communication not counted" if world.size > 1 else "")
    )


def expected(
    run: DryRun, job: Job, rates: tuple[float, float], graphed: bool, shares: Shares, in_graph: float, by_host: float
) -> float:
    """Seconds of a step, an estimate. rates: the card's FLOP/s and bytes/s. in_graph, by_host: seconds of each launch
    that a graph adds, and that the host takes."""

    def part(calls: list[Call]) -> float:
        busy = duration(((call.name, Work(call.flops, call.bytes)) for call in calls), *rates, shares)
        busy += len(calls) * in_graph
        return busy if graphed else max(busy, len(calls) * by_host)

    return job.accumulation * part(run.micro_step) + part(run.update)


def compiled(run: DryRun, capability: int) -> Iterator[str]:
    """A line for each kernel of the step, compiled by Triton for the card. UserError if one cannot run there."""
    import triton

    from kernels.launch import specialised
    from kernels.targets import compile_launch

    launches = {specialised(launch): launch for launch in run.launches}
    counts = Counter(map(specialised, run.launches))
    yield f"kernels: {len(launches)}, compiled for sm_{capability} by Triton {triton.__version__}"
    for key, launch in launches.items():
        name = launch.kernel.fn.__name__
        try:
            it = compile_launch(launch, capability)
            wrong = "" if it.resident_warps else "it does not fit a multiprocessor"
        except Exception as error:  # the compiler raises many types
            wrong = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if wrong:
            raise UserError(f"kernels: {name} does not run on sm_{capability}: {wrong}; --kernels=reference runs")
        yield (
            f"  {name:<34} x{counts[key]:<3} {it.registers:3} registers, {it.spills} spills, {it.shared:6} B shared, "
            f"{it.resident_warps:2} warps at once"
        )
