"""Parameters and FLOPs, as published and as the model has them. The least that a step must do, by hand."""

import pytest

from model import GPT, GPT2_SIZES, GPTConfig
from model.work import Shares, Work, duration, floor, flops_per_token, mfu, num_params, step_work

SHAKESPEARE = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
GPT2 = GPTConfig(vocab_size=50304, bias=False)


def test_the_model_has_as_many_parameters_and_published_sizes_too() -> None:
    for bias in (True, False):
        config = GPTConfig(block_size=5, vocab_size=7, n_layer=2, n_head=1, n_embd=3, bias=bias)
        assert num_params(config, non_embedding=False) == sum(p.numel() for p in GPT(config).parameters())
        assert GPT(config).get_num_params() == num_params(config, non_embedding=False) - 5 * 3
    millions = {"gpt2": 124.44, "gpt2-medium": 354.82, "gpt2-large": 774.03, "gpt2-xl": 1557.61}
    for name, size in GPT2_SIZES.items():
        n = num_params(GPTConfig(vocab_size=50257, **size), non_embedding=False)
        assert n == pytest.approx(millions[name] * 1e6, abs=5e3), name


def test_nanogpts_own_figures() -> None:
    assert num_params(SHAKESPEARE) == 10_646_784  # "10.65M"
    assert num_params(GPT2) == pytest.approx(123.59e6, abs=5e3)
    assert flops_per_token(GPT2) == pytest.approx(854.8e6, rel=1e-4)
    assert flops_per_token(SHAKESPEARE) * 64 * 256 == pytest.approx(1.16e12, rel=5e-3)
    assert mfu(1.16e12, 33.22e-3, 312e12) == pytest.approx(0.112, abs=1e-3)  # as nanoGPT's log line says
    assert flops_per_token(GPT2, "6n") == 6 * num_params(GPT2)  # without attention
    assert flops_per_token(GPT2) - flops_per_token(GPT2, "6n") == 12 * 12 * 12 * 64 * 1024


def test_every_part_by_hand() -> None:
    config = GPTConfig(block_size=4, vocab_size=5, n_layer=2, n_head=2, n_embd=6, bias=True)
    work = step_work(config, 3, compute=2, stream=4, gradients=4)
    M, C, V = 12, 6, 5
    n = V * C + 4 * C + 2 * (12 * C * C + 13 * C) + 2 * C
    assert work == {
        "qkv": Work(2 * 3 * 2 * M * C * 18, 2 * 3 * 2 * (M * C + C * 18 + M * 18)),
        "attention projection": Work(2 * 3 * 2 * M * C * C, 2 * 3 * 2 * (M * C + C * C + M * C)),
        "mlp up": Work(2 * 3 * 2 * M * C * 24, 2 * 3 * 2 * (M * C + C * 24 + M * 24)),
        "mlp down": Work(2 * 3 * 2 * M * C * 24, 2 * 3 * 2 * (M * C + C * 24 + M * 24)),
        "head": Work(3 * 2 * M * C * V, 3 * 2 * (M * C + C * V + M * V)),
        # of 4 x 4 scores, half; two products of them forward, five backward
        "attention forward": Work(2 * 2 * 2 * M * C * 2, 2 * (4 * M * C * 2 + 4 * M * 2)),
        "attention backward": Work(2 * 5 * 2 * M * C * 2, 2 * (8 * M * C * 2 + 4 * M * 2)),
        "LayerNorm forward": Work(bytes=5 * (8 * M + 8 * C) + M * C * (4 + 2) + 4 * M * C * (2 + 4 + 4 + 2)),
        "LayerNorm backward": Work(bytes=5 * (8 * M + 12 * C) + M * C * (2 + 4 + 4) + 4 * M * C * (2 + 4 + 4 + 4 + 2)),
        "GELU forward": Work(bytes=2 * 2 * 2 * M * 24),
        "GELU backward": Work(bytes=2 * 3 * 2 * M * 24),
        "cross-entropy": Work(bytes=2 * 2 * M * V + 12 * M),
        "embedding forward": Work(bytes=8 * M + 4 * C * 2 + M * C * 4),
        "embedding backward": Work(bytes=M * C * 4 + 4 * C * 2),  # the tied table's gradient is the head's
        "accumulation": Work(bytes=n * (4 - 2)),
        "optimizer": Work(bytes=n * (4 + 4 + 24 + 2) + 20),
    }
    fused = step_work(config, 3, compute=2, stream=4, gradients=4, fused_gelu=True)
    assert fused == work | {name: Work(bytes=2 * 2 * M * 24) for name in ("GELU forward", "GELU backward")}


def test_accumulation_repeats_all_but_the_update_which_alone_is_shared_out() -> None:
    once, thrice, share = (
        step_work(GPT2, 2, accumulation=times, gradients=4, shards=shards) for times, shards in ((1, 1), (3, 1), (3, 4))
    )
    n = once["accumulation"].bytes // (4 - 2)
    assert thrice.pop("accumulation") == Work(bytes=n * (2 * (4 + 4 - 2) + 4 - 2))
    for part, work in thrice.items():
        assert work == once[part] * (1 if part == "optimizer" else 3)
        assert share[part].bytes == pytest.approx(work.bytes / (4 if part == "optimizer" else 1), rel=1e-6), part
    assert share["accumulation"].bytes == pytest.approx(n * 14 / 4, rel=1e-6)


def test_time_is_that_of_the_slower_of_two_by_kernels_that_reach_a_share_of_the_rates() -> None:
    assert floor(Work(100, 10), 50.0, 10.0) == 2.0
    assert floor(Work(100, 50), 50.0, 10.0) == 5.0
    shares, matmul, copy = Shares(matmul=0.5, attention=0.25, bandwidth=0.2), Work(100, 1), Work(0, 50)
    assert duration([("qkv", matmul), ("x", copy)], 50.0, 10.0) == 2.0 + 5.0
    assert duration([("qkv", matmul), ("x", copy)], 50.0, 10.0, shares) == 4.0 + 25.0
    assert duration([("attention projection", matmul)], 50.0, 10.0, shares) == 4.0
    assert duration([("_scaled_dot_product_cudnn_attention", matmul)], 50.0, 10.0, shares) == 8.0
