"""Resume is exact: a run in two pieces and the same run in one piece give the same bits."""

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.train.checkpoints import assert_same, saved_iterations
from tests.train.runs import CONSTANT, Stop, crash, iterations, last, logged, resume, run, send
from train.checkpoint import load

N = 7  # not a multiple of the intervals
STATE = ("model", "optimizer", "iter_num", "best_val_loss")


def assert_same_end(a: Path, b: Path, keys: tuple[str, ...] = STATE) -> None:
    assert_same(*({key: last(folder)[key] for key in keys} for folder in (a, b)))


@pytest.mark.parametrize(("dtype", "log_interval"), [("float32", 3), ("bfloat16", 1)])
def test_two_halves_are_the_whole(tmp_path, dtype, log_interval):
    """With the dropout and accumulation of KILLED_JOB. Every run evaluates at other iterations."""
    settings = dict(dtype=dtype, log_interval=log_interval)
    run(tmp_path / "whole", max_iters=2 * N, eval_interval=5, **settings)
    run(tmp_path / "halves", max_iters=N, eval_interval=3, eval_iters=1, **settings)
    resume(tmp_path / "halves", max_iters=2 * N, eval_interval=4)

    expected = logged(tmp_path / "whole")
    assert list(expected) == list(range(0, 2 * N, log_interval))
    assert logged(tmp_path / "halves") == expected
    assert_same_end(tmp_path / "halves", tmp_path / "whole", keys=("model", "optimizer", "iter_num"))


def test_a_new_run_starts_from_ones_own_weights(tmp_path, monkeypatch, capsys):
    run(tmp_path / "out", max_iters=N, gelu="tanh")
    old = last(tmp_path / "out")
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "bias"))  # not on the command line
    monkeypatch.chdir(tmp_path)
    for named, more in (("out", tmp_path / "more"), ("out/ckpt.pt", tmp_path / "even more")):
        run(more, init_from=named, max_iters=2, **CONSTANT, **shape)
        new = last(more)
        assert_same(*({key: saved[key] for key in ("model", "model_args")} for saved in (old, new)))
        assert (new["iter_num"], new["nanofuse"]["gelu"]) == (2, "tanh")
        assert {float(entry["step"]) for entry in new["optimizer"]["state"].values()} == {2.0}
        assert iterations(more, "eval")[0] == 0  # judged again
        assert f"weights of out/ckpt.pt, iteration {N}\n" in capsys.readouterr().out
    assert last(tmp_path / "out")["iter_num"] == N


def test_nanogpts_run_goes_on_with_its_settings_but_on_this_machine(tmp_path):
    run(tmp_path / "out", max_iters=N, learning_rate=1e-4)
    theirs = last(tmp_path / "out")
    del theirs["nanofuse"]
    theirs["config"] |= {"device": "cuda", "dtype": "float16", "backend": "nccl"}
    torch.save(theirs, tmp_path / "out" / "ckpt.pt")
    resume(tmp_path / "out", max_iters=N + 2)
    ours = last(tmp_path / "out")
    assert ours["iter_num"] == N + 2
    assert ours["config"]["learning_rate"] == 1e-4
    assert [ours["config"][name] for name in ("device", "dtype", "backend")] == ["auto"] * 3


def test_the_loss_scale_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr("train.plan.resolve_dtype", lambda name, device: torch.float16)  # slow, but a CPU can do it
    run(tmp_path / "whole", max_iters=4, eval_interval=4)
    run(tmp_path / "halves", max_iters=2)
    resume(tmp_path / "halves", max_iters=4)
    assert last(tmp_path / "whole")["nanofuse"]["scaler"]["_growth_tracker"] == 4
    assert logged(tmp_path / "halves") == logged(tmp_path / "whole")
    assert_same_end(tmp_path / "halves", tmp_path / "whole", keys=("model", "optimizer", "nanofuse"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Inductor sums an embedding's gradient with atomics, so several threads give no fixed order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "compiler")
def test_two_halves_are_the_whole_when_compiled(tmp_path):
    settings = dict(compile=True, eval_interval=5)
    run(tmp_path / "whole", max_iters=2 * N, **settings)
    run(tmp_path / "halves", max_iters=N, **settings)
    resume(tmp_path / "halves", max_iters=2 * N)
    assert logged(tmp_path / "halves") == logged(tmp_path / "whole")
    assert_same_end(tmp_path / "halves", tmp_path / "whole", keys=("model", "optimizer", "iter_num"))


@pytest.mark.parametrize(("number", "always"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, True)])
def test_a_signal_finishes_the_step_saves_and_loses_nothing(tmp_path, capsys, request, number, always):
    request.addfinalizer(
        partial(signal.signal, number, signal.signal(number, signal.default_int_handler))
    )  # not nohup's
    settings = dict(max_iters=100, eval_interval=2, always_save_checkpoint=always, learning_rate=0.1, warmup_iters=2)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    # Both end by a signal. It saves the last state, even if it is not the best.
    assert run(tmp_path / "whole", at={2 * N - 1: send(number)}, **settings) == 128 + number
    assert run(tmp_path / "halves", at={N - 1: send(number)}, **settings) == 128 + number
    assert last(tmp_path / "halves")["iter_num"] == N
    assert iterations(tmp_path / "halves", "save")[-1] == N
    assert f"interrupted after {N} iterations" in capsys.readouterr().out
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers

    assert resume(tmp_path / "halves", at={N - 1: send(number)}) == 128 + number
    for kind in ("iter", "eval"):
        assert logged(tmp_path / "halves", kind) == logged(tmp_path / "whole", kind)
    saves = iterations(tmp_path / "halves", "save")
    saves.remove(N)
    assert saves == iterations(tmp_path / "whole", "save")
    assert_same_end(tmp_path / "halves", tmp_path / "whole", keys=(*STATE, "model_args", "nanofuse"))


def test_nohup_keeps_its_meaning(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path / "out", at={2: send(signal.SIGHUP)}, max_iters=4) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_patience_is_counted_over_a_signal(tmp_path):
    settings = dict(CONSTANT, eval_interval=2, patience=3, max_iters=100)
    run(tmp_path / "out", at={4: send(signal.SIGTERM)}, **settings)
    assert last(tmp_path / "out")["nanofuse"]["stale_evals"] == 2  # the evaluations at 2 and 4
    assert resume(tmp_path / "out") == 0
    assert iterations(tmp_path / "out", "eval") == [0, 2, 4, 6]
    assert iterations(tmp_path / "out", "iter") == [0, 1, 2, 3, 4, 5]


def test_an_evaluation_that_a_resume_repeats_counts_once(tmp_path):
    settings = dict(CONSTANT, eval_interval=2, patience=3, max_iters=100, always_save_checkpoint=True)
    with pytest.raises(Stop):
        run(tmp_path / "out", at={4: crash}, **settings)
    resume(tmp_path / "out")
    assert iterations(tmp_path / "out", "eval") == [0, 2, 4, 4, 6]
    evaluations = logged(tmp_path / "out", "eval")
    assert len({record["val_loss"] for record in evaluations.values()}) == 1


def test_a_state_that_is_evaluated_only_when_it_is_resumed_is_kept_once(tmp_path):
    run(tmp_path / "out", at={3: send(signal.SIGINT)}, eval_interval=2, max_iters=8)
    assert iterations(tmp_path / "out", "eval") == [0, 2]
    resume(tmp_path / "out", max_iters=4)
    assert iterations(tmp_path / "out", "save") == [2, 4, 4]
    assert saved_iterations(tmp_path / "out") == [4, 2]
    resume(tmp_path / "out", max_iters=4, block_size=8)  # other weights: those of before are kept
    assert saved_iterations(tmp_path / "out") == [4, 4]
    assert load(tmp_path / "out" / "ckpt-previous-1.pt")["model_args"]["block_size"] == 16


def test_a_finished_run_is_evaluated_and_left_as_it_is(tmp_path):
    run(tmp_path / "out", max_iters=4)
    before = last(tmp_path / "out")
    assert resume(tmp_path / "out") == 0
    assert iterations(tmp_path / "out", "iter") == [0, 1, 2, 3]
    assert iterations(tmp_path / "out", "eval") == [0, 2, 4, 4]
    assert_same(last(tmp_path / "out"), before)


def test_goes_on_with_the_stored_settings(tmp_path):
    run(tmp_path / "out", max_iters=4, learning_rate=0.02, beta2=0.9, dropout=0.3, weight_decay=0.5)
    stored = last(tmp_path / "out")["config"]
    resume(tmp_path / "out", max_iters=6, weight_decay=0.25)
    config = last(tmp_path / "out")["config"]
    assert config == stored | {"init_from": "resume", "max_iters": 6, "weight_decay": 0.25}
    assert last(tmp_path / "out")["model_args"]["dropout"] == 0.3
    group = last(tmp_path / "out")["optimizer"]["param_groups"][0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.9), 0.25)


def test_a_shorter_block_size_crops_weights_and_moments(tmp_path):
    run(tmp_path / "out", max_iters=4)
    before = last(tmp_path / "out")
    resume(tmp_path / "out", block_size=8, max_iters=6, **CONSTANT)
    after = last(tmp_path / "out")
    assert after["model_args"]["block_size"] == after["config"]["block_size"] == 8
    wpe = "transformer.wpe.weight"
    assert torch.equal(after["model"][wpe], before["model"][wpe][:8])
    index = list(k for k in before["model"] if k != "lm_head.weight").index(wpe)
    moments = [state["optimizer"]["state"][index]["exp_avg_sq"] for state in (before, after)]
    assert [m.shape for m in moments] == [(16, 32), (8, 32)]
    assert after["optimizer"]["state"][index]["step"] == 6
    assert (moments[1] > 0.9 * moments[0][:8]).all()  # two steps with beta2 0.95 after the loaded moments
    assert resume(tmp_path / "out", max_iters=8) == 0
