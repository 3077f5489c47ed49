"""Compiling the model. If a machine cannot compile, the run goes on without it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from model import GPT
from tests.model import flash_packages
from tests.train.runs import logged, run
from tests.train.steps import small_model
from train.compile import compile_model, model_to_train, uncompile
from train.config import TrainConfig
from train.sample import try_compile
from train.step import TrainStep

CONFIG = TrainConfig(batch_size=2, block_size=8, n_layer=1, n_head=2, n_embd=16, compile=True)
CPU = torch.device("cpu")


@pytest.mark.slow
def test_without_a_compiler_the_run_goes_on_in_eager_mode():
    model, lines = small_model(), []
    with fresh_cache(), inductor_config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        chosen = model_to_train(model, CONFIG, CPU, lines.append)
    assert chosen is model
    assert [line for line in lines if line.startswith("compile: not possible on this machine, going on without")]
    assert "no/such/compiler" in lines[-1]
    assert "\n" not in lines[-1]


def test_on_a_mac_nothing_is_compiled():
    model, lines = small_model(), []
    assert model_to_train(model, CONFIG, torch.device("mps"), lines.append) is model
    assert lines[-1].startswith("compile: not possible on this machine, going on without it: compiled for mps, ")
    assert try_compile(model, torch.device("mps")) is model


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_is_compiled_with_the_same_dropout():
    model, lines = small_model(dropout=0.5), []
    chosen = model_to_train(model, CONFIG, CPU, lines.append)
    assert chosen is not model
    assert not any("not possible" in line for line in lines)
    assert "kept for the next run in /" in lines[-1]
    idx, targets = torch.randint(11, (2, 2, 8))
    losses = []
    for step in (chosen, model):
        torch.manual_seed(1)
        losses.append(step(idx, targets, dloss=torch.tensor(0.5))[1])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("again", range(4))  # on three processes or fewer, one of them runs two of these
def test_a_test_compiles_whatever_others_compiled_before_it(again: int) -> None:
    """Of one function Dynamo keeps eight variants in a process; a ninth is eager, here and in the tests on a GPU."""
    counters.clear()
    torch.compile(plus_one, backend="eager")(torch.zeros(2))
    assert counters["stats"]["unique_graphs"] == 1


def plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_in_parts_two_blocks_are_compiled_whatever_the_depth():
    counters.clear()
    model, idx = small_model(dropout=0.5, n_layer=4), torch.randint(11, (2, 8))
    results = []
    for compiled in (False, True):
        if compiled:
            model = compile_model(model, partial(torch.compile, backend="aot_eager"), in_parts=True)
        torch.manual_seed(1)
        loss = model(idx, idx.clone())[1]
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*results)
    assert counters["stats"]["unique_graphs"] == 5  # the embedding, two blocks, the last LayerNorm, the loss
    uncompile(model)
    for length in (3, 4):
        model(idx[:, :length])
    assert counters["stats"]["unique_graphs"] == 5


def test_where_a_package_breaks_the_graph_no_layer_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo would leave the ninth layer eager, with a warning."""
    flash_packages.install(monkeypatch)
    graphs = []
    for n_layer in (3, 4):
        torch.compiler.reset()
        counters.clear()
        model, idx = small_model(n_layer=n_layer, attention="fa4"), torch.randint(11, (2, 8))
        compile_model(model, partial(torch.compile, backend="eager"), in_parts=True)(idx, idx.clone())
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("in_parts", "graphs"), [(False, 2), (True, 8)])
def test_nothing_is_compiled_again_after_the_warm_up(in_parts, graphs, tmp_path, monkeypatch):
    """The warm-up makes the graphs of training and evaluation. Nothing later makes one, not even the sample of text. In
    parts: the embedding, the only block, the last LayerNorm, the loss."""

    def compiled(model: GPT, compile: Callable, **_: bool) -> torch.nn.Module:
        return compile_model(model, compile, in_parts=in_parts)

    monkeypatch.setattr("train.compile.compile_model", compiled)
    counters.clear()
    seen = []

    def look(step: TrainStep) -> None:
        seen.append(counters["stats"]["unique_graphs"])

    run(tmp_path / "out", at={1: look, 6: look}, compile=True, max_iters=7, eval_interval=2, dropout=0.2)
    assert seen == [graphs] * 2
    assert counters["stats"]["unique_graphs"] == graphs  # after the last evaluation and the sample of text
    assert not counters["graph_break"]


def test_memory_that_runs_out_is_not_taken_for_a_missing_compiler():
    class Hungry(torch.nn.Module):
        def forward(self, idx: torch.Tensor, targets: torch.Tensor, dloss: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(torch.OutOfMemoryError):
        model_to_train(Hungry(), CONFIG, CPU, lambda line: None)


def test_what_compiling_leaves_behind_is_no_gradient_of_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # the first call, on zeros, is still made
    for compile in (False, True):
        run(tmp_path / str(compile), compile=compile, max_iters=1, dropout=0.0)
    assert logged(tmp_path / "True")[0] == logged(tmp_path / "False")[0]


def test_the_residual_dtype_reaches_the_stream_between_the_blocks(tmp_path):
    """By default it stays float32: each layer adds a little to a large stream, which bfloat16 would round away."""
    seen = []

    def look(step: TrainStep) -> None:
        step.model.transformer.ln_f.register_forward_pre_hook(lambda norm, args: seen.extend(x.dtype for x in args[:2]))

    for residual in ("auto", "bfloat16"):
        run(tmp_path / "out", {0: look}, max_iters=1, eval_iters=1, dtype="bfloat16", residual_dtype=residual)
        stream = torch.float32 if residual == "auto" else torch.bfloat16
        assert set(seen[::2]) == {stream}
        assert set(seen[1::2]) == {torch.bfloat16}
        seen.clear()
