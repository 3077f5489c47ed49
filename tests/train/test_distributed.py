"""Several processes train as one, with and without --shard, and end well or with an error. By torchrun, on the CPU."""

import itertools
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
from unittest import mock

import pytest
import torch

import bench.__main__ as bench_command
import train.__main__ as train_command
from tests.train import steps
from tests.train.jobs import ROOT, arguments, make_data
from tests.train.runs import last, logged, records, refusal, resume, run, send
from tests.train.tape import tape
from train import plan
from train.config import TrainConfig
from train.distributed import World, local_device, process_group, world_from_environment
from train.errors import RunError, UserError
from train.graph import GraphedStep

CPU = torch.device("cpu")
JOB = dict(
    gradient_accumulation_steps=4,
    max_iters=6,
    eval_interval=3,
    eval_iters=5,  # not divisible by any number of processes here
    log_interval=1,
)
ENDLESS = JOB | {"max_iters": 10**6}

# A place among the ranks


def place(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), values, strict=True):
        monkeypatch.setenv(name, value)


def test_the_place_that_torchrun_gives(here, monkeypatch):
    assert world_from_environment() == World(0, 0, 1)
    place(monkeypatch, "5", "1", "8")
    assert world_from_environment() == World(5, 1, 8)
    for given in ("5, 1, eight", "2, 0, 2", "0, 2, 2", "-1, 0, 2", "0, , 1"):
        place(monkeypatch, *given.split(", "))
        with pytest.raises(UserError, match=f"got '{given}', expected ranks from 0 to WORLD_SIZE - 1"):
            world_from_environment()


def test_ranks_that_cannot_meet(here, monkeypatch):
    place(monkeypatch, "0", "0", "2")
    for backend, message in (
        ("nccl", "backend: got 'nccl', expected auto or gloo on cpu"),
        ("auto", r"backend: 'auto' could not join 2 ranks: .*MASTER_ADDR.*; .*GLOO_SOCKET_IFNAME"),
    ):
        with pytest.raises(UserError, match=message), process_group(World(0, 0, 2), backend, CPU):
            pass
    with process_group(World(), "nccl", CPU):  # nanoGPT's default; alone it sends nothing
        assert not torch.distributed.is_initialized()


SHM = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, unhandled system error, NCCL version 2.28
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
Error while creating shared memory segment /dev/shm/nccl-a (size 9637888), error: No space left on device (28)
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.distributed.DistBackendError(SHM), r"rank 1: NCCL failed, .*unhandled system error.* No space left on"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed"), "rank 1: another rank has ended, which"),
    ],
)
def test_an_exchange_that_fails_says_what_nobody_else_says(monkeypatch, error, words):
    """All ranks of a container without shared memory get the same error from NCCL, and none has ended."""
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    with pytest.raises(RunError, match=words), process_group(World(1, 1, 2), "auto", CPU):
        raise error


def test_what_ranks_cannot_share_is_refused(here, monkeypatch):
    monkeypatch.setattr(plan, "resolve_dtype", lambda name, device: torch.float16)  # a CPU does not offer it
    for world, settings, message in (
        (World(0, 0, 3), {}, "gradient_accumulation_steps: got 4, expected a multiple of the 3 processes"),
        (World(1, 1, 2), {"shard": True}, "dtype: got float16, expected bfloat16 or float32 with shard=True"),
    ):
        config = TrainConfig(dataset="letters", compile=False, gradient_accumulation_steps=4, **settings)
        with pytest.raises(UserError, match=message):
            plan.decide(config, set(), "", None, world, CPU)


def test_ranks_take_the_gpus_in_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert local_device(first, World(3, 1, 4)) == second
    assert local_device(second, World()) == second
    assert local_device(CPU, World(3, 3, 4)) == CPU
    with pytest.raises(UserError, match="expected at most 2, one a GPU"):
        local_device(first, World(2, 2, 4))


def test_a_rank_that_has_another_gpu_or_has_read_other_files_is_refused(tmp_path, monkeypatch):
    """Another machine's files, or a checkpoint that a run has replaced since: the ranks would train different models.
    An older GPU: it would compute in float16 and scale its losses, beside a rank that does neither."""
    run(tmp_path / "out", max_iters=2)
    for go, alike, got in (
        (run, 0, "device: got .* in torch.float32 with reference kernels, other than rank 0; set --dtype and"),
        (resume, 1, "init_from=resume: got a checkpoint of iteration 2.*, other than rank 0; all machines must"),
        (run, 1, "tokens, CRC.*, other than rank 0; all machines must"),
    ):
        errors = itertools.chain([0] * alike, itertools.repeat(1))  # so many facts are rank 0's before one is not
        monkeypatch.setattr(World, "from_master", lambda self, value, errors=errors: [value + next(errors)])
        assert re.search(f"^rank 0: .*{got}", refusal(go, tmp_path / "out"))


@pytest.mark.parametrize(("command", "work"), [(train_command, "decide"), (bench_command, "variants")])
def test_the_device_of_a_run_is_the_current_one_and_takes_tf32(here, monkeypatch, command, work):
    """Streams and captures belong to the current device, so it must be set before any work. TF32 is set in a way that
    Inductor can still ask for it."""
    for name, answer in {"device_count": 2, "is_available": True, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    begun = mock.Mock(side_effect=InterruptedError)
    monkeypatch.setattr(torch.cuda, "set_device", begun.device)
    monkeypatch.setattr(torch, "ones", begun.ones)
    monkeypatch.setattr(command, work, begun)
    monkeypatch.setattr(sys, "argv", ["command", "--device=cuda:1"])
    with pytest.raises(InterruptedError):
        command.main()
    assert begun.mock_calls[0] == mock.call.device(torch.device("cuda", 1))
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(("graphed", "accumulation", "dtype"), [(False, 1, torch.bfloat16), (True, 3, torch.float16)])
def test_gradients_are_exchanged_once_a_step(graphed, accumulation, dtype, monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: sent.append(x))
    step, alone = (steps.make(accumulation=accumulation, several=True, dtype=dtype) for _ in range(2))
    for each in (step, alone):
        each.scaler.scale.fill_(2.0**10)  # of float16
    step.world = World(0, 0, 2)
    call = GraphedStep(step, (steps.B, steps.T), capture=tape) if graphed else step
    losses = steps.train(call, accumulation, 1)
    assert [x.data_ptr() for x in sent] == [step.optimizer.flat.grad.data_ptr()]
    assert (sent[0].dtype, sent[0].numel()) == (torch.float32, len(step.optimizer.flat.grad))
    ((loss, norm),) = steps.train(alone, accumulation, 1)
    assert losses == [(loss, norm / 2)]  # the mean over two ranks, one of which sent zeros


# Runs


def start(processes: int, *command: str) -> subprocess.Popen:
    """Start Python, or torchrun, in the current folder, in its own session, so that the test can end all processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Wait for its end. Returns (stdout, stderr). If it hangs, its session is killed and the test fails."""
    try:
        return process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"it hangs\n{out}\n{err}")


def train(processes: int, **changes) -> str:
    """`python -m train` on so many ranks. Returns what it prints."""
    command = start(processes, "-m", "train", *arguments(**JOB | changes))
    out, err = finish(command)
    assert command.returncode == 0, out + err
    return out


def numbers(out_dir: str, kind: str) -> dict[tuple[int, str], float]:
    """All that was logged, except times."""
    every = logged(Path(out_dir), kind).items()
    return {(n, name): value for n, record in every for name, value in record.items() if name != "kind"}


def assert_same_state(a: str, b: str) -> None:
    """Weights and moments are equal, except for sums in another order."""
    one, two = (last(Path(name)) for name in (a, b))
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-3, atol=1e-4)
    assert two["model"]["lm_head.weight"].data_ptr() == two["model"]["transformer.wte.weight"].data_ptr()
    for name, atol in (("step", 0), ("exp_avg", 1e-5), ("exp_avg_sq", 1e-8)):
        a, b = ({i: entry[name] for i, entry in state["optimizer"]["state"].items()} for state in (one, two))
        torch.testing.assert_close(b, a, rtol=1e-2 if atol else 0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        (dict(), [(1, 2), (2, 1)]),
        # 4 ranks get unequal shares. What is computed again finds its parameters gathered.
        (dict(shard=True, n_layer=2, n_embd=34, bias=True, recompute="block"), [(2, 4), (4, 1)]),
    ],
    ids=["whole", "sharded"],
)
def test_ranks_train_as_one_and_go_on_as_any_number(here, settings, pairs):
    changes = settings | dict(dropout=0.2)
    train(1, out_dir="one", **changes)
    train(1, out_dir="one", init_from="resume", max_iters=10, **changes)
    for first, then in pairs:
        name = f"{first}-then-{then}"
        said = train(first, out_dir=name, **changes)
        assert said.count("step 3:") == said.count("iter 3:") == said.count(f"saving checkpoint to {name}\n") / 2 == 1
        assert re.search(rf"^device: .* x {first}, float32, reference kernels$", said, re.MULTILINE)
        record, other = (next(r for r in records(Path(out)) if r["kind"] == "iter") for out in (name, "one"))
        # all ranks together do the work of one
        assert record["mfu"] * record["seconds"] * first == pytest.approx(other["mfu"] * other["seconds"], rel=1e-9)
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(4 * 2 * 16, rel=1e-9)
        train(then, out_dir=name, init_from="resume", max_iters=10, **changes)
        for kind in ("iter", "eval"):
            assert numbers(name, kind) == pytest.approx(numbers("one", kind), rel=1e-5)
        assert_same_state("one", name)


@pytest.mark.slow
def test_shares_compiled_in_bfloat16(here, compiler):
    changes = dict(shard=True, n_layer=3, bias=True, dtype="bfloat16")
    train(1, out_dir="one", **changes)
    said = train(2, out_dir="two", compile=True, **changes)
    assert "going on without it" not in said
    for kind in ("iter", "eval"):
        alike = {
            (n, name): pytest.approx(value, rel=5e-2 if name == "grad_norm" else 1e-2)
            for (n, name), value in numbers("one", kind).items()
        }
        assert numbers("two", kind) == alike
    assert {weight.dtype for weight in last(here / "two")["model"].values()} == {torch.float32}


@pytest.mark.slow
def test_what_ranks_tell_each_other_and_what_each_holds_of_a_sharded_model(here):
    """Every answer is the largest value of the previous call, the same on both ranks. Each holds half of all
    parameters, gradients and moments, and one whole block at a time, in bfloat16."""
    script = """
        import os
        import torch
        from torch.distributed.tensor import DTensor
        from tests.train import steps
        from train.distributed import process_group, world_from_environment
        from train.shard import ShardedAdamW, share_out
        from train.step import TrainStep

        world = world_from_environment()
        with process_group(world, "auto", steps.CPU):
            told = [world.agree(value) for value in (0, 2 * world.rank, 0, 1 - world.rank, 0)]
            assert told == [0, 0, 2, 0, 1], told
            assert world.from_master(7 + world.rank, 0.1 - world.rank) == [7, 0.1]

            model = steps.small_model(dtype=torch.bfloat16, n_layer=2, vocab_size=32)
            share_out(model, world, steps.CPU)
            optimizer = ShardedAdamW(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
            seen = []
            first, second = model.transformer.h

            def look(block, args):  # while the second block is gathered
                seen.extend((args[0].dtype, block.attn.c_attn.weight.dtype, type(first.attn.c_attn.weight.data)))

            second.register_forward_pre_hook(look)
            step, batch = TrainStep(model, optimizer, grad_clip=1.0), steps.batch(0)
            step.micro_step(batch.x[0], batch.y[0])
            half = model.get_num_params(non_embedding=False) / 2
            assert sum(p.to_local().numel() for p in model.parameters()) == half
            assert sum(p.grad.to_local().numel() for p in model.parameters()) == half
            step.update()
            assert sum(state["exp_avg"].to_local().numel() for state in optimizer.state.values()) == half
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            assert seen == [torch.float32, torch.bfloat16, DTensor], seen
        os._exit(0)  # as the command ends: see train/__main__.py
    """
    Path("driver.py").write_text(textwrap.dedent(script))
    torchrun = start(2, "driver.py")
    _, err = finish(torchrun)
    assert torchrun.returncode == 0, err


# Ends


def await_iterations(process: subprocess.Popen) -> None:
    while process.poll() is None and sum(record["kind"] == "iter" for record in records(Path("out"))) < 3:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "fails"), [(False, False), (True, False), (False, True)])
def test_a_rank_that_dies_or_fails_costs_the_others_one_line(here, monkeypatch, shard, fails):
    """Without torchrun, which would end them too. One that fails says why, and waits for nobody."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    ranks = []
    for rank in ("0", "1"):
        place(monkeypatch, rank, rank, "2")
        data = make_data(here / rank)
        ranks.append(start(1, "-m", "train", *arguments(**ENDLESS | {"dataset": data}, shard=shard)))
    await_iterations(ranks[0])
    if fails:
        os.truncate(here / "1" / "train.bin", 100)
    else:
        ranks[1].kill()
    _, err = finish(ranks[0])
    assert finish(ranks[1])[1].count("it was cut short under the run") == fails
    assert ranks[0].returncode == 1
    assert re.fullmatch(r"error: rank 0: another rank has ended[^\n]*\n", err)


@pytest.mark.slow
@pytest.mark.parametrize(("lacks", "status"), [("ckpt-best.pt", 0), ("ckpt.pt", 2)])
def test_a_machine_that_has_not_all_of_rank_0s_files(here, monkeypatch, lacks, status):
    """Without the best checkpoint it goes on as rank 0 does. Another latest one is refused."""
    settings = dict(eval_interval=2, always_save_checkpoint=False)
    run(here / "0" / "out", max_iters=4, warmup_iters=0, lr_decay_iters=3, min_lr=0.0, **settings)
    worse = dict(learning_rate=0.5, decay_lr=False, max_iters=100)
    resume(here / "0" / "out", at={2: send(signal.SIGINT)}, **worse)
    shutil.copytree(here / "0", here / "1")
    best = here / "1" / "out" / "ckpt-best.pt"
    os.replace(best, best.with_name("ckpt.pt") if lacks == "ckpt.pt" else here / "elsewhere.pt")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ranks = []
    for rank in ("0", "1"):
        place(monkeypatch, rank, "0", "2")
        monkeypatch.chdir(here / rank)
        ranks.append(start(1, "-m", "train", "--init_from=resume", "--max_iters=12", "--out_dir=out"))
    said = [finish(rank) for rank in ranks]
    assert ranks[1].returncode == status, said
    assert ("got a checkpoint of iteration 4, other than rank 0" in said[1][1]) == bool(status)
    assert ("iteration 7; best validation loss" in said[0][0]) == (not status)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_torchruns_end_lets_the_ranks_save(here, number):
    """Killed outright, it ends nobody: the ranks notice."""
    torchrun = start(2, "-m", "train", *arguments(**ENDLESS | {"eval_interval": 10**6}))
    await_iterations(torchrun)
    torchrun.send_signal(number)
    out, err = finish(torchrun)
    assert torchrun.returncode != 0
    gone = "torchrun has gone: " if number == signal.SIGKILL else ""
    done = re.search(rf"^{gone}interrupted after (\d+) iterations$", out, re.MULTILINE)
    assert done, out + err
    saved = last(here / "out")
    iterations = [record["iter"] for record in records(here / "out") if record["kind"] == "iter"]
    assert saved["iter_num"] == int(done[1]) == iterations[-1] + 1
    assert saved["best_val_loss"] < 1e9


def test_a_rank_without_torchrun_saves_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "world_from_environment", lambda: World(parent=os.getppid() + 1))
    assert run(tmp_path / "out", max_iters=100) == 128 + signal.SIGTERM
    assert "torchrun has gone: interrupted after 1 iterations" in capsys.readouterr().out
    assert last(tmp_path / "out")["iter_num"] == 1
