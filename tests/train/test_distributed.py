"""Several processes train as one, and end well or with an error. By torchrun, on the CPU."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import bench.__main__ as bench_command
import train.__main__ as train_command
from model import GPTConfig
from model.flops import flops_per_token
from tests.train import test_graph as graphs
from tests.train.jobs import CHARS, JOB, ROOT, arguments
from tests.train.ranks import RUN, assert_same_losses, finish, records, start, train_alone, train_together
from tests.train.runs import last, run
from tests.train.tape import tape
from train import checkpoint, plan
from train.config import TrainConfig
from train.distributed import World, local_device, process_group, world_from_environment
from train.errors import UserError
from train.graph import GraphedStep

# A place among the ranks


def test_a_lone_process(here):
    world = world_from_environment()
    assert (world, world.master) == (World(0, 0, 1), True)
    assert world.sum(torch.tensor([2.0])).tolist() == [2.0]
    assert [world.agree(value) for value in (0, 2, 1)] == [0, 2, 1]
    assert world.from_master(3) == 3
    world.barrier()
    with process_group(world, "auto", torch.device("cpu")):
        assert not torch.distributed.is_initialized()


def test_the_place_that_torchrun_gives(here, monkeypatch):
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(5, 1, 8)
    assert not world_from_environment().master
    monkeypatch.setenv("WORLD_SIZE", "eight")
    with pytest.raises(UserError, match=r"expected three integers as torchrun sets them .*'eight'"):
        world_from_environment()


@pytest.mark.parametrize("place", ["5 0 2", "2 0 2", "-1 0 2", "0 2 2", "0 -1 2", "0 0 0", "0 0 -1"])
def test_a_place_outside_the_world(monkeypatch, place):
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), place.split(), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"got {place.replace(' ', ', ')}, expected ranks from 0 to WORLD_SIZE - 1"):
        world_from_environment()


def test_nccl_is_not_taken_for_gloo():
    with (
        pytest.raises(UserError, match="backend: got 'nccl', expected auto or gloo on cpu"),
        process_group(World(0, 0, 2), "nccl", torch.device("cpu")),
    ):
        pass
    with process_group(World(), "nccl", torch.device("cpu")):  # nanoGPT's default; nothing is sent
        pass


def test_a_rank_without_torchrun_saves_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "world_from_environment", lambda: World(parent=os.getppid() + 1))
    assert run(tmp_path / "out", max_iters=100) == 128 + signal.SIGTERM
    assert "torchrun has gone: interrupted after 1 iterations" in capsys.readouterr().out
    assert last(tmp_path / "out")["iter_num"] == 1


def test_ranks_take_the_gpus_in_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert local_device(gpu, World(3, 1, 4)) == torch.device("cuda", 1)
    assert local_device(torch.device("cuda", 1), World()) == torch.device("cuda", 1)
    assert local_device(cpu, World(3, 3, 4)) == cpu
    with pytest.raises(UserError, match="expected at most 2, one a GPU"):
        local_device(gpu, World(2, 2, 4))


@pytest.mark.parametrize(("command", "work"), [(train_command, "decide"), (bench_command, "variants")])
def test_the_device_of_a_run_is_the_current_one(here, monkeypatch, command, work):
    """Streams and captures belong to the current device, so it must be set before any work."""
    current = []

    def begun(*args: object) -> NoReturn:
        assert current == [torch.device("cuda", 1)]
        raise Begun

    class Begun(Exception):
        pass

    for name, answer in {"device_count": 2, "is_available": True, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(command, work, begun)
    monkeypatch.setattr(sys, "argv", ["command", "--device=cuda:1"])
    with pytest.raises(Begun):
        command.main()


def test_ranks_that_cannot_meet(here, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=r"backend: 'auto' could not join 2 ranks: .*MASTER_ADDR"),
        process_group(World(0, 0, 2), "auto", torch.device("cpu")),
    ):
        pass


def test_what_ranks_cannot_share_is_refused(here, monkeypatch):
    monkeypatch.setattr(plan, "resolve_dtype", lambda name, device: torch.float16)  # a CPU does not offer it
    for world, settings, message in (
        (World(0, 0, 3), {}, "gradient_accumulation_steps: got 4, expected a multiple of the 3 processes"),
        (World(1, 1, 2), {"shard": True}, "dtype: got float16, expected bfloat16 or float32 with shard=True"),
    ):
        config = TrainConfig(dataset="letters", compile=False, gradient_accumulation_steps=4, **settings)
        with pytest.raises(UserError, match=message):
            plan.decide(config, set(), "", None, world, torch.device("cpu"))
    assert [path.name for path in here.iterdir()] == ["data"]


# Gradients


@pytest.mark.parametrize(("graphed", "accumulation"), [(False, 1), (False, 3), (True, 3)])
def test_gradients_are_exchanged_once_a_step(graphed: bool, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: sent.append(x))
    step, alone = (graphs.make(accumulation=2, dtype=torch.bfloat16) for _ in range(2))
    step.world = World(0, 0, 2)
    call = GraphedStep(step, (accumulation, graphs.B, graphs.T), capture=tape) if graphed else step
    losses = graphs.train(call, accumulation, 1)
    assert [x.data_ptr() for x in sent] == [step.optimizer.flat.grad.data_ptr()]
    assert sent[0].dtype == torch.float32
    assert sent[0].numel() == len(step.optimizer.flat.grad)
    (loss, norm), (expected, twice) = losses[0], graphs.train(alone, accumulation, 1)[0]
    assert (loss, norm) == (expected, twice / 2)  # the mean over two ranks, one of which sent zeros


# One driver, three ranks


@pytest.mark.slow
def test_what_ranks_tell_each_other(here):
    script = """
        import json, sys
        import torch
        from train.distributed import process_group, world_from_environment

        world = world_from_environment()
        with process_group(world, "auto", torch.device("cpu")):
            told = [world.agree(value) for value in (0, world.rank, 0, 2 - world.rank, 0)]
            total = world.sum(torch.tensor([[1.0, world.rank]], dtype=torch.float64))
            masters = world.from_master(7 + world.rank)
            world.barrier()
        with open(f"rank{world.rank}.json", "w") as file:
            json.dump([world.rank, world.size, world.master, told, total.tolist(), masters], file)
    """
    (here / "driver.py").write_text(textwrap.dedent(script))
    torchrun = start(3, "driver.py")
    _, err = finish(torchrun)
    assert torchrun.returncode == 0, err
    found = [json.loads((here / f"rank{rank}.json").read_text()) for rank in range(3)]
    for rank, answers in enumerate(found):
        # every answer is the largest value of the previous call, the same on all ranks
        assert answers == [rank, 3, rank == 0, [0, 0, 2, 0, 2], [[3.0, 3.0]], 7]


# Runs


@pytest.mark.slow
def test_two_ranks_train_as_one(here, monkeypatch):
    """Losses and weights are the same. Then one rank resumes the run of two, and two ranks the run of one."""
    changes = dict(dropout=0.2)
    train_alone(monkeypatch, out_dir="one", **changes)
    out = train_together(2, out_dir="two", **changes)
    assert_same_losses("one", "two")
    one, two = (checkpoint.load(Path(name) / "ckpt.pt") for name in ("one", "two"))
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-3, atol=1e-4)
    assert out.count("step 3:") == out.count("iter 3:") == out.count("saving checkpoint to two") / 2 == 1

    # MFU counts both
    assert re.search(r"^device: .* x 2, float32, reference kernels$", out, re.MULTILINE)
    shape = {name: JOB[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    tokens = RUN["gradient_accumulation_steps"] * JOB["batch_size"] * JOB["block_size"]
    flops = flops_per_token(GPTConfig(vocab_size=len(CHARS), bias=False, **shape)) * tokens
    assert f"tokens per iteration: {tokens:,}" in out
    for processes, out_dir in enumerate(("one", "two"), start=1):
        for record in records(out_dir, "iter"):
            assert record["mfu"] * record["seconds"] * JOB["peak_flops"] * processes == pytest.approx(flops, rel=1e-9)
            assert record["tokens_per_second"] * record["seconds"] == pytest.approx(tokens, rel=1e-9)

    # two ranks resume the run of one, one rank the run of two
    shutil.copytree("one", "then-two")
    shutil.copytree("two", "then-one")
    train_together(2, out_dir="then-two", init_from="resume", max_iters=10, **changes)
    train_alone(monkeypatch, out_dir="then-one", init_from="resume", max_iters=10, **changes)
    train_alone(monkeypatch, out_dir="one", init_from="resume", max_iters=10, **changes)
    assert_same_losses("one", "then-two")
    assert_same_losses("one", "then-one")
    assert records("one", "iter")[-1]["iter"] == 9


# Ends


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(here):
    script = """
        import os
        from train import data
        from train.__main__ import main
        from train.errors import run

        rank, batch = os.environ["RANK"], data.Loader.train
        open(f"pid{rank}", "w").write(str(os.getpid()))

        def failing(self, step):
            if rank == "1" and step == 3:
                raise RuntimeError("the disk of rank one has gone")
            return batch(self, step)

        data.Loader.train = failing
        run(main)
    """
    (here / "driver.py").write_text(textwrap.dedent(script))
    torchrun = start(2, "driver.py", *arguments(**RUN | {"max_iters": 10**6}))
    out, err = finish(torchrun)
    assert torchrun.returncode != 0
    assert "RuntimeError: the disk of rank one has gone" in err
    assert "[rank0]: Traceback" not in err
    assert "iter 2:" in out
    assert "iter 4:" not in out
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((here / f"pid{rank}").read_text()), 0)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_rank_that_dies_costs_the_others_one_line(here, shard):
    """Without torchrun, which would end them too."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in place.items()}
        argv = [sys.executable, "-m", "train", *arguments(**RUN | {"max_iters": 10**6, "shard": shard})]
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    await_iterations(here, ranks[0])
    ranks[1].kill()
    _, err = finish(ranks[0])
    finish(ranks[1])
    assert ranks[0].returncode == 1
    assert re.fullmatch(r"error: rank 0: another rank has ended[^\n]*\n", err)


def await_iterations(here: Path, process: subprocess.Popen) -> None:
    path = here / "out" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(records("out", "iter")) > 2):
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_torchruns_end_lets_the_ranks_save(here, number):
    """Killed outright, it ends nobody: the ranks notice."""
    torchrun = start(2, "-m", "train", *arguments(**RUN | {"max_iters": 10**6, "eval_interval": 10**6}))
    await_iterations(here, torchrun)
    torchrun.send_signal(number)
    out, err = finish(torchrun)
    assert torchrun.returncode != 0
    gone = "torchrun has gone: " if number == signal.SIGKILL else ""
    done = re.search(rf"^{gone}interrupted after (\d+) iterations$", out, re.MULTILINE)
    assert done, out + err
    saved = checkpoint.load(here / "out" / "ckpt.pt")
    assert saved["iter_num"] == int(done[1]) == records("out", "iter")[-1]["iter"] + 1
    assert saved["best_val_loss"] < 1e9
