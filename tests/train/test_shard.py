"""--shard: the same run with a sharded state, and checkpoints that load on any number of ranks."""

import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

from tests.train.ranks import assert_same_losses, finish, records, start, train_alone, train_together
from train import checkpoint

pytestmark = pytest.mark.slow  # starts processes
SHARD = dict(shard=True, n_layer=2, bias=True)


def assert_same_state(a: str, b: str) -> None:
    """Weights and moments are equal, except for sums in another order."""
    one, two = (checkpoint.load(Path(name) / "ckpt.pt") for name in (a, b))
    assert list(one["model"]) == list(two["model"])
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-3, atol=1e-4)
    assert two["model"]["lm_head.weight"].data_ptr() == two["model"]["transformer.wte.weight"].data_ptr()
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for index, entry in one["optimizer"]["state"].items():
        other = two["optimizer"]["state"][index]
        assert float(other["step"]) == float(entry["step"]) > 0
        torch.testing.assert_close(other["exp_avg"], entry["exp_avg"], rtol=1e-2, atol=1e-5)
        torch.testing.assert_close(other["exp_avg_sq"], entry["exp_avg_sq"], rtol=1e-2, atol=1e-8)


def test_two_and_four_ranks_train_as_one_and_go_on_as_any_number(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one process nothing is sharded. n_embd=34: 4 ranks get unequal shares."""
    changes = SHARD | dict(dropout=0.2, n_embd=34)
    train_alone(monkeypatch, out_dir="one", **changes)
    assert "2 processes" in train_together(2, out_dir="two", **changes)
    train_together(4, out_dir="four", **changes)
    for name in ("two", "four"):
        assert_same_losses("one", name)
        assert_same_state("one", name)

    more = changes | dict(init_from="resume", max_iters=10)
    shutil.copytree("one", "one-then-two")
    shutil.copytree("two", "two-then-four")
    train_together(2, out_dir="one-then-two", **more)
    train_together(4, out_dir="two-then-four", **more)
    train_alone(monkeypatch, out_dir="four", **more)
    train_alone(monkeypatch, out_dir="one", **more)
    for name in ("one-then-two", "two-then-four", "four"):
        assert_same_losses("one", name)
        assert_same_state("one", name)
        assert records(name, "iter")[-1]["iter"] == 9


@pytest.mark.parametrize("recompute", ["block"])
def test_what_is_computed_again_finds_its_parameters_gathered(
    recompute: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SHARD | dict(dropout=0.2)
    train_alone(monkeypatch, out_dir="one", **changes)
    train_together(2, out_dir="two", recompute=recompute, **changes)
    assert_same_losses("one", "two")


def test_compiled_in_bfloat16(here: Path, monkeypatch: pytest.MonkeyPatch, compiler: None) -> None:
    changes = SHARD | dict(dtype="bfloat16", n_layer=3)
    train_alone(monkeypatch, out_dir="one", **changes)
    out = train_together(2, out_dir="two", compile=True, **changes)
    assert "going on without it" not in out
    for x, y in zip(records("one", "iter"), records("two", "iter"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-2)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=5e-2)


def test_each_rank_holds_its_share(here: Path) -> None:
    """Half of all parameters, gradients and moments, and one whole block at a time, in bfloat16."""
    script = """
        import json, os
        import torch
        from model import GPT, GPTConfig, Precision
        from train.distributed import process_group, world_from_environment
        from train.shard import ShardedAdamW, share_out
        from train.step import TrainStep
        from train.data import Batch

        world = world_from_environment()
        with process_group(world, "auto", torch.device("cpu")):
            shape = GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16)
            model = GPT(shape, precision=Precision(torch.bfloat16))
            share_out(model, world, torch.device("cpu"))
            optimizer = ShardedAdamW(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
            seen = set()
            first, second = model.transformer.h
            for block, other in ((first, second), (second, first)):  # looked at while one is gathered
                look = lambda module, _, other=other: seen.update(
                    {str(module.c_attn.weight.dtype), f"other {type(other.attn.c_attn.weight.data).__name__}"}
                )
                block.attn.register_forward_pre_hook(look)
                block.register_forward_pre_hook(lambda module, args: seen.add(f"stream {args[0].dtype}"))
            tokens = torch.randint(32, (1, 2, 9))
            step = TrainStep(model, optimizer, grad_clip=1.0)
            step.micro_step(tokens[0, :, :-1], tokens[0, :, 1:], 1)
            shares = [p.to_local().numel() for p in model.parameters()]
            grads = [p.grad.to_local().numel() for p in model.parameters()]
            step.update()
            moments = [state["exp_avg"].to_local().numel() for state in optimizer.state.values()]
            dtypes = {str(p.dtype) for p in model.parameters()}
            found = [sum(shares), sum(grads), sum(moments), model.get_num_params(non_embedding=False)]
            found += [sorted(seen), sorted(dtypes)]
        with open(f"rank{world.rank}.json", "w") as file:
            json.dump(found, file)
        os._exit(0)  # as the command ends: see train/__main__.py
    """
    Path("driver.py").write_text(textwrap.dedent(script))
    torchrun = start(2, "driver.py")
    _, err = finish(torchrun)
    assert torchrun.returncode == 0, err
    for rank in (0, 1):
        params, grads, moments, total, seen, kept = json.loads(Path(f"rank{rank}.json").read_text())
        assert params == grads == moments == total / 2
        assert seen == ["other DTensor", "stream torch.float32", "torch.bfloat16"]
        assert kept == ["torch.float32"]
