"""Sampling: the cache changes the cost and nothing else; draws follow their definition."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig, Precision
from model.generate import generate, probabilities, sample


def make_model(seed: int = 0, precision: Precision = Precision(), **shape) -> GPT:
    config = {"block_size": 16, "vocab_size": 33, "n_layer": 2, "n_head": 2, "n_embd": 16} | shape
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**config), precision=precision).eval()
    for name, p in model.named_parameters():  # not as training starts: the likeliest token must vary
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
        elif p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2 if "wte" in name else 1.0)
    return model


def drawn(*args, **options) -> torch.Tensor:
    """All that `generate` yields, (B, N)."""
    return torch.stack(list(generate(*args, **options)), dim=1)


def count_rows(model: GPT) -> list[int]:
    """A list that grows by the number of tokens of each forward pass."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(args[0].size(1)))
    return rows


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 9),
    block_size=st.integers(1, 12),
    n_layer=st.integers(1, 3),
    n_head=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    prompt=st.integers(1, 15),
    new=st.integers(1, 20),
)
@example(seed=0, block_size=8, n_layer=2, n_head=2, bias=True, batch=3, prompt=8, new=1)  # full from the start
@example(seed=0, block_size=8, n_layer=2, n_head=2, bias=True, batch=3, prompt=7, new=3)  # filled, then sliding
def test_greedy_is_what_recomputing_everything_gives(seed, block_size, batch, prompt, new, **shape):
    model = make_model(seed, block_size=block_size, **shape)
    idx = torch.randint(33, (batch, prompt))
    expected = idx
    for _ in range(new):
        logits, _ = model(expected[:, -block_size:])
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    for use_cache in (True, False):
        assert torch.equal(drawn(model, idx, new, 0, use_cache=use_cache), expected[:, prompt:])
    assert torch.equal(model.generate(idx, new, 0), expected)


def test_greedy_tokens_vary():
    """Otherwise the test above could not tell a wrong position from a right one."""
    tokens = drawn(make_model(), torch.arange(3)[:, None], 15, 0)
    assert all(row.unique().numel() > 4 for row in tokens)


def test_each_token_is_computed_once():
    prompt, new = 8, 512
    model = make_model(block_size=520, n_layer=1, n_embd=4)
    rows = count_rows(model)
    drawn(model, torch.zeros(1, prompt, dtype=torch.int64), new, 0)
    assert sum(rows) == prompt + new - 1
    assert rows[1:] == [1] * (new - 1)


def test_past_block_size_the_whole_window_is_recomputed():
    model = make_model(block_size=6)
    rows = count_rows(model)
    drawn(model, torch.zeros(2, 4, dtype=torch.int64), 5, 0)
    assert rows == [4, 1, 1, 6, 6]


def test_tokens_stream():
    model = make_model()
    rows = count_rows(model)
    tokens = generate(model, torch.zeros(2, 3, dtype=torch.int64), 5)
    assert rows == []
    first = next(tokens)
    assert len(rows) == 1
    assert first.shape == (2,)
    first.fill_(-1)  # the caller's own: what follows does not read it
    assert len(list(tokens)) == 4


def likeliest(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The definition, in Python floats: softmax, the k likeliest with all ties, then the nucleus."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    if top_k is not None and top_k < len(logits):
        least = sorted(logits)[-top_k]
        weights = [w if x >= least else 0.0 for w, x in zip(weights, logits, strict=True)]
    probs = [w / sum(weights) for w in weights]
    if top_p is not None:
        kept, total = set(), 0.0
        for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if total >= top_p:
                break
            # an order that rounding could change is no test
            assume(abs(total + probs[i] - top_p) > 1e-5 or top_p == 1)
            kept.add(i)
            total += probs[i]
        probs = [p / total if i in kept else 0.0 for i, p in enumerate(probs)]
    return probs


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(2, 20).flatmap(
        lambda v: st.lists(st.lists(st.integers(-40, 40), min_size=v, max_size=v), min_size=1, max_size=3)
    ),
    temperature=st.sampled_from([0.1, 0.8, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 25),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_probabilities_follow_the_definition(rows, temperature, top_k, top_p):
    rows = [[x / 8 for x in row] for row in rows]
    expected = torch.tensor([likeliest(row, temperature, top_k, top_p) for row in rows])
    result = probabilities(torch.tensor(rows), temperature, top_k, top_p)
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-7)
    if top_p is not None and top_p < 1:
        assert torch.equal(result == 0, expected == 0)


def test_draws_are_as_frequent_as_their_probabilities():
    n = 20_000
    probs = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01, 0.0])
    tokens = sample(probs.expand(n, -1), torch.Generator().manual_seed(0))
    counts = tokens.bincount(minlength=6)
    assert counts[5] == 0
    sigma = (n * probs * (1 - probs)).sqrt()
    assert ((counts - n * probs).abs() <= 4 * sigma).all(), counts


def test_a_token_of_probability_0_is_never_drawn():
    """Even where its clock reads 0, which float32 exponentials do once in a while."""

    class Zero(torch.Tensor):
        def exponential_(self, *args, **options):
            return self.zero_()

    probs = torch.tensor([[0.0, 1.0, 0.0]])
    assert sample(probs.as_subclass(Zero)).tolist() == [1]


@pytest.mark.parametrize("options", [{"temperature": 1e-46}, {"temperature": 1e-300}, {"top_p": 1e-300}, {"top_k": 1}])
def test_as_little_as_float32_cannot_hold_is_the_likeliest_token(options):
    model, idx = make_model(), torch.randint(8, (2, 3))
    assert torch.equal(drawn(model, idx, 20, **{"temperature": 1.0} | options), drawn(model, idx, 20, temperature=0))


def test_large_logits_over_a_small_temperature():
    probs = probabilities(torch.tensor([[1000.0, 999.0, 0.0], [0.0, 1000.0, 1000.0]]), 1e-37, top_p=0.9)
    assert probs.tolist() == [[1, 0, 0], [0, 0.5, 0.5]]


@pytest.mark.parametrize("temperature", [0, 5.0])
def test_padding_of_the_vocabulary_is_never_drawn(temperature):
    model, idx = make_model(), torch.zeros(8, 4, dtype=torch.int64)
    assert drawn(model, idx, 40, temperature, n_vocab=5).max() <= 4
    assert drawn(model, idx, 40, temperature).max() > 4


def test_generator():
    model, idx = make_model(), torch.zeros(2, 4, dtype=torch.int64)
    before = torch.get_rng_state()
    a, b, c = (drawn(model, idx, 30, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_modes():
    """Dropout is off while drawing, the model's mode comes back, and the caller's gradients stay on."""
    model, idx = make_model(dropout=0.5), torch.zeros(2, 4, dtype=torch.int64)
    expected = drawn(model, idx, 10, temperature=0)
    model.train()
    assert torch.equal(drawn(model, idx, 10, temperature=0), expected)
    assert model.training
    tokens = generate(model, idx, 10)
    next(tokens)
    assert torch.is_grad_enabled()
    tokens.close()
    assert model.training
    model.eval()
    drawn(model, idx, 1)
    assert not model.training


ZEROS = torch.zeros(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"n_vocab": 34}, r"n_vocab: got 34, expected 1 to vocab_size \(33\)"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ({"idx": ZEROS[:, :0]}, r"idx: got shape \(1, 0\)"),
        ({"idx": ZEROS.float()}, "idx: .*float32"),
        ({"idx": ZEROS + 33}, "idx: got ids from 33 to 33, expected 0 to 32"),
    ],
)
def test_bad_values_are_named_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"model": make_model(), "idx": ZEROS, "max_new_tokens": 1} | options)
