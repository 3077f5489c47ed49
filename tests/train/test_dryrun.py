"""A step on shapes, compared with the real step: memory and launches."""

from collections import Counter

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.launch import INTERPRETED
from model import GPTConfig
from model.recompute import MODES
from tests.model.held import allocated
from train.data import Batch
from train.dryrun import DryRun, Job, build, dry_run

BFLOAT16 = torch.bfloat16
GPT2 = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=False, dropout=0.0)
on_a_cpu = pytest.mark.skipif(not INTERPRETED, reason="a GPU's memory is measured in tests/train/test_gpu.py")


def peak(job: Job) -> int:
    """Peak bytes of the CPU's allocator during a real step of the job, without its state."""
    torch.manual_seed(0)
    step = build(job)
    with torch.no_grad():
        for p in step.model.parameters():
            p.normal_(std=0.02)
    step.optimizer.flat.sync()
    x = torch.randint(job.shape.vocab_size, (1, job.batch_size, job.shape.block_size))
    batch = Batch(x, x.clone(), (5,))
    step(batch, 1e-3)
    return allocated(lambda: step(batch, 1e-3))


def scratch(job: Job) -> int:
    """The most bytes that this CPU takes for a moment inside a product of the MLP, unseen by a recorder."""
    M, C = job.batch_size * job.shape.block_size, job.shape.n_embd
    x, weight, y = (torch.ones(size, dtype=job.dtype) for size in ((M, C), (4 * C, C), (M, 4 * C)))
    products = (lambda: x @ weight.t()), (lambda: y @ weight), (lambda: y.t() @ x)
    return max(allocated(product) - product().nbytes for product in products)


def beyond_state(run: DryRun) -> int:
    return sum(run.memory[name] for name in ("activations", "logits", "workspace"))


@on_a_cpu
@pytest.mark.parametrize(
    ("ops", "dtype", "vocab_size", "dropout"),  # 512: the peak is in the head; 64: in the last block
    [
        (REFERENCE, torch.float32, 512, 0.0),
        (REFERENCE, BFLOAT16, 64, 0.2),
        pytest.param(FUSED, torch.float32, 64, 0.2, marks=pytest.mark.slow),  # the interpreter is slow
    ],
)
@pytest.mark.parametrize("recompute", MODES)
def test_what_a_step_holds(recompute: str, ops: Ops, dtype: torch.dtype, vocab_size: int, dropout: float) -> None:
    shape = GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=2, n_head=4, n_embd=64, bias=False, dropout=dropout)
    job = Job(shape, 4, ops, dtype=dtype, recompute=recompute, on="cpu")
    held = peak(job)
    unseen = held - beyond_state(dry_run(job))
    if ops is FUSED:  # Triton's interpreter copies its arguments
        assert abs(unseen) < 0.04 * held
    else:
        assert -8192 <= unseen <= 8192 + scratch(job)


@on_a_cpu
def test_the_state() -> None:
    """Bytes a parameter: weight 4, copy 2, moments 8, gradient 2, or 4 if several are summed. All widths are multiples
    of 64, so there is no padding."""
    shape = GPTConfig(block_size=64, vocab_size=512, n_layer=3, n_head=4, n_embd=64, bias=False, dropout=0.0)
    n = 512 * 64 + 64 * 64 + 3 * (12 * 64 * 64 + 2 * 64) + 64
    once, summed = (dry_run(Job(shape, 1, REFERENCE, several=several, on="cpu")).memory for several in (False, True))
    assert [once[name] for name in ("weights", "copies", "moments", "gradients")] == [4 * n, 2 * n, 8 * n, 2 * n]
    assert summed["gradients"] == 4 * n


def test_gpt2_on_a_gpu_by_hand() -> None:
    """Kept per block and token: 32 bytes per channel (16 of 2), 16 of statistics, 4 per head."""
    M, C = 32 * 1024, 768
    kept = 12 * (32 * M * C + 16 * M + 4 * M * 12) + (2 + 2) * M * C + 8 * M
    run = dry_run(Job(GPT2, 32, FUSED))
    assert run.memory["logits"] == 2 * M * 50304
    assert run.memory["activations"] == pytest.approx(kept, rel=1e-3)
    assert run.memory["workspace"] == pytest.approx(2 * M * C + 2 * 2**25, rel=1e-3)


def test_a_shard_holds_its_share_of_the_state() -> None:
    whole, share = (dry_run(Job(GPT2, 4, FUSED, shards=shards)).memory for shards in (1, 8))
    assert share["moments"] == pytest.approx(whole["moments"] / 8, rel=1e-4)
    assert share["activations"] == whole["activations"]


def test_a_dry_run_draws_no_random_numbers_and_takes_no_memory() -> None:
    before = torch.get_rng_state()
    assert dry_run(Job(GPT2, 512, FUSED)).total > 100e9
    assert torch.equal(torch.get_rng_state(), before)


def test_every_matmul_is_seen() -> None:
    """6 FLOPs per weight and token, except for embeddings that are looked up. Attention counts its causal half."""
    M, C, L, V, T = 32 * 1024, 768, 12, 50304, 1024
    linear = 6 * M * (12 * C * C * L + V * C)
    run = dry_run(Job(GPT2, 32, FUSED))
    assert sum(call.flops for call in run.micro_step) == linear + 7 * M * T * C * L
    names = Counter(call.name for call in run.micro_step)
    assert names["mm"] == 3 * (4 * L + 1)
    assert names["triton:gelu_fwd_kernel"] == L


def test_chunks_hold_fewer_logits_and_launch_more() -> None:
    whole, chunked = dry_run(Job(GPT2, 8, FUSED)), dry_run(Job(GPT2, 8, FUSED, loss_chunk=1024))
    assert chunked.memory["logits"] == whole.memory["logits"] // 8
    assert len(chunked.micro_step) > len(whole.micro_step)
