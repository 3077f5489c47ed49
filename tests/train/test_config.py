"""TrainConfig: its defaults, its validation, and how a run's settings are put together."""

import dataclasses

import pytest

from train.config import TrainConfig, choose_base, compose, parse, preset, validate
from train.errors import UserError
from train.settings import Parsed

# The defaults of nanoGPT's train.py. Ours differ in gradient_accumulation_steps, backend, device, dtype.
NANOGPT = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "batch_size": 12, "block_size": 1024,
    "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4,
    "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "compile": True,
}  # fmt: skip
AT_LEAST_1 = (
    "batch_size", "block_size", "n_layer", "n_head", "n_embd", "eval_interval", "log_interval", "eval_iters",
    "gradient_accumulation_steps", "keep_checkpoints",
)  # fmt: skip
FLOATS = ("max_minutes", "peak_flops", "learning_rate")
AT_LEAST_0 = ("max_iters", "patience", "seed", *FLOATS)
IN_FLOAT32 = ("learning_rate", "min_lr", "weight_decay", "grad_clip")


def test_names_and_defaults_are_nanogpts():
    ours = dataclasses.asdict(TrainConfig())
    assert {name: ours.get(name) for name in NANOGPT} == NANOGPT
    assert {name: type(ours[name]) for name in NANOGPT} == {name: type(value) for name, value in NANOGPT.items()}
    assert ours["gradient_accumulation_steps"] == 1
    assert [ours[name] for name in ("backend", "device", "dtype", "gelu")] == ["auto"] * 4
    validate(TrainConfig())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_head": 5}, ("n_embd", "768", "multiple of n_head (5)")),
        *(({name: 0}, (f"{name}: got 0", "at least 1")) for name in AT_LEAST_1),
        *(({name: -1.0 if name in FLOATS else -1}, (f"{name}: got -1", "at least 0")) for name in AT_LEAST_0),
        *(({name: 1e308}, (f"{name}: got 1e+308", "below 3.4e+38")) for name in IN_FLOAT32),
        *(({name: 1.0}, (f"{name}: got 1.0", "below 1")) for name in ("dropout", "beta1", "beta2")),
        ({"weight_decay": float("nan")}, ("weight_decay", "nan", "finite")),
        ({"gelu": "exact"}, ("gelu", "'exact'", "auto | erf | tanh")),
        ({"device": "cuda:x"}, ("device", "'cuda:x'", "cuda:N")),
        *(({name: ""}, (f"{name}: got ''",)) for name in ("out_dir", "dataset", "init_from")),
        ({"batch_size": "12"}, ("batch_size", "'12'", "int")),
        # absurd sizes, refused at once
        ({"batch_size": 10**9}, ("batch_size", "got 1024000000000 tokens in a step", "at most 268435456")),
        ({"gradient_accumulation_steps": 10**9}, ("gradient_accumulation_steps", "below 1048576")),
        ({"batch_size": 4097}, ("batch_size * block_size", "got 4195328 tokens in a micro-batch", "at most 4194304")),
        ({"gradient_accumulation_steps": 10**6}, ("gradient_accumulation_steps", "tokens in a step")),
        ({"eval_iters": 10**9}, ("eval_iters: got 1000000000", "below 10000000")),
        ({"n_layer": 10**6}, ("n_layer: got 1000000", "below 1025")),
        ({"n_embd": 2 * 10**9, "n_head": 1}, ("n_embd: got 2000000000", "below 131072")),
    ],
    ids=lambda value: " ".join(f"{name}={came}" for name, came in value.items()) if isinstance(value, dict) else "",
)
def test_an_impossible_value_is_refused(change, expected):
    with pytest.raises(UserError) as caught:
        validate(TrainConfig(**change))
    assert all(part in str(caught.value) for part in expected), caught.value


def test_an_odd_but_possible_value_is_allowed():
    validate(TrainConfig(learning_rate=3e-5, device="cuda:1"))  # below min_lr: the rate rises, as in nanoGPT
    validate(TrainConfig(warmup_iters=11, lr_decay_iters=10, learning_rate=0.0, keep_checkpoints=10**9))
    validate(TrainConfig(batch_size=2**12, gradient_accumulation_steps=2**6, learning_rate=1e38, weight_decay=0.0))


# How settings are put together


def test_the_default_job_is_sized_for_the_machine():
    cpu, gpu = (choose_base(parse(["--seed=3"]), gpu=gpu) for gpu in (False, True))
    assert (cpu.settings, gpu.settings) == (preset("docs_cpu"), preset("docs"))
    assert cpu.why == "preset docs_cpu: no preset was named, and the device is a CPU"
    assert gpu.why.startswith("preset docs: ")


@pytest.mark.parametrize(
    "argv", [["gpt2"], ["--init_from=gpt2"], ["eval_gpt2"], ["shakespeare_char", "--init_from=resume"]]
)
def test_whoever_names_a_preset_or_weights_gets_the_plain_defaults_below(argv):
    parsed = parse(argv)
    assert choose_base(parsed, gpu=False, stored={"seed": 7}).settings == {}
    assert compose(parsed, {}) == TrainConfig(**parsed.settings)


def test_a_resumed_run_goes_on_with_its_own_settings():
    stored = dataclasses.asdict(TrainConfig(n_layer=2, seed=7, learning_rate=1e-2)) | {"a_forks_own": 1}
    parsed = parse(["--init_from=resume", "--max_iters=5"])
    config = compose(parsed, choose_base(parsed, gpu=True, stored=stored).settings)
    assert config == TrainConfig(n_layer=2, seed=7, learning_rate=1e-2, init_from="resume", max_iters=5)


def test_compose_puts_the_named_settings_over_the_base_and_checks_both():
    base = {"batch_size": 3, "seed": 9}
    assert compose(Parsed(settings={"batch_size": 5}), base) == TrainConfig(batch_size=5, seed=9)
    with pytest.raises(UserError, match="batch_size: got '5'"):
        compose(Parsed(), {"batch_size": "5"})
    with pytest.raises(UserError, match="multiple of n_head"):
        compose(Parsed(settings={"n_head": 5}), base)
