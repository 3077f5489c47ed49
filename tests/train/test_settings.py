"""The command line: every spelling of a setting, the order of arguments, refusals, help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.train.jobs import ROOT
from train.config import TrainConfig, compose, parse, preset
from train.errors import UserError
from train.sample import SampleConfig
from train.settings import PRESETS, command_line, preset_summary, settings_of

FIELDS = settings_of(TrainConfig)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
KINDS = {
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: TEXT.filter(lambda text: not text.startswith("~")),
}


@st.composite
def spelled(draw) -> tuple[dict, list[str]]:
    """A setting with a value, and one way to write it on a command line."""
    name, field = draw(st.sampled_from(list(FIELDS.items())))
    choices = field.metadata["choices"]
    value = draw(st.sampled_from(choices) if choices else KINDS[type(field.default)])
    key, text = draw(st.sampled_from([name, name.replace("_", "-")])), draw(st.sampled_from([repr(value), str(value)]))
    if isinstance(value, str) and value[:1] in ("'", '"'):
        text = repr(value)  # text that begins with a quote must be quoted
    ways = [[f"--{key}={text}"]]
    if not text.startswith("--") and not field.metadata["bare"]:
        ways.append([f"--{key}", text])
    if isinstance(value, bool):
        ways += [[f"--{key}={text.lower()}"], [f"--{key}" if value else f"--no-{key}"]]
    return {name: value}, draw(st.sampled_from(ways))


@given(spelled())
@settings(max_examples=200, deadline=None)
@example(({"learning_rate": 1.0}, ["--learning_rate=1"]))
@example(({"max_iters": 600000}, ["--max_iters=600_000"]))
@example(({"max_iters": 100000}, ["--max_iters=1e5"]))
@example(({"learning_rate": -1e-3}, ["--learning-rate", "-1e-3"]))
@example(({"wandb_run_name": "a=b"}, ["--wandb_run_name=a=b"]))
@example(({"wandb_run_name": "5"}, ["--wandb_run_name=5"]))
@example(({"wandb_run_name": "'a', 'b'"}, ["--wandb_run_name='a', 'b'"]))
@example(({"wandb_run_name": "'a"}, ["--wandb_run_name='a"]))
@example(({"compile": True}, ["--no-compile", "--compile"]))
@example(({"batch_size": 3}, ["--batch_size=2", "--batch-size", "3"]))
@example(({"rehearse": "auto"}, ["--rehearse"]))
@example(({"rehearse": "auto", "seed": 1}, ["--rehearse", "--seed=1"]))
@example(({"rehearse": "h100", "seed": 1}, ["--rehearse", "h100", "--seed=1"]))
def test_every_spelling_gives_the_value_back(case):
    wanted, argv = case
    parsed = parse(argv)
    assert parsed.settings == wanted
    assert all(type(value) is type(FIELDS[name].default) for name, value in parsed.settings.items())
    assert parsed.sources == []


@given(st.lists(st.text() | st.sampled_from(["--", "--compile=", "--seed", "docs"])))
@settings(max_examples=50, deadline=None)
def test_any_command_line_is_read_or_refused_in_one_line(argv):
    try:
        parse(argv)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--batch_siz=1", ("'batch_siz'", "did you mean batch_size?")),
        ("--no-batch_size", ("--no-batch_size", "no switch")),
        ("--no-compile=True", ("no_compile",)),
        ("--batch_size=5*8", ("batch_size", "'5*8'", "int")),
        ("--batch_size", ("batch_size", "no value", "--batch_size=12")),
        ("--seed=0x" + "f" * 6000, ("seed", "64 bits")),
        ("--learning_rate=" + "1+" * 100000 + "1", ("learning_rate", "float")),
        ("--learning_rate=1e999", ("learning_rate", "inf", "finite")),
        ("--min_lr=1" + "0" * 400, ("min_lr", "too large")),
        ("--compile=1", ("compile", "1 (int)", "bool")),
        ("--dtype=bf16", ("dtype: got 'bf16', expected auto | float32", "did you mean bfloat16?")),
        ("-batch_size=3", ("two dashes",)),
        ("batch_size=3", ("--batch_size=3",)),
        ("config/train_shakespeare_char.py", ("did you mean shakespeare_char?",)),
        ("wibble", ("'wibble'", "the presets are", "docs_cpu")),
        ("tests", ("'tests'", "not a regular file")),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_refused_with_a_hint(argument, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        compose(parse([argument]), {})
    line = str(caught.value)
    assert all(part in line for part in expected), line
    assert "\n" not in line
    assert len(line) < 300


def test_a_tilde_in_front_of_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "mine.py").write_text("bpe_dir = '~/bpe'\nwandb_project = '~/x'\n")
    argv = [str(tmp_path / "mine.py"), "--out_dir=~/runs/a", "--dataset='~/data'", "--init_from", "~/b/ckpt.pt"]
    assert parse(argv).settings == {
        "bpe_dir": "/home/me/bpe",
        "wandb_project": "~/x",
        "out_dir": "/home/me/runs/a",
        "dataset": "/home/me/data",
        "init_from": "/home/me/b/ckpt.pt",
    }


def test_presets_files_and_overrides_apply_in_argv_order(tmp_path):
    mine = tmp_path / "order.py"
    mine.write_text("batch_size = 7\nlr_decay_iters = max_iters\nmin_lr = learning_rate / 10\nmax_iters = 9\n")
    parsed = parse(["--batch_size=3", "--seed=5", "shakespeare_char", str(mine), "--learning_rate=1", "--max_iters=11"])
    assert parsed.sources == ["shakespeare_char", str(mine)]
    named = {"seed": 5, "batch_size": 7, "max_iters": 11, "n_layer": 6, "learning_rate": 1.0}
    read = {"lr_decay_iters": preset("shakespeare_char")["max_iters"], "min_lr": 1e-4}  # from what was said before
    assert {name: parsed.settings[name] for name in named | read} == named | read


def test_a_preset_wins_over_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2").write_text("batch_size = 1\n")
    assert parse(["--rehearse", "gpt2"]).settings == preset("gpt2") | {"rehearse": "auto"}
    assert parse(["./gpt2"]).settings == {"batch_size": 1}


def test_another_command_has_its_own_settings_files_and_help(capsys):
    def read(*argv: str, **options) -> tuple[SampleConfig, list[str]]:
        return command_line(SampleConfig, list(argv), "python -m other", "About it.", **options)

    assert read("--top_k=1", "a", "b", positional="FILE ...") == (SampleConfig(top_k=1), ["a", "b"])
    for argument, message in (
        ("gpt2", "not a setting"),
        ("--batch_size=1", "unknown setting 'batch_size'"),
        ("--num_samples=0", "num_samples: got 0, expected at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            read(argument)
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m other [--key=value ...]\n\nAbout it.\n")
    assert "--top_k=200" in text
    assert "presets" not in text


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_setting_and_preset_on_a_line_of_its_own(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--batch_size=3", flag, "--no-such"])  # the rest is not read
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, field in FIELDS.items():
        (line,) = [line for line in lines if line.startswith(f"  --{name}={field.default} ")]
        assert field.metadata["help"] in line
        group = field.metadata["group"]
        assert not group or f"{group}:" in lines
    for name in PRESETS:
        assert any(line.split()[:1] == [name] and preset_summary(name) in line for line in lines)


@pytest.mark.parametrize(
    ("argument", "status", "said"),
    [
        ("--help", 0, "usage: python -m train "),
        ("--dtype=bf16", 2, "error: dtype: got 'bf16', expected auto | float32 "),
    ],
)
def test_help_and_refusals_come_before_torch_is_imported(argument, status, said, tmp_path):
    """Importing torch takes seconds. Here another module named torch comes first, and its import ends the process."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    argv = [sys.executable, "-m", "train", argument]
    done = subprocess.run(argv, cwd=tmp_path, env=env, timeout=60, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (done.stdout or done.stderr).startswith(said)
    assert done.stderr.count("\n") == (status != 0)
