"""Resume is exact: a run in two pieces and the same run in one piece give the same bits."""

import functools
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.train.checkpoints import assert_same, saved_iterations
from tests.train.runs import CONSTANT, Stop, crash, iterations, last, logged, resume, run, send

N = 7  # not a multiple of the intervals


def assert_same_end(a: Path, b: Path, *more: str) -> None:
    assert_same(*({key: last(folder)[key] for key in ("model", "optimizer", "iter_num", *more)} for folder in (a, b)))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", pytest.param("compiled", marks=pytest.mark.slow)])
def test_two_halves_are_the_whole(tmp_path, request, monkeypatch, kind):
    """With the dropout and accumulation of KILLED_JOB. Every run evaluates at other iterations."""
    settings = dict(dtype="bfloat16", log_interval=3)
    if kind == "compiled":
        request.getfixturevalue("compiler")
        settings = dict(compile=True)
        # Inductor sums an embedding's gradient with atomics, so several threads give no fixed order.
        request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(1)
    elif kind == "float16":  # slow, but a CPU can do it
        monkeypatch.setattr("train.plan.resolve_dtype", lambda name, device: torch.float16)
    at = {0: lambda step: step.scaler.scale.fill_(2.0**12)}  # not float16's first one
    run(tmp_path / "whole", at, max_iters=2 * N, eval_interval=5, **settings)
    run(tmp_path / "halves", at, max_iters=N, eval_interval=3, eval_iters=1, **settings)
    resume(tmp_path / "halves", max_iters=2 * N, eval_interval=4)
    assert max(logged(tmp_path / "whole")) >= 2 * N - 3
    assert logged(tmp_path / "halves") == logged(tmp_path / "whole")
    assert_same_end(tmp_path / "halves", tmp_path / "whole")
    whole, halves = (last(tmp_path / name)["nanofuse"]["scaler"] for name in ("whole", "halves"))
    assert halves == whole
    assert whole.get("_growth_tracker") == (2 * N if kind == "float16" else None)


@pytest.mark.parametrize(("number", "always"), [(signal.SIGINT, False), (signal.SIGHUP, True)])
def test_a_signal_finishes_the_step_saves_and_loses_nothing(tmp_path, capsys, request, number, always):
    before = signal.signal(number, signal.default_int_handler)  # nohup ignores it
    request.addfinalizer(lambda: signal.signal(number, before))
    settings = dict(max_iters=100, eval_interval=2, always_save_checkpoint=always, learning_rate=0.1, warmup_iters=2)
    # Both end by a signal. It saves the last state, even if it is not the best.
    assert run(tmp_path / "whole", at={2 * N - 1: send(number)}, **settings) == 128 + number
    assert run(tmp_path / "halves", at={N - 1: send(number)}, **settings) == 128 + number
    assert last(tmp_path / "halves")["iter_num"] == N
    assert f"interrupted after {N} iterations" in capsys.readouterr().out
    assert signal.getsignal(number) == signal.default_int_handler

    assert resume(tmp_path / "halves", at={N - 1: send(number)}) == 128 + number
    for kind in ("iter", "eval"):
        assert logged(tmp_path / "halves", kind) == logged(tmp_path / "whole", kind)
    saves = iterations(tmp_path / "halves", "save")
    saves.remove(N)
    assert saves == iterations(tmp_path / "whole", "save")
    assert_same_end(tmp_path / "halves", tmp_path / "whole", "best_val_loss", "model_args", "nanofuse")


def test_nohup_keeps_its_meaning(tmp_path, request):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    assert run(tmp_path / "out", at={2: send(signal.SIGHUP)}, max_iters=4) == 0


def test_patience_is_counted_over_a_signal_and_a_repeated_evaluation_counts_once(tmp_path, capsys):
    settings = dict(CONSTANT, eval_interval=2, patience=3, max_iters=100, always_save_checkpoint=True)
    assert run(tmp_path / "out", at={2: send(signal.SIGTERM)}, **settings) == 143
    with pytest.raises(Stop):
        resume(tmp_path / "out", at={1: crash})
    assert last(tmp_path / "out")["nanofuse"]["stale_evals"] == 2  # the evaluations at 2 and 4
    assert resume(tmp_path / "out") == 0
    assert iterations(tmp_path / "out", "eval") == [0, 2, 4, 4, 6]
    assert "no better validation loss in 3 evaluations" in capsys.readouterr().out


def test_a_state_that_is_evaluated_only_when_it_is_resumed_is_kept_once(tmp_path):
    run(tmp_path / "out", at={3: send(signal.SIGINT)}, eval_interval=2, max_iters=8)
    resume(tmp_path / "out", max_iters=4)
    assert iterations(tmp_path / "out", "save") == [2, 4, 4]
    assert saved_iterations(tmp_path / "out") == [4, 2]
    resume(tmp_path / "out", max_iters=4, block_size=8)  # other weights: those of before are kept
    assert saved_iterations(tmp_path / "out") == [4, 4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("finished") / "out"
    run(out_dir, max_iters=4, learning_rate=0.02, beta2=0.9, dropout=0.3, weight_decay=0.5, gelu="tanh")
    return out_dir


@pytest.fixture
def out(tmp_path: Path, finished: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def test_it_is_evaluated_and_left_as_it_is_and_goes_on_with_its_settings_and_those_that_are_changed(out):
    """Memory too: a run that needs too much can go on with less."""
    before = last(out)
    assert resume(out) == 0
    assert iterations(out, "iter") == [0, 1, 2, 3]
    assert iterations(out, "eval") == [0, 2, 4, 4]
    assert_same(last(out), before)
    modes, changed = [], {"max_iters": 6, "weight_decay": 0.25, "recompute": "block"}
    resume(out, {0: lambda step: modes.append(step.model.transformer.h[0].recompute)}, **changed)
    after = last(out)
    assert modes == ["block"]
    assert after["config"] == before["config"] | changed | {"init_from": "resume", "out_dir": str(out)}
    assert after["model_args"]["dropout"] == 0.3
    group = after["optimizer"]["param_groups"][0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.9), 0.25)


def test_nanogpts_run_goes_on_with_its_settings_but_on_this_machine(out):
    theirs = last(out)
    del theirs["nanofuse"]
    machine = {"device": "cuda", "dtype": "float16", "backend": "nccl"}
    torch.save(theirs | {"config": theirs["config"] | machine | {"gelu": "auto"}}, out / "ckpt.pt")
    resume(out, max_iters=6)
    ours = last(out)
    assert (ours["iter_num"], ours["config"]["learning_rate"]) == (6, 0.02)
    assert [ours["config"][name] for name in machine] == ["auto"] * 3


def test_a_shorter_block_size_crops_weights_and_moments(out):
    before = last(out)
    resume(out, block_size=8, max_iters=6, **CONSTANT)
    after = last(out)
    assert after["model_args"]["block_size"] == after["config"]["block_size"] == 8
    old, new = (state["optimizer"]["state"][1] for state in (before, after))
    assert [moments["exp_avg_sq"].shape for moments in (old, new)] == [(16, 32), (8, 32)]
    assert (old["step"], new["step"]) == (4, 6)
    assert (new["exp_avg_sq"] >= 0.81 * 0.999 * old["exp_avg_sq"][:8]).all()  # two steps with beta2 0.9
    assert resume(out, max_iters=8) == 0


def test_a_new_run_starts_from_its_weights(tmp_path, out, monkeypatch, capsys):
    old = last(out)
    # not on the command line, but n_embd is; the weights' n_head divides it, the default one does not
    shape = dict.fromkeys(("n_layer", "n_head", "block_size", "bias"))
    monkeypatch.chdir(tmp_path)
    more = tmp_path / "more"
    run(more, init_from="out", max_iters=2, **(CONSTANT | shape))
    new = last(more)
    assert_same(*(dict(saved["model"]) for saved in (old, new)))
    assert (new["iter_num"], new["nanofuse"]["gelu"]) == (2, "tanh")
    assert new["model_args"] == old["model_args"] | {"dropout": 0.1}
    assert {float(entry["step"]) for entry in new["optimizer"]["state"].values()} == {2.0}
    assert iterations(more, "eval")[0] == 0  # judged again
    assert "weights of out/ckpt.pt, iteration 4\n" in capsys.readouterr().out
    assert_same(last(out), old)
