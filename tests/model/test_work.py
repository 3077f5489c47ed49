"""The least that a step must do: against the floor table that the project's targets were set by, and by hand."""

import pytest

from model.config import GPTConfig
from model.flops import flops_per_token
from model.work import MATMULS, Work, floor, step_work

GPT2 = GPTConfig(vocab_size=50304, bias=False)
H100 = 800e12, 3.0e12  # what the table reckons with, FLOP/s and bytes/s
TABLE = step_work(GPT2, 32, compute=2, stream=2, gradients=2, fused_gelu=True)  # its case: all in bfloat16

TERAFLOPS = {
    "qkv": 4.17,
    "attention projection": 1.39,
    "mlp up": 5.57,
    "mlp down": 5.57,
    "head": 7.60,
    "attention forward": 0.62,
    "attention backward": 1.55,
}
# Ours are 2 % less in the LayerNorms: the first has no addition.
GIGABYTES = {
    ("LayerNorm forward",): 5.0,
    ("LayerNorm backward",): 5.0,
    ("GELU forward", "GELU backward"): 4.8,
    ("cross-entropy",): 6.6,
    ("optimizer", "clearing"): 4.0,
}


def milliseconds(parts: tuple[str, ...]) -> float:
    return 1e3 * sum(floor(TABLE[part], *H100) for part in parts)


@pytest.mark.parametrize(("part", "teraflops"), TERAFLOPS.items())
def test_the_tables_flops(part: str, teraflops: float) -> None:
    assert TABLE[part].flops / 1e12 == pytest.approx(teraflops, abs=0.005)


@pytest.mark.parametrize(("parts", "gigabytes"), GIGABYTES.items())
def test_the_tables_bytes(parts: tuple[str, ...], gigabytes: float) -> None:
    assert sum(TABLE[part].bytes for part in parts) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_the_total_differs_by_attention_and_embeddings_alone() -> None:
    """The table's attention takes 2.1 + 4.3 ms: what the best kernels reach at heads of 64, 300 to 360 TFLOP/s, where
    the bound is by FLOPs at the peak, or by bytes. Its embeddings move 0.5 GB in 0.2 ms: they read the gradient twice
    and add that of the tied head, which a step need not."""
    attention = milliseconds(("attention forward", "attention backward"))
    embeddings = milliseconds(("embedding forward", "embedding backward"))
    assert attention == pytest.approx(0.81 + 1.93, abs=0.01)
    assert embeddings == pytest.approx(0.06, abs=0.005)
    total = milliseconds(tuple(TABLE))
    assert total == pytest.approx(41.7, abs=0.1)
    assert total - attention - embeddings + (2.1 + 4.3) + 0.2 == pytest.approx(45.5, abs=0.2)


def test_matmuls_and_full_attention_are_nanogpts_convention() -> None:
    """It counts every score, and every parameter: LayerNorms' too, 0.02 %. Backward it takes for twice forward."""
    tokens = 32 * 1024
    matmuls = sum(TABLE[name].flops for name in MATMULS)
    full = 2 * 3 * TABLE["attention forward"].flops
    assert matmuls + full == pytest.approx(flops_per_token(GPT2) * tokens, rel=5e-4)


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
        "cross-entropy": Work(bytes=2 * 2 * M * V + 16 * M),
        "embedding forward": Work(bytes=8 * M + 4 * C * 2 + M * C * 4),
        "embedding backward": Work(bytes=M * C * 4 + (V + 4) * C * 2),
        "accumulation": Work(),
        "optimizer": Work(bytes=n * (4 + 4 + 24 + 2) + 20),
        "clearing": Work(bytes=4 * n),
    }


def test_accumulation_repeats_all_but_the_update() -> None:
    once, thrice = (step_work(GPT2, 2, accumulation=times, gradients=4) for times in (1, 3))
    n = once["clearing"].bytes // 4
    for part, work in thrice.items():
        if part == "accumulation":
            assert work == Work(bytes=2 * n * (2 + 4 + 4))
        else:
            assert work == once[part] * (1 if part in ("optimizer", "clearing") else 3)


def test_shards_share_the_update_alone() -> None:
    whole, share = (step_work(GPT2, 2, accumulation=2, gradients=4, shards=shards) for shards in (1, 4))
    for part, work in share.items():
        shared = part in ("accumulation", "optimizer", "clearing")
        assert work.bytes == pytest.approx(whole[part].bytes / (4 if shared else 1), rel=1e-6), part


def test_the_floor_is_the_slower_of_two() -> None:
    assert floor(Work(100, 10), 50.0, 10.0) == 2.0
    assert floor(Work(100, 50), 50.0, 10.0) == 5.0
    assert floor(Work(), 50.0, 10.0) == 0.0
