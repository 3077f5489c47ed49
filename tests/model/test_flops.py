"""Parameter and FLOP counts against published figures and the model itself."""

import pytest

from model.config import GPT2_SIZES, GPTConfig
from model.gpt import GPT
from model.work import flops_per_token, mfu, num_params

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
