"""Config files: their allowed content, none of which is executed, and the presets."""

import dataclasses
import math
import os
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


def test_every_preset_is_valid_and_says_what_it_is():
    assert set(PRESETS) == {name.removeprefix("train_") for name in NANOGPT_CONFIGS} | {"docs", "docs_cpu"}
    for name in PRESETS:
        assert not compose(parse([name]), {}).wandb_log
        assert preset_summary(name).endswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "max_iters = (2 + 3) * 4 ** 2 // 3 % 7 - -1 + +2",
        "learning_rate = 1 / 8; min_lr = learning_rate / 10; beta1, beta2 = 10 ** -3, 0.9",
        "out_dir = 'out-' + \"a\" 'b'",
        "max_iters = 10\nlr_decay_iters = max_iters * 2; max_iters = max_iters + 1",
        '"""doc"""\n# comment\n\nbias = True; compile = not bias',
        "batch_size = (\n    4 *\n    5\n)\r\n",
        "",
        "n_layer, n_head = 8, 4\nn_layer, n_head = n_head, n_layer",
        "batch_size = n_head = 4\nbatch_size *= 2",
        "small = {'n_layer': 6}; n_layer = small['n_layer']; sizes = [2, 4]; n_head = max(sizes)",
        "n_embd: int = 64 if n_layer > 6 and not bias else 32",
        "compile = dataset == 'openwebtext' or 'z' in dataset; bias = 'o' not in dataset or 2 >= 3 != 4",
        "bias = 1 < 2 <= 2 > 1 >= 1; decay_lr = 3 < 3; x = None; compile = x is None; eval_only = x is not None",
        "n_layer = bias and 3 or 5; n_head = n_layer and 2 or 9",
        "n_layer = 6\nout_dir = f'out-{n_layer:02d}-{learning_rate:.0e}-{dataset!r}'",
        "out_dir = 'out-%d-%s' % (n_layer, dataset)",
        "out_dir = 'out-{}-{x:.1f}'.format(n_head, x=dropout).upper()",
        "out_dir = os.path.join('runs', 'a') + '-' * 2 + str(int(3.7)) + str(round(2.5)) + str(round(1.26, 1))",
        "import math as m, os\nfrom math import sqrt as root\nn_layer, n_embd = m.ceil(1.5), int(root(4096))",
        "lora_rank = 8; tags = [open(os.devnull), print]; batch_size = 3",  # a fork's: no settings, and of any kind
        "import numpy as np; from model import GPT; scale = np.sqrt(2); batch_size = 3",
    ],
)
def test_a_config_file_is_read_as_python_reads_it(text, load):
    got, expected = load(text), executed(text)
    assert got == expected
    assert [type(value) for value in got.values()] == [type(value) for value in expected.values()]


CUDA = torch.cuda.is_available()
BEST = "'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float16'"  # nanoGPT's own line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_iters = 1e5; eval_interval = 8 / 2", {"max_iters": 100_000, "eval_interval": 4}),
        ("\ufeffbatch_size = 3", {"batch_size": 3}),
        ("wandb_run_name = 'ü\\d'", {"wandb_run_name": "ü\\d"}),  # without Python's warning
        (f"import torch\ndtype = {BEST}", {"dtype": "auto"}),
        ("best = torch.cuda.is_bf16_supported()\ndtype = 'bfloat16' if best else 'float16'", {"dtype": "auto"}),
        ("half = True\ndtype = 'float16' if half else 'bfloat16'", {"dtype": "float16"}),  # torch is not asked
        ("device = 'cuda' if torch.cuda.is_available() else 'cpu'", {"device": "cuda" if CUDA else "cpu"}),
    ],
)
def test_a_config_file_also_has_the_types_of_settings_and_the_machines_dtype(text, expected, load):
    assert repr(load(text)) == repr(expected)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("batch_size = 9 / 2", "got 4.5 (float), expected int"),
        ("out_dir = [[1]]", "expected numbers and text in a list"),
        ("out_dir = 'a\\0'", "zero byte"),
        ("seed = 2 ** 63", "64 bits"),
        ("seed = " + "9" * 9999, "not Python"),
        ("  batch_size = 3", "not Python"),
        ("batch_size = (3 +\n    sum('a')\n)", "sum() is not called"),
        ("a, b = 1", "refused"),
        ("from . import base", "refused"),
        # what has no value
        ("batch_size = int('x')", "cannot be computed: invalid literal"),
        ("batch_size = 1 / 0", "division by zero"),
        ("batch_size = True + 1", "refused"),
        ("learning_rate = (-8) ** 0.5", "the result is complex"),
        ("n_layer = {1: 2}[3]", "cannot be computed"),
        ("n_layer = open", "open is not assigned"),
        ("batch_sise = 3; batch_size = batch_sise + n", "n is not assigned"),
        # what would be too large
        ("max_iters = 9 ** 9 ** 9 ** 9", "64 bits"),
        ("out_dir = 'a' * 9999", "4096 characters"),
        ("out_dir = f'{out_dir * 999}{out_dir * 999}' ; n_layer = 1", "4096 characters"),
        ("out_dir = f'{1:9999}'", "so large a width"),
        ("out_dir = '%99999d' % 1", "so large a width"),
        ("out_dir = '%*d' % (9, 1)", "so large a width"),
        ("out_dir = '{:{}}'.format(1, 9)", "so large a width"),
        ("out_dir = '%((a)x)99999d' % {'(a)x': 1}", "refused"),
        # what would run
        ("out_dir = 'a'.ljust(10 ** 9)", "'a'.ljust() is not called"),
        ("out_dir = ''.__class__", "refused"),
        ("out_dir = '{0.__class__}'.format(1)", "plain fields"),
        ("import os; out_dir = os.mkdir('ran')", "os.mkdir() is not called"),
        ("import pathlib; out_dir = pathlib.Path('ran').touch()", "pathlib.Path() is not called"),
        ("out_dir = __import__('os').mkdir('ran')", "__import__() is not called"),
        ("wandb_run_name = str(time.time(open('ran', 'w')))", "open() is not called"),
        ("wandb_run_name = str(time.time(0))", "cannot be computed"),
        ("open('ran', 'w')", "refused"),
        ("if open('ran', 'w'): batch_size = 3", "refused"),
        ("def f(x=open('ran', 'w')): pass", "refused"),
        ("assert open('ran', 'w')", "refused"),
        ("batch_size: open('ran', 'w') = 3", "refused"),
        ("batch_size[open('ran', 'w')] = 3", "refused"),
        ("batch_size = [x for x in [open('ran', 'w')]]", "refused"),
        ("batch_size = (lambda: open('ran', 'w'))()", "is not called"),
        ("batch_size = {1: open('ran', 'w')}[1]", "open() is not called"),
        ("out_dir = f\"{open('ran', 'w')}\"", "open() is not called"),
        ("out_dir = (str := open('ran', 'w'))", "refused"),
        ("helper = open('ran', 'w'); out_dir = f'{helper}'", "open() is not called"),
    ],
    ids=lambda value: value[:40],
)
def test_a_config_file_is_refused_with_its_line_and_does_nothing(line, reason, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(f"# a comment\neval_only = True\n{line}\n")
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    number, named = (4, "sum('a')") if "\n" in line else (3, line.strip()[:20])  # of a statement, the line at fault
    assert message.startswith(f"{tmp_path / 'mine.py'}:{number}: ")
    assert named in message.replace("\\'", "'").replace("\\\\", "\\")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"batch_size = 1\0",
        b"\xff\xfe",
        b"# coding: no-such\n",
        b"#" * (1 << 20) + b"\n",
        b"seed = " + b"1+" * 200000 + b"1",
    ],
    ids=lambda text: str(text[:8]),
)
def test_a_file_that_cannot_be_parsed_is_refused(text, load):
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
