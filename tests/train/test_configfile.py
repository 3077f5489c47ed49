"""Config files: their allowed content, none of which is executed, and the presets."""

import dataclasses
import re
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.config import TrainConfig, compose, parse
from train.errors import UserError
from train.settings import PRESETS, load_config_file, preset_summary, settings_of

FIELDS = settings_of(TrainConfig)

# The statements of nanoGPT's seven config files, without comments.
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
    **{
        "eval_" + name.replace("-", "_"): "batch_size = 8\neval_iters = 500\neval_only = True\n"
        f"wandb_log = False\ninit_from = '{name}'\n"
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    },
}


@pytest.fixture
def load(tmp_path):
    """Load a config file with the given text. It is tmp_path / "mine.py"."""

    def load(text: str | bytes, **options) -> dict:
        path = tmp_path / "mine.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return load_config_file(path, TrainConfig, **options)

    return load


@pytest.mark.parametrize("name", NANOGPT_CONFIGS)
def test_nanogpts_own_files_load_and_are_presets(name, load):
    got, theirs = load(NANOGPT_CONFIGS[name]), {}
    exec(NANOGPT_CONFIGS[name], theirs)  # as nanoGPT does
    theirs = {key: value for key, value in theirs.items() if key in FIELDS}
    if name == "finetune_shakespeare":
        assert got["wandb_run_name"].startswith("ft-1")
        theirs["wandb_run_name"] = got["wandb_run_name"] = "ft-gpt2-xl"
    assert list(got.items()) == list(theirs.items())
    theirs["wandb_log"] = False  # only the user switches on logging to a service
    assert compose(parse([name.removeprefix("train_")]), {}) == dataclasses.replace(TrainConfig(), **theirs)


def test_every_preset_is_valid_and_says_what_it_is():
    assert set(PRESETS) == {name.removeprefix("train_") for name in NANOGPT_CONFIGS} | {"docs", "docs_cpu"}
    for name in PRESETS:
        assert not compose(parse([name]), {}).wandb_log
        assert preset_summary(name).endswith(".")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_iters = (2 + 3) * 4 ** 2 // 3 % 7 - -1", {"max_iters": (2 + 3) * 4**2 // 3 % 7 + 1}),
        ("learning_rate = 1 / 8", {"learning_rate": 0.125}),
        ("learning_rate = 10 ** -3", {"learning_rate": 10**-3}),
        ("out_dir = 'out-' + \"a\" 'b'", {"out_dir": "out-ab"}),
        ("max_iters = 10\nlr_decay_iters = max_iters * 2", {"max_iters": 10, "lr_decay_iters": 20}),
        ("batch_size = 1\nbatch_size = batch_size + 1", {"batch_size": 2}),
        ('"""doc"""\n# comment\n\nbias = True; compile = False', {"bias": True, "compile": False}),
        ("batch_size = (\n    4 *\n    5\n)\r\n", {"batch_size": 20}),
        ("wandb_run_name = 'ü\\d'", {"wandb_run_name": "ü\\d"}),
        ("\ufeffbatch_size = 3", {"batch_size": 3}),
        ("", {}),
        # whole floats; names above, or defaults; helpers
        ("max_iters = 1e5\neval_interval = 8 / 2", {"max_iters": 100_000, "eval_interval": 4}),
        ("min_lr = learning_rate / 10", {"min_lr": TrainConfig.learning_rate / 10}),
        (
            "tokens = 2 ** 15\nblock_size = 256\nbatch_size = tokens // block_size",
            {"block_size": 256, "batch_size": 128},
        ),
        ("n_layer, n_head = 8, 4\nn_layer, n_head = n_head, n_layer", {"n_layer": 4, "n_head": 8}),
        ("beta1, beta2 = 0.8, 0.9", {"beta1": 0.8, "beta2": 0.9}),
        ("batch_size = n_head = 4\nbatch_size *= 2", {"batch_size": 8, "n_head": 4}),
        (
            "small = {'n_layer': 6}\nn_layer = small['n_layer']\nsizes = [2, 4]\nn_head = max(sizes)",
            {"n_layer": 6, "n_head": 4},
        ),
        ("n_embd: int = 64 if n_layer > 6 and not bias else 32", {"n_embd": 64}),
        ("compile = dataset == 'openwebtext' or 'z' in dataset", {"compile": True}),
        ("n_layer = bias and 3 or 5\nn_head = n_layer and 2 or 9", {"n_layer": 5, "n_head": 2}),
        # text
        (
            "n_layer = 6\nout_dir = f'out-{n_layer:02d}-{learning_rate:.0e}-{dataset!r}'",
            {"n_layer": 6, "out_dir": "out-06-6e-04-'openwebtext'"},
        ),
        ("out_dir = 'out-%d-%s' % (n_layer, dataset)", {"out_dir": "out-12-openwebtext"}),
        ("out_dir = 'out-{}-{x:.1f}'.format(n_head, x=dropout).upper()", {"out_dir": "OUT-12-0.0"}),
        ("out_dir = os.path.join('runs', 'a') + '-' * 2 + str(int(3.7)) + str(round(2.5))", {"out_dir": "runs/a--32"}),
        # what a machine has
        (
            "import torch\n"
            "dtype = 'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float16'",
            {"dtype": "auto"},
        ),
        ("best = torch.cuda.is_bf16_supported()\ndtype = 'bfloat16' if best else 'float16'", {"dtype": "auto"}),
        ("half = True\ndtype = 'float16' if half else 'bfloat16'", {"dtype": "float16"}),  # torch is not asked
        (
            "device = 'cuda' if torch.cuda.is_available() else 'cpu'",
            {"device": "cuda" if torch.cuda.is_available() else "cpu"},
        ),
        ("import math, os\nfrom math import sqrt as root\nn_embd = root(4096)", {"n_embd": 64}),
        # of a fork: no setting here, and of any kind
        ("lora_rank = 8\ntags = [open('x'), print]\nbatch_size = 3", {"batch_size": 3}),
        ("import numpy as np\nfrom model import GPT\nscale = np.sqrt(2)\nbatch_size = 3", {"batch_size": 3}),
    ],
)
def test_a_config_file_may_hold(text, expected, load):
    got = load(text)
    assert got == expected
    assert [type(value) for value in got.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("n_layers = 1", "did you mean n_layer?"),
        ("batch_size = '12'", "got '12' (str), expected int"),
        ("batch_size = 9 / 2", "got 4.5 (float), expected int"),
        ("compile = 1", "expected bool"),
        ("batch_size = sum(3)", "sum() is not called"),
        ("batch_size = int('x')", "cannot be computed: invalid literal"),
        ("out_dir = f'{1:9999}'", "so large a width"),
        ("out_dir = '%99999d' % 1", "so large a width"),
        ("out_dir = '%*d' % (9, 1)", "so large a width"),
        ("out_dir = '%((a)x)99999d' % {'(a)x': 1}", "refused"),
        ("out_dir = f'{out_dir * 999}{out_dir * 999}' ; n_layer = 1", "4096 characters"),
        ("out_dir = '{:{}}'.format(1, 9)", "so large a width"),
        ("out_dir = '{0.__class__}'.format(1)", "plain fields"),
        ("out_dir = 'a' * 9999", "4096 characters"),
        ("out_dir = [[1]]", "expected numbers and text in a list"),
        ("n_layer = {1: 2}[3]", "cannot be computed"),
        ("n_layer = open", "open is not assigned"),
        ("out_dir = os.getcwd()", "os.getcwd() is not called"),
        ("out_dir = 'a'.ljust(10 ** 9)", "'a'.ljust() is not called"),
        ("out_dir = os.environ['HOME']", "refused"),
        ("out_dir = ''.__class__", "refused"),
        ("batch_size = True + 1", "refused"),
        ("batch_size = no_such", "no_such is not assigned"),
        ("batch_sise = 3; batch_size = batch_sise + n", "n is not assigned"),
        ("a, b = 1", "refused"),
        ("import subprocess; out_dir = subprocess.getoutput('ls')", "subprocess.getoutput() is not called"),
        ("import numpy as np; n_embd = np.pi", "refused"),
        ("from . import base", "refused"),
        ("from os import *; out_dir = getcwd()", "getcwd() is not called"),
        ("wandb_run_name = str(time.time(0))", "cannot be computed"),
        ("wandb_run_name = time.time()", "(float), expected str"),
        ("print(1)", "refused"),
        ("if 1: batch_size = 3", "refused"),
        ("batch_size = 1 / 0", "division by zero"),
        ("learning_rate = 10.0 ** 400", "cannot be computed"),
        ("learning_rate = (-8) ** 0.5", "complex"),
        ("max_iters = 9 ** 9 ** 9 ** 9", "64 bits"),
        ("seed = 2 ** 63", "64 bits"),
        ("seed = " + "9" * 9999, "not Python"),
        ("seed = " + "1+" * 200000 + "1", "deep"),
        ("out_dir = 'a\\0'", "zero byte"),
        ("batch_size =", "not Python"),
        ("  batch_size = 3", "not Python"),
    ],
    ids=lambda value: value[:40],
)
def test_a_config_file_is_refused_with_its_line(line, reason, load, tmp_path):
    with pytest.raises(UserError) as caught:
        load(f"# a comment\neval_only = True\n{line}\n")
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    if reason == "deep":  # the parser names no line
        return
    assert message.startswith(f"{tmp_path / 'mine.py'}:3: ")
    assert line.strip()[:20] in message.replace("\\'", "'").replace("\\\\", "\\")


def test_the_refused_line_of_a_long_statement_is_named(load):
    with pytest.raises(UserError, match=r"mine\.py:4: refused.*in \"sum\('a'\)\""):
        load("batch_size = (\n    1\n    +\n    sum('a')\n)\n")


@pytest.mark.parametrize(
    "text",
    [b"batch_size = 1\0", b"\xff\xfe", b"# coding: no-such\n", b"#" * (1 << 20) + b"\n"],
    ids=lambda b: str(b[:8]),
)
def test_a_file_that_is_no_text_is_refused(text, load):
    with pytest.raises(UserError, match=r"mine\.py"):
        load(text)


def test_what_repeats_cannot_grow(load):
    with pytest.raises(UserError, match=r":6: .*64 bits"):
        load("seed = 10\n" + "seed = seed * seed\n" * 60)
    with pytest.raises(UserError, match=r":14: .*characters"):
        load("out_dir = 'a'\n" + "out_dir = out_dir + out_dir\n" * 60)
    with pytest.raises(UserError, match=r":62: .*x, assigned in line 1: .*64 bits"):
        load("x = 10\n" + "x = x * x\n" * 60 + "seed = x\n")


def test_a_run_name_with_the_time(load):
    before = int(time.time())
    got = load(
        "import time\nfrom datetime import datetime\nwandb_run_name = 'ft-' + str(int(time.time()))\n"
        "out_dir = f'out-{datetime.now():%Y}-' + datetime.now().strftime('%m') + time.strftime('%d')\n"
    )
    assert before <= int(got["wandb_run_name"].removeprefix("ft-")) <= time.time()
    assert re.fullmatch(r"out-\d{4}-\d{4}", got["out_dir"])


def test_names_that_are_no_settings_are_noted_but_slips_are_refused(load, tmp_path):
    text = "lora_rank = 8\ntokens = 4096\ntags = [print]\nbatch_size = tokens // 1024\nn_layers = n_layer\n"
    with pytest.raises(UserError, match=r"mine\.py:5: unknown setting 'n_layers' \(did you mean n_layer\?\)"):
        load(text)
    notes = []
    assert load(text + "n_layer = n_layers\n", above={"n_layer": 3}, notes=notes) == {"batch_size": 4, "n_layer": 3}
    names = "left out: lora_rank, tags; only read by later lines: tokens, n_layers"
    assert notes == [f"{tmp_path / 'mine.py'}: names that are no settings here, {names}"]


def test_an_unreadable_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_config_file(tmp_path / "none.py", TrainConfig)


PIECES = st.sampled_from(
    [
        *"=+-*/%()[],.:;#'\"\\\n\t\0", "//", "**", "lambda", "import", "time", "str", "open", "exec", "if",
        "for", "def", "batch_size", "learning_rate", "out_dir", "compile", "n_layer", "1", "0", "-1", "9e9",
        "2**99", "True", "None", "'a'", "f'{x}'", "time.time()",
    ]
)  # fmt: skip


@given(
    st.text() | st.lists(PIECES).map(" ".join) | st.lists(PIECES).map(lambda x: f"seed = {' '.join(x)}") | st.binary()
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_loads_or_is_refused_in_one_line(load, tmp_path, junk):
    try:
        assert all(type(value) is type(FIELDS[name].default) for name, value in load(junk).items())
    except UserError as error:
        assert str(error).startswith(f"{tmp_path / 'mine.py'}:")  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017


CALLS = ["open({path!r}, 'w')", "__import__('pathlib').Path({path!r}).touch()"]
PLACES = [
    "{}", "batch_size = {}", "out_dir = 'a' + {}", "out_dir = f'{{{}}}'", "batch_size = [x for x in [{}]]",
    "if {}: pass", "class A: x = {}", "def f(x={}): pass", "@{}\ndef f(): pass", "batch_size: {} = 3",
    "batch_size[{}] = 3", "assert {}", "batch_size = (lambda: {})()", "out_dir = str(time.time({}))",
    "helper = {}\nout_dir = f'{{helper}}'", "out_dir = 'a' if {} else 'b'", "out_dir = '{{}}'.format({})",
    "batch_size = {{1: {}}}[1]", "batch_size = max(1, {})", "out_dir = (str := {})", "batch_size += {}",
    "helper, batch_size = {}, 3",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS, ids=["open", "import"])
def test_nothing_in_a_config_file_runs(place, call, load, tmp_path):
    target = tmp_path / "ran"
    with pytest.raises(UserError):
        load(place.format(call.format(path=str(target))))
    assert not target.exists()
