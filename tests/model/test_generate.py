"""Sampling: the cache changes the cost and nothing else; draws follow their definition."""

import math

import pytest
import torch

from model import GPT
from model.generate import generate, probabilities, sample
from tests.model.small import make


def make_model(**shape) -> GPT:
    """Not as training starts: the likeliest token varies."""
    return make(**{"vocab_size": 33, "n_head": 2, "n_embd": 16, "std": 0.5} | shape).eval()


def drawn(*args, **options) -> torch.Tensor:
    """All that `generate` yields, (B, N)."""
    return torch.stack(list(generate(*args, **options)), dim=1)


def count_rows(model: GPT) -> list[int]:
    """A list that grows by the number of tokens of each forward pass."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(args[0].size(1)))
    return rows


@pytest.mark.parametrize(
    ("block_size", "prompt", "rows"),
    [
        pytest.param(16, 1, [1] * 15, id="each token once"),
        pytest.param(8, 5, [5, 1, 1, 1, 8, 8], id="filled, then sliding"),
        pytest.param(8, 11, [8, 8], id="more than fits"),
    ],
)
def test_greedy_is_what_recomputing_everything_gives(block_size: int, prompt: int, rows: list[int]) -> None:
    model, idx, new = make_model(block_size=block_size), torch.arange(3 * prompt).view(3, -1), len(rows)
    expected = idx
    for _ in range(new):
        logits, _ = model(expected[:, -block_size:])
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    counted = count_rows(model)
    assert torch.equal(drawn(model, idx, new, 0), expected[:, prompt:])
    assert counted == rows
    if new > 6:  # otherwise a wrong position would look like a right one
        assert all(row.unique().numel() > 4 for row in expected)


def test_compiled_for_any_length_it_is_one_graph() -> None:
    model, idx = make_model(block_size=8), torch.arange(3)[None]
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")  # raises where a graph would break
    assert torch.equal(drawn(compiled, idx, 8, 0), drawn(model, idx, 8, 0))


def test_tokens_stream_and_the_caller_keeps_its_modes() -> None:
    """A token costs one pass, and is the caller's own. Dropout is off meanwhile; gradients stay on outside."""
    model, idx = make_model(dropout=0.5), torch.zeros(2, 3, dtype=torch.int64)
    expected = drawn(model, idx, 5, 0)
    assert not model.training
    rows = count_rows(model)
    model.train()
    tokens = generate(model, idx, 5, 0)
    assert rows == []
    first = next(tokens)
    assert len(rows) == 1
    assert torch.is_grad_enabled()
    assert torch.equal(first, expected[:, 0])
    first.fill_(-1)
    assert torch.equal(next(tokens), expected[:, 1])
    tokens.close()
    assert model.training


def test_probabilities_follow_the_definition():
    logits = torch.tensor([[0.1, 0.4, 0.1, 0.3, 0.1]]).log()
    for options, expected in (
        ({}, [0.1, 0.4, 0.1, 0.3, 0.1]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.01, 0.09, 0.01]),
        ({"top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"top_k": 3}, [0.1, 0.4, 0.1, 0.3, 0.1]),  # tokens as likely as the third stay too, as in nanoGPT
        ({"top_k": 99}, [0.1, 0.4, 0.1, 0.3, 0.1]),
        ({"top_p": 1e-30}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.5}, [0, 0.4, 0, 0.3, 0]),
        ({"top_p": 0.75}, [0.1, 0.4, 0, 0.3, 0]),
        ({"top_k": 2, "top_p": 0.55}, [0, 1, 0, 0, 0]),  # of the two, the first has 4/7
        ({"temperature": 1e-37, "top_p": 0.9}, [0, 1, 0, 0, 0]),
    ):
        result = probabilities(logits, **{"temperature": 1.0} | options)
        expected = torch.tensor([expected]) / sum(expected)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)


def test_draws_are_as_frequent_as_their_probabilities():
    n = 20_000
    probs = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01, 0.0])
    tokens = sample(probs.expand(n, -1), torch.Generator().manual_seed(0))
    counts = tokens.bincount(minlength=6)
    sigma = (n * probs * (1 - probs)).sqrt()
    assert ((counts - n * probs).abs() <= 4 * sigma).all(), counts

    class Zero(torch.Tensor):  # a clock that reads 0, as float32 exponentials do once in a while
        def exponential_(self, *args, **options):
            return self.zero_()

    assert sample(torch.tensor([[0.0, 1.0, 0.0]]).as_subclass(Zero)).tolist() == [1]


EVERY_TOKEN = torch.arange(33)[:, None]


def test_extremes_of_the_draw():
    """Padding of the vocabulary is never drawn. With a generator, the global one is left alone."""
    model, before = make_model(), torch.get_rng_state()
    greedy = drawn(model, EVERY_TOKEN, 1, temperature=0)
    # as little as float32 cannot hold is the likeliest token
    for options in ({"temperature": 1e-46}, {"top_p": 1e-300}, {"top_k": 1}):
        options["generator"] = torch.Generator().manual_seed(1)
        assert torch.equal(drawn(model, EVERY_TOKEN, 1, **options), greedy)
    assert torch.equal(torch.get_rng_state(), before)
    for options in ({"temperature": 0}, {"top_k": 1}):  # nanoGPT's call: the prompt and what follows
        assert torch.equal(model.generate(EVERY_TOKEN, 1, **options), torch.cat([EVERY_TOKEN, greedy], dim=1))
    for temperature in (0, 5.0):
        assert drawn(model, EVERY_TOKEN, 4, temperature, n_vocab=5).max() <= 4
        assert model.generate(EVERY_TOKEN, 4, temperature)[:, 1:].max() > 4


def test_bad_values_are_named_at_the_call():
    for options, message in (
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"n_vocab": 34}, r"n_vocab: got 34, expected 1 to vocab_size \(33\)"),
        ({"idx": EVERY_TOKEN[:, :0]}, r"idx: got shape \(33, 0\)"),
        ({"idx": EVERY_TOKEN[:, 0]}, r"idx: got shape \(33,\)"),
        ({"idx": EVERY_TOKEN.float()}, "idx: .*float32"),
        ({"idx": EVERY_TOKEN + 1}, "idx: got ids from 1 to 33, expected 0 to 32"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(**{"model": make_model(), "idx": EVERY_TOKEN, "max_new_tokens": 1} | options)
