"""A step on shapes, compared with the real step: memory and launches."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from kernels import FUSED, REFERENCE, Ops
from kernels.launch import INTERPRETED
from model import GPTConfig
from model.recompute import MODES
from tests.model.held import allocated
from train.data import Batch
from train.dryrun import DryRun, Job, build, dry_run

# GPT-2's widths, in three blocks
LARGE = Job(GPTConfig(1024, 50304, n_layer=3, n_head=12, n_embd=768, bias=False, dropout=0.0), 512, FUSED)
M, C, H, L, V, T = 512 * 1024, 768, 12, 3, 50304, 1024
on_a_cpu = pytest.mark.skipif(not INTERPRETED, reason="a GPU's memory is measured in tests/train/test_gpu.py")


def peak(job: Job) -> int:
    """Peak bytes of the CPU's allocator during a real step of the job, without its state."""
    torch.manual_seed(0)
    step = build(job)
    with torch.no_grad():
        for p in step.model.parameters():
            p.normal_(std=0.02)
    if step.optimizer.flat.compute is not None:
        step.optimizer.flat.compute.copy_(step.optimizer.flat.param)
    x = torch.randint(job.shape.vocab_size, (1, job.batch_size, job.shape.block_size))
    batch = Batch(x, x.clone(), (5,))
    step(batch, 1e-3)
    return allocated(lambda: step(batch, 1e-3))


def scratch(job: Job) -> int:
    """The most bytes that this CPU takes for a moment inside a product of the MLP, unseen by a recorder."""
    rows, width = job.batch_size * job.shape.block_size, job.shape.n_embd
    sizes = (rows, width), (4 * width, width), (rows, 4 * width)
    x, weight, y = (torch.ones(size, dtype=job.dtype) for size in sizes)
    products = (lambda: x @ weight.t()), (lambda: y @ weight), (lambda: y.t() @ x)
    return max(allocated(product) - product().nbytes for product in products)


def beyond_state(run: DryRun) -> int:
    return sum(run.memory[name] for name in ("activations", "logits", "workspace"))


@on_a_cpu
@pytest.mark.parametrize(
    ("ops", "dtype", "vocab_size", "dropout", "recompute"),  # 512: the peak is in the head; 64: in the last block
    [
        (REFERENCE, torch.float32, 512, 0.0, "none"),
        *((REFERENCE, torch.bfloat16, 64, 0.2, mode) for mode in MODES),
        *(pytest.param(FUSED, torch.float32, 64, 0.2, mode, marks=pytest.mark.slow) for mode in MODES),  # interpreted
    ],
)
def test_what_a_step_holds(ops: Ops, dtype: torch.dtype, vocab_size: int, dropout: float, recompute: str) -> None:
    shape = GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=2, n_head=4, n_embd=64, bias=False, dropout=dropout)
    job = Job(shape, 4, ops, dtype=dtype, recompute=recompute, on="cpu")
    held = peak(job)
    unseen = held - beyond_state(dry_run(job))
    if ops is FUSED:  # Triton's interpreter copies its arguments
        assert abs(unseen) < 0.04 * held
    else:
        assert -8192 <= unseen <= 8192 + scratch(job)


@pytest.fixture(scope="module")
def large() -> DryRun:
    return dry_run(LARGE)


def test_memory_on_a_gpu_by_hand(large: DryRun) -> None:
    """Bytes a parameter: weight 4, copy 2, moments 8; 2 more for the gradient if several are summed. Kept per block and
    token: 32 bytes per channel (16 of 2), 16 of statistics, 4 per head."""
    n = (V + T + 12 * C * L + 2 * L + 1) * C
    assert [large.memory[name] for name in ("weights", "copies", "moments")] == [4 * n, 2 * n, 8 * n]
    assert dry_run(replace(LARGE, several=True)).memory["gradients"] - large.memory["gradients"] == 2 * n
    assert large.memory["data"] == pytest.approx(48 * M, rel=1e-3)  # tokens and targets of three micro-steps
    kept = L * (32 * M * C + 16 * M + 4 * M * H) + (2 + 2) * M * C + 8 * M
    assert large.memory["logits"] == 2 * M * V
    assert large.memory["activations"] == pytest.approx(kept, rel=1e-3)
    assert large.memory["workspace"] == pytest.approx(2 * M * C + 2 * 2**25, rel=1e-3)


def test_every_matmul_is_seen(large: DryRun) -> None:
    """6 FLOPs per weight and token, except for embeddings that are looked up. Attention counts its causal half."""
    linear = 6 * M * (12 * C * C * L + V * C)
    assert sum(call.flops for call in large.micro_step) == linear + 7 * M * T * C * L
    names = Counter(call.name for call in large.micro_step)
    assert names["mm"] == 3 * (4 * L + 1)
    assert names["triton:gelu_fwd_kernel"] == L


def test_shards_hold_less_state_and_chunks_fewer_logits(large: DryRun) -> None:
    """Chunks launch more. No random number is drawn."""
    share = dry_run(replace(LARGE, shards=8)).memory
    assert share["moments"] == pytest.approx(large.memory["moments"] / 8, rel=1e-4)
    assert share["activations"] == large.memory["activations"]
    before = torch.get_rng_state()
    chunked = dry_run(replace(LARGE, loss_chunk=M // 8))
    assert chunked.memory["logits"] == large.memory["logits"] // 8
    assert len(chunked.micro_step) > len(large.micro_step)
    assert torch.equal(torch.get_rng_state(), before)
