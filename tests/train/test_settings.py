"""The command line, config files, none of which is executed, presets, and how a run's settings are put together."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.jobs import ROOT
from train.config import TrainConfig, choose_base, compose, parse
from train.errors import UserError
from train.sample import SampleConfig
from train.settings import PRESETS, Parsed, command_line, settings_of

FIELDS = settings_of(TrainConfig)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--batch-size=2", "--batch_size", "3", "--seed=1e5"], {"batch_size": 3, "seed": 100000}),
        (["--min-lr=1", "--learning-rate", "-1e-3"], {"min_lr": 1.0, "learning_rate": -1e-3}),
        (["--wandb_run_name=a=b", "--wandb_project=5"], {"wandb_run_name": "a=b", "wandb_project": "5"}),
        (["--wandb_run_name='a\\nb'", "--wandb_project='a"], {"wandb_run_name": "a\nb", "wandb_project": "'a"}),
        (["--bias", "--no-compile", "--decay_lr=True"], {"bias": True, "compile": False, "decay_lr": True}),
        (["--bias", "true", "--compile=FALSE", "--compile"], {"bias": True, "compile": True}),
        (["--rehearse", "--seed=1"], {"rehearse": "auto", "seed": 1}),
        (["--rehearse", "h100", "--seed=1"], {"rehearse": "h100", "seed": 1}),
        (["--out_dir=~/a", "--wandb_project=~/x"], {"out_dir": os.path.expanduser("~/a"), "wandb_project": "~/x"}),
    ],
)
def test_every_spelling_of_a_setting(argv, wanted):
    parsed = parse(argv)
    assert parsed.settings == wanted
    assert all(type(value) is type(FIELDS[name].default) for name, value in parsed.settings.items())
    assert parsed.sources == []


AT_LEAST_1 = (
    "batch_size", "block_size", "n_layer", "n_head", "n_embd", "eval_interval", "log_interval", "eval_iters",
    "gradient_accumulation_steps", "keep_checkpoints",
)  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--batch_siz=1", "unknown setting 'batch_siz' (did you mean batch_size?)"),
        ("--no-batch_size", "unknown setting 'no_batch_size'"),
        ("--batch_size=5*8", "batch_size: got '5*8' (str), expected int"),
        ("--batch_size --seed=1", "batch_size: got no value, expected --batch_size=12"),
        ("--compile=1", "compile: got 1 (int), expected bool"),
        ("--dtype=bf16", "dtype: got 'bf16', expected auto | float32 | bfloat16 | float16 (did you mean bfloat16?)"),
        ("-batch_size=3", "settings are written --key=value, with two dashes"),
        ("batch_size=3", "'batch_size=3': neither a config file nor a preset"),
        ("config/train_gpt2.py", "(did you mean gpt2?); settings are written --key=value"),
        ("wibble", "; the presets are docs, docs_cpu, "),
        ("tests", "tests: cannot be read as a config file: Is a directory"),
        # values that no machine could make work
        ("--n_head=5", "n_embd: got 768, expected a multiple of n_head (5)"),
        *((f"--{name}=0", f"{name}: got 0, expected at least 1") for name in AT_LEAST_1),
        *((f"--{name}=-1", f"{name}: got -1") for name in ("max_iters", "patience", "seed", "learning_rate")),
        *((f"--{name}=1", f"{name}: got 1.0, expected below 1") for name in ("dropout", "beta1", "beta2")),
        ("--learning_rate=1e999", "learning_rate: got inf, expected below 3.4e+38"),
        ("--seed=0x" + "f" * 6000, "seed: got a int, too large to be shown, expected below 9223372036854775808"),
        ("--batch_size=4097", "batch_size * block_size: got 4195328 tokens, expected at most 4194304"),
        ("--gradient_accumulation_steps=1000000", "block_size: got 12288000000 tokens, expected at most 268435456"),
        ("--gradient_accumulation_steps=10000000", "gradient_accumulation_steps: got 10000000, expected below 1048576"),
        ("--min_lr=1" + "0" * 400, "min_lr: got inf, expected below"),
        ("--seed=" + "1" * 9999, "seed: got '111"),
        *((f"--device={name}", f"device: got {name!r}, expected auto, cpu") for name in ("foo", "cuda:x", "")),
        *((f"--{name}=", f"{name}: got '', expected a name") for name in ("out_dir", "dataset", "init_from")),
        ("--n_layer=1000000", "n_layer: got 1000000, expected below 1025"),
    ],
    ids=lambda value: value[:40],
)
def test_a_wrong_argument_is_refused_with_a_hint(argument, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        compose(parse(argument.split()), {})
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 300


def test_presets_files_and_overrides_apply_in_argv_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2").write_text("batch_size = 7\nlr_decay_iters = max_iters\nmin_lr = learning_rate / 10\nmax_iters = 9\n")
    parsed = parse(["--batch_size=3", "--seed=5", "shakespeare_char", "./gpt2", "--learning_rate=1", "--max_iters=11"])
    assert parsed.sources == ["shakespeare_char", "./gpt2"]
    named = {"seed": 5, "batch_size": 7, "max_iters": 11, "n_layer": 6, "learning_rate": 1.0}
    read = {"lr_decay_iters": 5000, "min_lr": 1e-4}  # from what was said before
    assert {name: parsed.settings[name] for name in named | read} == named | read
    assert parse(["--rehearse", "gpt2"]).settings["block_size"] == 1024  # the preset, not the file of its name


def test_another_command_has_its_own_settings_and_files():
    read = functools.partial(command_line, SampleConfig, prog="python -m other", about="")
    assert read(["--top_k=1", "a", "b"], positional="FILE ...") == (SampleConfig(top_k=1), ["a", "b"])
    with pytest.raises(UserError, match="'gpt2': not a setting"):
        read(["gpt2"])
    with pytest.raises(UserError, match="num_samples: got 0, expected at least 1"):
        read(["--num_samples=0"])


@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig])
def test_help_lists_every_setting_and_preset_on_a_line_of_its_own(cls, capsys):
    argv = ["--seed=3", "-h", "--no-such"]  # the rest is not read
    with pytest.raises(SystemExit, match="0"):
        parse(argv) if cls is TrainConfig else command_line(cls, argv, "python -m other", "About it.")
    lines = capsys.readouterr().out.splitlines()
    for name, field in settings_of(cls).items():
        shown = field.default if name != "start" else r"'\n'"
        (line,) = [line for line in lines if line.startswith(f"  --{name}={shown} ")]
        assert field.metadata["help"] in line
    listed = [line.split()[0] for line in lines if line.endswith(".") and line.startswith("  ")]
    assert listed == (list(PRESETS) if cls is TrainConfig else [])


@pytest.mark.parametrize(
    ("argument", "status", "said"),
    [
        ("--help", 0, "usage: python -m train "),
        ("--device=foo", 2, "error: device: got 'foo', expected auto, cpu, "),
        ("--seed='\\d'", 2, "error: seed: got '\\\\d' (str), expected int"),  # without Python's warning
    ],
)
def test_help_and_refusals_come_before_torch_is_imported(argument, status, said, tmp_path):
    """Importing torch takes seconds. Here another module named torch comes first, and its import ends the process."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTHONWARNINGS": "default"}
    argv = [sys.executable, "-m", "train", argument]
    done = subprocess.run(argv, cwd=tmp_path, env=env, timeout=60, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (done.stdout or done.stderr).startswith(said)


# How settings are put together

# The defaults of nanoGPT's train.py. Ours differ in gradient_accumulation_steps, backend, device, dtype.
NANOGPT = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "batch_size": 12, "block_size": 1024,
    "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4,
    "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "compile": True,
}  # fmt: skip


def test_names_and_defaults_are_nanogpts():
    ours = dataclasses.asdict(TrainConfig())
    assert {name: ours.get(name) for name in NANOGPT} == NANOGPT
    assert ours["gradient_accumulation_steps"] == 1
    assert [ours[name] for name in ("backend", "device", "dtype", "gelu")] == ["auto"] * 4


def test_the_settings_below_those_that_are_named():
    for name, gpu, device in (("docs_cpu", False, "a CPU"), ("docs", True, "a GPU")):  # the default job for the machine
        why = f"preset {name}: no preset was named, and the device is {device}"
        assert choose_base(parse(["--seed=3"]), gpu=gpu) == (parse([name]).settings, why)
    stored = dataclasses.asdict(TrainConfig(n_layer=2, seed=7, learning_rate=1e-2)) | {"a_forks_own": 1}
    for argv in (["gpt2"], ["--init_from=gpt2"], ["eval_gpt2"], ["shakespeare_char", "--init_from=resume"]):
        assert choose_base(parse(argv), gpu=False, stored=stored) == ({}, "the defaults")
    parsed = parse(["--init_from=resume", "--max_iters=5"])  # goes on with its own settings
    base, _ = choose_base(parsed, gpu=True, stored=stored)
    assert compose(parsed, base) == TrainConfig(n_layer=2, seed=7, learning_rate=1e-2, init_from="resume", max_iters=5)
    with pytest.raises(UserError, match="batch_size: got '5'"):
        compose(Parsed(), {"batch_size": "5"})
    assert compose(Parsed(settings={"batch_size": 4}), {"batch_size": "5"}).batch_size == 4
    with pytest.raises(UserError, match=r"weight_decay: got nan, expected below 3\.4e\+38"):
        compose(Parsed(settings={"weight_decay": float("nan")}), stored)


# Config files

# The statements of nanoGPT's config files for training, without comments.
NANOGPT_CONFIGS = {
    "train_gpt2": "wandb_log = True\nwandb_project = 'owt'\nwandb_run_name='gpt2-124M'\nbatch_size = 12\n"
    "block_size = 1024\ngradient_accumulation_steps = 5 * 8\nmax_iters = 600000\nlr_decay_iters = 600000\n"
    "eval_interval = 1000\neval_iters = 200\nlog_interval = 10\nweight_decay = 1e-1\n",
    "train_shakespeare_char": "out_dir = 'out-shakespeare-char'\neval_interval = 250 # x\n"
    "eval_iters = 200\nlog_interval = 10\n"
    "always_save_checkpoint = False\nwandb_log = False\nwandb_project = 'shakespeare-char'\n"
    "wandb_run_name = 'mini-gpt'\ndataset = 'shakespeare_char'\ngradient_accumulation_steps = 1\n"
    "batch_size = 64\nblock_size = 256\nn_layer = 6\nn_head = 6\nn_embd = 384\ndropout = 0.2\n"
    "learning_rate = 1e-3\nmax_iters = 5000\nlr_decay_iters = 5000\nmin_lr = 1e-4\nbeta2 = 0.99\n"
    "warmup_iters = 100\n",
    "finetune_shakespeare": "import time\nout_dir = 'out-shakespeare'\neval_interval = 5\neval_iters = 40\n"
    "wandb_log = False\nwandb_project = 'shakespeare'\nwandb_run_name = 'ft-' + str(time.time())\n"
    "dataset = 'shakespeare'\ninit_from = 'gpt2-xl'\nalways_save_checkpoint = False\nbatch_size = 1\n"
    "gradient_accumulation_steps = 32\nmax_iters = 20\nlearning_rate = 3e-5\ndecay_lr = False\n",
}


@pytest.fixture
def load(tmp_path):
    """Load a config file with the given text. It is tmp_path / "mine.py"."""

    def load(text: str) -> dict:
        (tmp_path / "mine.py").write_text(text)
        return parse([str(tmp_path / "mine.py")]).settings

    return load


def executed(text: str) -> dict:
    """The settings that nanoGPT takes from a file: it runs it, with its defaults and its imports above."""
    assigned = {}
    exec(text, {name: field.default for name, field in FIELDS.items()} | {"os": os, "math": math}, assigned)
    return {name: value for name, value in assigned.items() if name in FIELDS}


@pytest.mark.parametrize("name", NANOGPT_CONFIGS)
def test_nanogpts_own_files_load_and_are_presets(name, load):
    got, theirs = load(NANOGPT_CONFIGS[name]), executed(NANOGPT_CONFIGS[name])
    if name == "finetune_shakespeare":
        assert got["wandb_run_name"].startswith("ft-1")
        theirs["wandb_run_name"] = got["wandb_run_name"] = "ft-gpt2-xl"
    assert list(got.items()) == list(theirs.items())
    theirs["wandb_log"] = False  # only the user switches on logging to a service
    assert compose(parse([name.removeprefix("train_")]), {}) == dataclasses.replace(TrainConfig(), **theirs)


def test_every_preset_is_valid():
    for name in PRESETS:
        assert not compose(parse([name]), {}).wandb_log


AS_IN_PYTHON = (
    "max_iters = (2 + 3) * 4 ** 2 // 3 % 7 - -1 + +2; lr_decay_iters = max_iters * 2; max_iters = max_iters + 1",
    "learning_rate = 1 / 8; min_lr = learning_rate / 10; beta1 = 10 ** -3; dropout = float('0.5')",
    '"""doc"""\n# comment\n\nbias = True; compile = not bias\nbatch_size = (\n    4 *\n    5\n)\r\n',
    "",
    "n_embd: int = 64 if n_layer > 6 and not bias else 32; n_layer = bias and 3 or 5; n_head = n_layer and 2 or 9",
    "compile = 1 <= 1; eval_only = 3 >= 3; bias = dataset == 'openwebtext'; decay_lr = 1 < 1; wandb_log = 1 != 2",
    "out_dir = 'out-' + \"a\" 'b'; n_layer = 6\ndataset = f'out-{n_layer:02d}-{learning_rate:.0e}-{dataset}'",
    "out_dir = str(int(3.7)) + str(min(8, 6)); n_layer = n_head = max(4, 2); n_layer += n_head; n_embd = abs(-6)",
    "beta1, beta2 = 0.5, 0.75; beta1, beta2 = beta2, beta1; x, n_layer = print, 2; max_iters *= 2",
    "out_dir = 'out-%d-%s' % (n_layer, dataset); dataset = '%05.1f%%' % 1; x = '2024-%s'; wandb_run_name = x % 'a'",
    "out_dir = '{{{:.2f}-{}}}'.format(1, 'b'); dataset = os.path.join('runs', str(round(2.5)))",
    "learning_rate = round(2 / 3, 3); out_dir = str(round(7, 1)) + str(round(1234, -2))",
    "n_layer = math.ceil(1.5); n_embd = int(math.sqrt(4096)); bias = 'z' in dataset; compile = 'z' not in dataset",
    "x = None; compile = x is None; eval_only = x is not None",
    "lora_rank = 8; tags = [open(os.devnull), print]; batch_size = 3",  # a fork's: no settings, and of any kind
    "import numpy as np; from model import GPT; scale = np.sqrt(2); batch_size = 3",
    "import time; from datetime import datetime; out_dir = time.strftime('%Y') + datetime.now().strftime('%Y')",
)
CUDA = torch.cuda.is_available()
BEST = "'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float16'"  # nanoGPT's own line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, executed(text)) for text in AS_IN_PYTHON),
        # and the types of settings, the machine's dtype
        ("max_iters = 1e5; eval_interval = 8 / 2", {"max_iters": 100_000, "eval_interval": 4}),
        ("\ufeffwandb_run_name = 'ü\\d'", {"wandb_run_name": "ü\\d"}),  # without Python's warning
        (f"import torch\ndtype = {BEST}", {"dtype": "auto"}),
        (
            "dtype = 'float16' if device == 'cpu' or not torch.cuda.is_bf16_supported() else 'bfloat16'",
            {"dtype": "auto"},
        ),
        ("dtype = 'float16' if time.time() > 0 else 'bfloat16'", {"dtype": "float16"}),  # torch is not asked
        ("device = 'cuda' if torch.cuda.is_available() else 'cpu'", {"device": "cuda" if CUDA else "cpu"}),
    ],
)
@pytest.mark.filterwarnings("error::DeprecationWarning", "error::SyntaxWarning")
def test_a_config_file_is_read_as_python_reads_it(text, expected, load):
    assert repr(load(text)) == repr(expected)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("batch_size = 9 / 2", "batch_size: got 4.5 (float), expected int"),
        ("seed = " + "9" * 9999, "not Python"),
        ("batch_size = (3 +\n    sum('a')\n)", "refused: sum('a'); expected values"),
        ("batch_size, seed.a = 1, 2", "`name = value` lines"),
        ("batch_size, seed = [1, 2]", "`name = value` lines"),
        ("from base import *", "`name = value` lines"),
        ("from base import batch_size", "`name = value` lines"),
        # what has no value
        ("batch_size = 1 / 0", "cannot be computed: division by zero"),
        ("batch_sise = 3; batch_size = batch_sise + n", "n is not assigned further up"),
        ("compile = device == 'cuda'", "device is not assigned further up"),  # `auto`, which may become cuda
        ("n_layer = 2; x = 1; x = [2]; n_layer = x", "x is not assigned further up in this file, or not understood"),
        # what would run
        ("out_dir = ''.__class__", "refused"),
        ("out_dir = '{0.a}'.format(1)", "cannot be computed: 'int' object has no attribute 'a'"),
        ("import os; out_dir = os.mkdir('ran')", "refused: os.mkdir('ran')"),
        ("wandb_run_name = str(time.time(open('ran', 'w')))", "refused: open('ran', 'w')"),
        ("if open('ran', 'w'): batch_size = 3", "refused"),
        ("batch_size[open('ran', 'w')] = 3", "refused"),
        ("helper = open('ran', 'w'); out_dir = f'{helper}'", "helper is not assigned further up"),
    ],
    ids=lambda value: value[:40],
)
def test_a_config_file_is_refused_with_its_line_and_does_nothing(line, reason, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(f"# a comment\neval_only = True\n{line}\n")
    assert str(caught.value).startswith(f"{tmp_path / 'mine.py'}:3: ")
    assert reason in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_names_that_are_no_settings_are_noted_but_slips_are_refused(load, tmp_path):
    text = (
        "lora_rank = 8; lora_rank = 9\ntokens = 4096\ntags = [print]\nbatch_size = tokens // 1024\nn_layers = n_layer\n"
    )
    with pytest.raises(UserError, match=r"mine\.py:5: unknown setting 'n_layers' \(did you mean n_layer\?\)"):
        load(text)
    path = tmp_path / "mine.py"
    path.write_text(text + "n_layer = n_layers\n")
    parsed = parse(["--n_layer=3", str(path)])
    assert parsed.settings == {"batch_size": 4, "n_layer": 3}
    assert parsed.notes == [f"{path}: names that are no settings here, left out: lora_rank, tags"]


@pytest.mark.parametrize(
    "junk", [b"# coding: no-such\n", b"#" * 70_000, b"seed = " + b"1+" * 32000 + b"1", b"a\0b", b"\xff"]
)
def test_junk_is_refused_too(junk, tmp_path):
    (tmp_path / "mine.py").write_bytes(junk)
    with pytest.raises(UserError, match=r"mine\.py:.*(not Python|cannot be read)"):
        parse([str(tmp_path / "mine.py")])
