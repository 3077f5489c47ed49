"""Checkpoints: whole after a kill at any instant, refused by name when damaged, and nanoGPT's either way round."""

import errno
import math
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train import checkpoint
from train.errors import UserError

MODEL_ARGS = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=True, vocab_size=32, dropout=0.0)


def make_model(seed: int = 0, width: int = 8) -> torch.nn.Module:
    """Named and tied like nanoGPT's GPT, with the fewest layers that have both kinds of parameter."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(width, 32, bias=False)
    embedding = torch.nn.Embedding(32, width)
    embedding.weight = linear.weight
    return torch.nn.ModuleDict(
        {
            "transformer": torch.nn.ModuleDict({"wte": embedding, "ln_f": torch.nn.LayerNorm(width)}),
            "lm_head": linear,
        }
    )


def make_adamw(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **({"lr": 1e-3, "betas": (0.9, 0.95)} | options))


def train(model: torch.nn.Module, optimizer: torch.optim.AdamW, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def make_checkpoint(iteration: int = 3, **changes) -> dict:
    """One whose every weight equals its iteration, so that a mix of two would show."""
    model = make_model()
    for p in model.parameters():
        torch.nn.init.constant_(p, iteration)
    optimizer = make_adamw(model)
    train(model, optimizer, 1)
    for p in model.parameters():
        torch.nn.init.constant_(p, iteration)
    packed = checkpoint.pack(
        model.state_dict(),
        optimizer.state_dict(),
        MODEL_ARGS,
        iteration,
        1.5,
        {"dataset": "docs"},
        {"gelu": "erf"},
    )
    return packed | changes


def make_nanogpt(iteration: int = 3, prefix: str = "", **changes) -> dict:
    """As nanoGPT's train.py saves it."""
    model = make_model()
    optimizer = make_adamw(model)
    train(model, optimizer, iteration)
    return {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": MODEL_ARGS,
        "iter_num": iteration,
        "best_val_loss": torch.tensor(1.25),
        "config": {"out_dir": "out", "dropout": 0.0, "compile": True},
    } | changes


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved_iterations(out_dir: Path) -> list[int]:
    return [
        checkpoint.load(path)["iter_num"]
        for path in sorted(out_dir.glob("ckpt*.pt"), key=lambda p: len(p.name))
    ]


# One save


def test_round_trip(tmp_path):
    saved = make_checkpoint(7)
    checkpoint.save(tmp_path / "new" / "out", saved, keep=2)
    loaded = checkpoint.load(tmp_path / "new" / "out" / "ckpt.pt")
    assert_same(loaded, saved)
    model = loaded["model"]
    assert model["lm_head.weight"].data_ptr() == model["transformer.wte.weight"].data_ptr()  # still tied
    assert os.listdir(tmp_path / "new" / "out") == ["ckpt.pt"]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_keeps_that_many_the_newest(tmp_path, keep):
    for iteration in range(6):
        checkpoint.save(tmp_path, make_checkpoint(iteration), keep)
    names = ["ckpt.pt", *(f"ckpt-previous-{i}.pt" for i in range(1, keep))]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert [checkpoint.load(tmp_path / name)["iter_num"] for name in names] == list(range(5, 5 - keep, -1))


def test_keeping_fewer_than_before_removes_the_rest(tmp_path):
    for iteration in range(4):
        checkpoint.save(tmp_path, make_checkpoint(iteration), keep=4)
    checkpoint.save(tmp_path, make_checkpoint(4), keep=2)
    assert saved_iterations(tmp_path) == [4, 3]


def test_removes_its_own_stale_files_and_no_others(tmp_path):
    (tmp_path / "ckpt.pt.saving-0123").write_bytes(b"half")
    theirs = ["ckpt.pt.bak", "ckpt-previous-best.pt", "notes.tmp"]
    for name in theirs:
        (tmp_path / name).write_bytes(b"the user's")
    checkpoint.save(tmp_path, make_checkpoint(), keep=1)
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "ckpt.pt"])


def test_without_hard_links_the_previous_one_is_a_copy(tmp_path, monkeypatch):
    def link(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for iteration in range(3):
        checkpoint.save(tmp_path, make_checkpoint(iteration), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["ckpt-previous-1.pt", "ckpt.pt"]
    assert saved_iterations(tmp_path) == [2, 1]


@pytest.mark.parametrize("where", ["config", "extra"])
def test_pack_refuses_what_load_would(where):
    import numpy

    state = make_nanogpt()
    values = {"config": {}, "extra": {}} | {where: {"lr": [numpy.float32(1)]}}
    with pytest.raises(ValueError, match=r"\['lr'\]\[0\] is a float32"):
        checkpoint.pack(state["model"], state["optimizer"], MODEL_ARGS, 1, 1.0, **values)


# Kills


class Killed(BaseException):
    """Not an Exception, as a kill is not."""


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_every_system_call_leaves_old_or_new(tmp_path, monkeypatch, after, links):
    """Die just before or just after the k-th call that touches the disk, for every k, then save once more."""
    calls = {name: getattr(os, name) for name in ("fsync", "replace", "link", "unlink")}
    countdown = math.inf

    def dying(name):
        def call(*args, **kwargs):
            nonlocal countdown
            countdown -= 1
            if countdown < 0 or (countdown == 0 and not after):
                raise Killed  # and so do the clean-ups that follow: the dead clean up nothing
            if name == "link" and not links:
                raise OSError(errno.ENOTSUP, "no links here")
            result = calls[name](*args, **kwargs)
            if countdown == 0:
                raise Killed
            return result

        return call

    for name in calls:
        monkeypatch.setattr(os, name, dying(name))
    for k in range(1, 100):
        out_dir = tmp_path / str(k)
        for iteration in (1, 2, 3):
            checkpoint.save(out_dir, make_checkpoint(iteration), keep=3)
        countdown = k
        try:
            checkpoint.save(out_dir, make_checkpoint(4), keep=3)
        except Killed:
            killed = True
        else:
            killed = False
        countdown = math.inf
        kept = saved_iterations(out_dir)  # every one of them loads
        assert kept[0] in (3, 4)
        assert 2 in kept
        checkpoint.save(out_dir, make_checkpoint(5), keep=3)
        assert not list(out_dir.glob("*.saving-*"))
        kept = saved_iterations(out_dir)
        assert kept[0] == 5
        assert {2, 3} & set(kept[1:]), kept
        assert kept == sorted(kept, reverse=True)
        if not killed:
            break
    assert k > 6  # fsync, replace, link, replace, replace, fsync: it was killed in each of them


def test_a_kill_within_the_write_leaves_the_old_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make_checkpoint(1), keep=2)

    def half(_, file):
        file.write(b"PK\x03\x04")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", half)
        checkpoint.save(tmp_path, make_checkpoint(2), keep=2)
    assert saved_iterations(tmp_path) == [1]


def run_script(script: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_twenty_sigkills_at_random_instants(tmp_path):
    """A child saves without end and tells each completed save; its parent kills it, loads, and lets the next go on."""
    out = run_script(
        """
        import os, random, signal, sys, time
        from pathlib import Path
        import torch
        from train import checkpoint

        out_dir, seed = Path(sys.argv[1]), int(sys.argv[2])
        print("seed", seed)
        rng = random.Random(seed)
        args = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False, vocab_size=8, dropout=0.0)

        def make(i):
            moments = {"step": torch.tensor(float(i)), "exp_avg": torch.full((400_000,), float(i)),
                       "exp_avg_sq": torch.full((400_000,), float(i))}
            optimizer = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
            return checkpoint.pack({"w": torch.full((400_000,), float(i))}, optimizer, args, i, 1.0, {}, {})

        def save_without_end(start, pipe):
            for i in range(start, 10**9):
                checkpoint.save(out_dir, make(i), keep=2)
                os.write(pipe, f"{i}\\n".encode())

        reached, inside = 0, 0
        for kill in range(20):
            told, tell = os.pipe()
            child = os.fork()
            if child == 0:
                save_without_end(reached + 1, tell)
            os.close(tell)
            if kill == 0:
                os.read(told, 1)  # the first save of all has nothing to fall back on
            time.sleep(rng.uniform(0, 0.08))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines = b"".join(iter(lambda: os.read(told, 4096), b"")).split()
            os.close(told)
            inside += bool(list(out_dir.glob("*.saving-*")))
            completed = max([reached, *(int(line) for line in lines)])
            for path in out_dir.glob("ckpt*.pt"):
                held = checkpoint.load(path)
                i = held["iter_num"]
                for tensor in (held["model"]["w"], *held["optimizer"]["state"][0].values()):
                    assert bool((tensor == i).all()), (path, i)
            reached = checkpoint.load(out_dir / "ckpt.pt")["iter_num"]
            assert completed <= reached <= completed + 1, (completed, reached)
        assert reached > 0
        print("reached", reached, "kills within a save", inside)
        """,
        tmp_path,
        20240601,
    )
    assert "reached" in out


# A full disk


@pytest.mark.parametrize("before", [True, False], ids=["with an old one", "the first"])
def test_full_disk(tmp_path, before):
    out = run_script(
        """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from train import checkpoint
        from train.errors import UserError

        out_dir, before = Path(sys.argv[1]), sys.argv[2] == "True"
        args = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False, vocab_size=8, dropout=0.0)
        make = lambda i, n: checkpoint.pack(
            {"w": torch.full((n,), float(i))}, {"state": {}, "param_groups": [{"params": [0]}]}, args, i, 1.0, {}, {})
        if before:
            checkpoint.save(out_dir, make(1, 1000), keep=2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write returns EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        for size in (26_000, 1_000_000):  # fails in the closing flush; fails in the middle of a tensor
            try:
                checkpoint.save(out_dir, make(2, size), keep=2)
            except UserError as error:
                print(error)
            else:
                sys.exit("no error")
        """,
        tmp_path,
        before,
    )
    for line, needs in zip(out.splitlines(), ["0.10 MB", "4.00 MB"], strict=True):
        assert f"out_dir={tmp_path}: no room" in line
        assert f"needs {needs}" in line
        assert "MB are free (File too large)" in line
    if before:
        assert os.listdir(tmp_path) == ["ckpt.pt"]
        assert checkpoint.load(tmp_path / "ckpt.pt")["iter_num"] == 1
    else:
        assert os.listdir(tmp_path) == []


def test_no_space_for_the_copy_of_the_previous_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make_checkpoint(1), keep=2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(UserError, match=r"no room for the checkpoint: .*No space left"):
        checkpoint.save(tmp_path, make_checkpoint(2), keep=2)
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert saved_iterations(tmp_path) == [1]


def test_out_dir_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"out_dir=.*could not be written"):
        checkpoint.save(tmp_path / "out", make_checkpoint(), keep=2)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_error_that_is_not_the_disks_is_not_dressed_as_one(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        checkpoint.save(tmp_path, make_checkpoint(), keep=2)


# What is refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint.save(folder, make_checkpoint(3), keep=1)
    return (folder / "ckpt.pt").read_bytes()


def test_truncated_at_many_lengths(tmp_path, whole):
    path = tmp_path / "ckpt.pt"
    for length in {*range(8), *range(0, len(whole), 37), *range(len(whole) - 30, len(whole))}:
        path.write_bytes(whole[:length])
        assert str(path) in refusal(path)
    path.write_bytes(whole)
    checkpoint.load(path)


def test_truncated_says_so(tmp_path, whole):
    (tmp_path / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    assert "is cut short" in refusal(tmp_path / "ckpt.pt")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_harmless(tmp_path, whole, data):
    """Harmless: in the padding, or in a field of the zip directory that means nothing here (a date, a permission)."""
    position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << bit
    path = tmp_path / "ckpt.pt"
    path.write_bytes(flipped)
    try:
        loaded = checkpoint.load(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert_same(loaded, make_checkpoint(3))


def test_every_flip_within_a_tensor_is_refused_though_torch_takes_it(tmp_path, whole):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    assert member.file_size >= 1024
    header = 30 + int.from_bytes(whole[member.header_offset + 26 :][:2], "little")
    header += int.from_bytes(whole[member.header_offset + 28 :][:2], "little")
    for offset in (0, 511, member.file_size - 1):
        flipped = bytearray(whole)
        flipped[member.header_offset + header + offset] ^= 0x40
        path.write_bytes(flipped)
        torch.load(path, weights_only=True)  # why load checks the CRCs itself
        assert f"is damaged: its member {member.filename}" in refusal(path)


def foreign_files() -> dict:
    def of(value):
        return lambda path: torch.save(value, path)

    def other(**changes):
        return of(make_nanogpt(**changes))

    def without(key):
        return of({k: v for k, v in make_nanogpt().items() if k != key})

    def safetensors(path):
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(3)}, path)

    def archive(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("word/document.xml", "<xml/>")

    bad_args = [
        {"n_layer": 0},
        {"n_head": 2.0},
        {"bias": 1},
        {"dropout": "no"},
        {"vocab_size": None},
        {"rope": True},
    ]
    return {
        "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
        "folder": (lambda path: path.mkdir(), "is a folder"),
        "text": (lambda path: path.write_text("hello " * 99), "not the zip archive"),
        "pickle": (lambda path: path.write_bytes(pickle.dumps({"model": {}})), "not the zip archive"),
        "legacy torch": (
            lambda path: torch.save(make_nanogpt(), path, _use_new_zipfile_serialization=False),
            "not the zip archive",
        ),
        "safetensors": (safetensors, "not the zip archive"),
        "another zip": (archive, "not a checkpoint that torch can read"),
        "a tensor": (of(torch.zeros(3)), "it holds a Tensor"),
        "an object": (of({"model": Path("x")}), "more than tensors and plain values"),
        "a state_dict": (of(make_model().state_dict()), "it has no model, optimizer"),
        **{f"no {key}": (without(key), f"it has no {key}") for key in make_nanogpt()},
        "model a list": (other(model=[torch.zeros(1)]), "its model is not a dict"),
        "model empty": (other(model={}), "its model is not a dict"),
        "model of numbers": (other(model={"w": 1.0}), "its model has 'w', a float"),
        "optimizer a list": (other(optimizer=[]), "its optimizer is not"),
        "optimizer without groups": (other(optimizer={"state": {}}), "its optimizer is not"),
        "iter_num a string": (other(iter_num="5"), "its iter_num is '5'"),
        "iter_num negative": (other(iter_num=-1), "its iter_num is -1"),
        "best_val_loss None": (other(best_val_loss=None), "its best_val_loss is a NoneType"),
        "best_val_loss a vector": (other(best_val_loss=torch.zeros(2)), "its best_val_loss is a Tensor"),
        "config a list": (other(config=[]), "its config or nanofuse"),
        "nanofuse a list": (other(nanofuse=[]), "its config or nanofuse"),
        "model_args a list": (other(model_args=[1]), "its model_args are list"),
        "model_args short": (other(model_args={"n_layer": 1}), "its model_args are n_layer,"),
        **{
            f"model_args {bad}": (other(model_args=MODEL_ARGS | bad), f"its {next(iter(bad))} is")
            for bad in bad_args[:-1]
        },
        "model_args of another model": (other(model_args=MODEL_ARGS | bad_args[-1]), "rope"),
    }


FOREIGN = foreign_files()


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(tmp_path, kind):
    make, says = FOREIGN[kind]
    path = tmp_path / "ckpt.pt"
    make(path)
    message = refusal(path)
    assert str(path) in message
    assert says in message


def test_missing_names_out_dir_and_init_from(tmp_path):
    message = refusal(tmp_path / "ckpt.pt")
    assert f"out_dir={tmp_path}" in message
    assert "init_from=resume" in message


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_the_previous_one_is_offered_and_the_offer_works(tmp_path, damage):
    out_dir = tmp_path / "my out"
    for iteration in (1, 2, 3):
        checkpoint.save(out_dir, make_checkpoint(iteration), keep=3)
    path = out_dir / "ckpt.pt"
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:-100])
    elif damage == "flipped":
        path.write_bytes(whole[:1500] + bytes([whole[1500] ^ 1]) + whole[1501:])
    message = refusal(path)
    assert "iteration 2, is whole" in message
    subprocess.run(message.split("`")[1], shell=True, check=True)
    assert checkpoint.load(path)["iter_num"] == 2


def test_a_previous_one_that_is_damaged_is_not_offered(tmp_path):
    for iteration in (1, 2, 3):
        checkpoint.save(tmp_path, make_checkpoint(iteration), keep=3)
    for name in ("ckpt.pt", "ckpt-previous-1.pt"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-100])
    assert "iteration 1, is whole" in refusal(tmp_path / "ckpt.pt")
    (tmp_path / "ckpt-previous-2.pt").write_bytes(b"")
    assert "is whole" not in refusal(tmp_path / "ckpt.pt")


# nanoGPT's, and for nanoGPT


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_loads_nanogpts(tmp_path, prefix):
    theirs = make_nanogpt(prefix=prefix)
    torch.save(theirs, tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert_same(dict(loaded["model"]), dict(make_nanogpt()["model"]))
    assert_same(loaded["best_val_loss"], 1.25)
    assert loaded["nanofuse"] == {}
    for key in ("optimizer", "model_args", "iter_num", "config"):
        assert_same(loaded[key], theirs[key])


def test_nanogpts_causal_masks_are_dropped(tmp_path):
    theirs = make_nanogpt()
    theirs["model"] |= {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16),
        "transformer.h.0.attn.c_attn.bias": torch.ones(24),
    }
    torch.save(theirs, tmp_path / "ckpt.pt")
    model = checkpoint.load(tmp_path / "ckpt.pt")["model"]
    assert "transformer.h.0.attn.bias" not in model
    assert "transformer.h.0.attn.c_attn.bias" in model


def test_nanogpt_loads_ours(tmp_path):
    """What its train.py and sample.py do with a checkpoint, word for word."""
    model = make_model()
    optimizer = make_adamw(model, fused=True)
    train(model, optimizer, 3)
    # a run under CUDA graphs: its rate in a tensor, its AdamW capturable
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"lr": torch.tensor(1e-3), "capturable": True}
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    packed = checkpoint.pack(
        compiled, state, MODEL_ARGS, 3, torch.tensor(1.5), {"dataset": "docs"}, {"chars": ["a"]}
    )
    checkpoint.save(tmp_path, packed, keep=2)

    loaded = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    assert list(loaded["model_args"]) == [
        "n_layer",
        "n_head",
        "n_embd",
        "block_size",
        "bias",
        "vocab_size",
        "dropout",
    ]
    assert type(loaded["best_val_loss"]) is float
    assert all(
        type(value) is int for key, value in loaded["model_args"].items() if key not in ("bias", "dropout")
    )
    twin = make_model(seed=9)
    twin.load_state_dict(loaded["model"])
    theirs = make_adamw(twin)
    theirs.load_state_dict(loaded["optimizer"])
    train(model, optimizer, 2, seed=5)
    train(twin, theirs, 2, seed=5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


# The optimizer


@pytest.mark.parametrize("source", [True, False, None])
@pytest.mark.parametrize("target", [True, False, None])
def test_optimizer_goes_on_where_it_was(tmp_path, source, target):
    """In whatever implementation of AdamW it was and is now: same moments, same count, and this one's own flags."""
    model, twin = make_model(), make_model(seed=9)
    before = make_adamw(model, fused=source)
    train(model, before, 3)
    torch.save(make_nanogpt(model=model.state_dict(), optimizer=before.state_dict()), tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")

    rate = torch.tensor(2e-3) if target else 2e-3
    after = make_adamw(twin, fused=target, lr=rate, betas=(0.8, 0.9))
    after.param_groups[0]["weight_decay"] = 0.3
    flags = [{k: v for k, v in group.items() if k != "params"} for group in after.param_groups]
    twin.load_state_dict(loaded["model"])
    checkpoint.load_optimizer(after, loaded["optimizer"])

    for group, expected in zip(after.param_groups, flags, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == expected
        assert group["lr"] is rate  # a step captured in a graph reads this very tensor
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(before.state[p], after.state[q])

    for group, like in zip(before.param_groups, after.param_groups, strict=True):
        group |= {k: like[k] for k in ("betas", "weight_decay", "fused", "lr")}
    train(model, before, 3, seed=2)
    train(twin, after, 3, seed=2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_optimizer_takes_a_count_that_is_a_number():
    model = make_model()
    old = make_adamw(model)
    train(model, old, 3)
    state = old.state_dict()
    for entry in state["state"].values():
        entry["step"] = 3
    for fused in (True, False):
        new = make_adamw(model, fused=fused)
        checkpoint.load_optimizer(new, state)
        steps = [entry["step"] for entry in new.state.values()]
        assert [(s.item(), s.dtype) for s in steps] == [(3.0, torch.float32)] * 3
        train(model, new, 1)


def test_optimizer_before_its_first_step():
    optimizer = make_adamw(make_model())
    checkpoint.load_optimizer(optimizer, make_adamw(make_model()).state_dict())
    assert not optimizer.state


def test_optimizer_of_another_model_is_refused():
    model = make_model(width=16)
    wide = make_adamw(model)
    train(model, wide, 1)
    narrow = make_adamw(make_model())
    with pytest.raises(UserError, match=r"tensor 0 the shape \[32, 16\], this model \[32, 8\]"):
        checkpoint.load_optimizer(narrow, wide.state_dict())
    assert not narrow.state
    only = torch.optim.AdamW(make_model().parameters())
    with pytest.raises(UserError, match=r"groups of 3 tensors, this model's 1 and 2"):
        checkpoint.load_optimizer(narrow, only.state_dict())
    state = wide.state_dict()
    del state["state"][1]
    with pytest.raises(UserError, match="tensor 1 no step"):
        checkpoint.load_optimizer(make_adamw(make_model(width=16)), state)


def test_another_optimizer_is_refused():
    model = make_model()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) is decay]} for decay in (True, False)
    ]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    train(model, sgd, 1)
    with pytest.raises(UserError, match="it is not an AdamW's"):
        checkpoint.load_optimizer(make_adamw(model), sgd.state_dict())


# An out_dir that is not empty


def test_set_aside_moves_what_a_run_wrote_and_nothing_else(tmp_path):
    assert checkpoint.set_aside(tmp_path) is None
    assert checkpoint.set_aside(tmp_path / "not there") is None
    for iteration in (1, 2):
        checkpoint.save(tmp_path, make_checkpoint(iteration), keep=2)
    for name in ("metrics.jsonl", "loss.png", "loss.svg", "notes.txt", "train_loss.png"):
        (tmp_path / name).write_text(name)
    folder = checkpoint.set_aside(tmp_path)
    assert folder.parent == tmp_path
    assert sorted(os.listdir(tmp_path)) == [folder.name, "notes.txt", "train_loss.png"]
    moved = ["ckpt-previous-1.pt", "ckpt.pt", "loss.png", "loss.svg", "metrics.jsonl"]
    assert sorted(os.listdir(folder)) == moved
    assert saved_iterations(folder) == [2, 1]
    assert checkpoint.set_aside(tmp_path) is None


def test_set_aside_twice_in_a_second(tmp_path):
    folders = []
    for text in ("first", "second", "third"):
        (tmp_path / "metrics.jsonl").write_text(text)
        folders.append(checkpoint.set_aside(tmp_path))
    assert [(folder / "metrics.jsonl").read_text() for folder in folders] == ["first", "second", "third"]
