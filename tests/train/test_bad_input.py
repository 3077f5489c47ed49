"""Bad input gives one line and exit status 2, and writes nothing."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.train.jobs import CHARS, arguments, make_data
from train import checkpoint
from train.__main__ import main
from train.errors import run


@pytest.fixture
def start(here, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run `python -m train` with these words and a short job's settings. Returns (exit status, stdout, stderr)."""

    def start(*words: str, **settings) -> tuple[int, str, str]:
        short = dict(max_iters=2, eval_interval=2, eval_iters=1)
        monkeypatch.setattr(sys, "argv", ["train", *words, *arguments(**short | settings)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return ended.value.code, *capsys.readouterr()

    return start


@pytest.fixture
def refusal(here, start) -> Callable[..., str]:
    """The error line of a refused command. Nothing else may be printed, and nothing written."""

    def tree() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in here.rglob("*")}

    def refusal(*words: str, **settings) -> str:
        before = tree()
        status, out, err = start(*words, **settings)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert tree() == before
        return err

    return refusal


def test_what_a_config_file_holds_without_effect_is_said_first(here, start):
    """And the job is good, but for what the other tests change."""
    (here / "fork.py").write_text("lora_rank = 8\nsteps = 2e0\nlog_interval = steps\n")
    status, out, err = start("fork.py", warmup_iters=5000)
    assert (status, err) == (0, "")
    first, second, third, *rest = out.splitlines()
    assert first == "fork.py: names that are no settings here, left out: lora_rank"
    assert second.startswith("warmup_iters: 5000 is more than lr_decay_iters (20): the rate rises for 5000 steps")
    assert third.startswith("fork.py over the defaults; dataset letters")
    assert "2 iterations done" in rest
    assert (here / "out" / "ckpt.pt").is_file()


SETTINGS = [
    ("--device=cuda:7", "device: got 'cuda:7', expected one of: auto, cpu"),
    ("--dtype=float16", "dtype: got 'float16', expected one of: .*float32.* .on cpu."),
    ("--block_size=500", "block_size=500: .*val.bin .*500 tokens.* at least 501"),
    ("--dataset=numbers", "data/numbers: no such dataset; .*python -m train.prepare FILE ... --dataset=numbers"),
    ("--init_from=resume", "init_from=resume: there is no .*ckpt.pt"),
    ("--init_from=gpt3 --dataset=numbers", "init_from=gpt3: .*no such file.* gpt2-xl"),  # said before the dataset
    ("--init_from=data/letters/train.bin", "init_from=data/letters/train.bin: .*not a whole safetensors file"),
    ("--init_from=gpt2 --block_size=16", "init_from=gpt2: .*path of a model.safetensors"),
    ("--out_dir=data/letters/train.bin/deeper", "data/letters/train.bin is no folder that can be written"),
    (f"--out_dir={'x' * 300}", "out_dir: got 'x.*File name too long"),
    ("--wandb_log=True", "wandb_log: .* not installed; pip install 'nanofuse.wandb.'"),
    ("--tensorboard_log=True", "tensorboard_log: .* not installed; pip install 'nanofuse.tensorboard.'"),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS, ids=[changes for changes, _ in SETTINGS])
def test_a_setting_that_cannot_be(refusal, monkeypatch, changes, message):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    for module in ("huggingface_hub", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("train.state.GPT", lambda *args: pytest.fail("a model was built"))
    settings = dict(re.findall(r"--(\w+)=(\S+)", changes))  # these replace the short job's
    assert re.search(message, refusal(**settings))


def test_a_checkpoint_of_another_shape_and_one_whose_parts_disagree(refusal, here, start):
    assert start()[0] == 0
    make_data(here / "data" / "more", chars=CHARS + "0")
    for changes, message in (
        (dict(block_size=17), "block_size: got 17, expected at most 16, the positions that the weights of"),
        (dict(n_layer=2), "n_layer: got 2, expected 1, as the weights of init_from=resume have"),
        (dict(bias=True), "bias: got True, expected False"),
        (dict(gelu="tanh"), "gelu: got tanh, expected erf"),
        (dict(dataset="more"), "dataset=more: it has 33 different tokens, the model 32"),
    ):
        assert message in refusal(init_from="resume", **changes)

    path = here / "out" / "ckpt.pt"
    good = checkpoint.load(path)
    torch.save(good | {"model_args": good["model_args"] | {"n_layer": 2}}, path)
    assert re.search(r"init_from=resume: .*transformer\.h\.1", refusal(init_from="resume", n_layer=2))
