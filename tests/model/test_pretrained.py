"""Weights in and out: bit for bit through our own files, to rounding against transformers, and never half."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from model import GPT, GPTConfig
from model.pretrained import export_gpt2, from_checkpoint, gpt2_shape, load_gpt2
from tests.model.small import make

SHAPE = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 12}


def make_model(**shape) -> GPT:
    return make(**SHAPE | shape).eval()


def exported(folder: Path, changes: dict | None = None) -> Path:
    """The folder of a model's two files. changes: other tensors, by the hub's names, and fields; None: missing."""
    export_gpt2(make_model(gelu="tanh"), folder)
    path = folder / "config.json"
    config, tensors = json.loads(path.read_text()), safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for name, value in (changes or {}).items():
        (tensors if "." in name else config)[name] = value
    tensors, config = ({k: v for k, v in files.items() if v is not None} for files in (tensors, config))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("bias", "gelu", "prefix", "dtype"),
    [(True, "tanh", "", torch.float32), (False, "erf", "transformer.", torch.bfloat16)],
)
def test_a_file_has_the_hubs_layout_and_is_read_as_the_hubs_are(tmp_path, bias, gelu, prefix, dtype):
    """With masks, without the prefix, halved and with the head beside the table. Loading draws no random numbers, and
    the model owns its memory."""
    model, path = make_model(bias=bias, gelu=gelu, dropout=0.1), tmp_path / "model.safetensors"
    export_gpt2(model, tmp_path)
    ours, theirs, file = dict(model.named_parameters()), safetensors.torch.load_file(path), {}
    assert len(theirs) == 4 + 2 * 12
    for name, tensor in theirs.items():
        linear = name.endswith(".weight") and ("attn" in name or "mlp" in name)
        ours.setdefault(name, torch.zeros(len(tensor)))
        assert torch.equal(tensor, ours[name].T if linear else ours[name]), name
        file[prefix + name.removeprefix("transformer.")] = tensor.to(dtype)
    if prefix:
        file["lm_head.weight"] = file["transformer.wte.weight"].clone()
    else:
        file |= {"h.0.attn.bias": torch.ones(8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    safetensors.torch.save_file(file, path)
    before = torch.get_rng_state()
    again = load_gpt2(path if prefix else tmp_path, dropout=0.2)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.config == gpt2_shape(tmp_path, dropout=0.2) == GPTConfig(**SHAPE, bias=True, gelu=gelu, dropout=0.2)
    assert gpt2_shape(tmp_path, gelu="tanh").gelu == load_gpt2(tmp_path, gelu="tanh").config.gelu == "tanh"
    with path.open("r+b") as opened:
        opened.write(b"\0" * path.stat().st_size)
    parameters = dict(again.named_parameters())
    assert parameters.keys() == ours.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, ours[name].to(dtype).float()), name
        assert parameter.dtype == torch.float32
        assert parameter.is_contiguous()
        assert parameter.requires_grad
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h.1.ln_2.bias": None}, r"transformer\.h\.1\.ln_2\.bias is missing"),
        ({"h.2.ln_1.bias": torch.zeros(12)}, r"h\.2\.ln_1\.bias is unknown"),
        ({"h.0.attn.c_attn.weight": torch.zeros(36, 12)}, r"c_attn\.weight has shape \(12, 36\), expected \(36, 12\)"),
        ({"lm_head.weight": torch.zeros(11, 12)}, r"lm_head\.weight differs from transformer\.wte\.weight"),
        ({"ln_f.bias": torch.zeros(12).long()}, r"ln_f\.bias has torch\.int64, expected one of torch\.float32"),
        ({"model_type": "gpt_neo"}, "model_type: got 'gpt_neo', expected 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function: got 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: got 1e-06, expected 1e-05"),
        ({"n_inner": 24}, "n_inner: got 24, expected None or 48"),
        ({"n_head": 5}, "n_embd: got 12, expected a multiple of n_head"),
        ({"n_head": -2}, r"not the config\.json of a GPT-2 .*n_head: got -2"),
        ({"n_layer": 10**30}, r"not the config\.json of a GPT-2 .*n_layer: got 1000"),
        ({"n_layer": 2.0}, r"not the config\.json of a GPT-2 .*n_layer: got 2.0"),
        ({"n_embd": float("inf")}, r"not the config\.json of a GPT-2 .*n_embd: got inf"),
        ({"n_positions": ["8"]}, r"not the config\.json of a GPT-2 .*n_positions: got \['8'\]"),
        ({"n_layer": 1_000_000}, r"transformer\.h\.2 is missing: n_layer is 1000000"),
        ({"n_layer": 1}, "; and 9 more"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_gpt2(exported(tmp_path, changes))


def content(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    "make",
    [
        *(content(text) for text in ("{}", "[" * 100_000, " " * (1 << 21))),
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, make):
    config = exported(tmp_path) / "config.json"
    config.unlink()
    make(config)
    with pytest.raises(ValueError, match=r"config\.json: not the config\.json of a GPT-2"):
        gpt2_shape(tmp_path)


def test_files_that_are_missing_or_cut_short_are_named(tmp_path):
    path = exported(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_gpt2(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: missing, expected it beside model\.safetensors"):
        gpt2_shape(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in this folder"):
        gpt2_shape(tmp_path)


def test_by_name(tmp_path, monkeypatch):
    exported(tmp_path, {"activation_function": None})
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository.endswith("gpt2"):
            raise ConnectionError("no route\nto host")
        return str(tmp_path / file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    assert load_gpt2("gpt2-xl").config.gelu == "tanh"
    assert asked == [("openai-community/gpt2-xl", name) for name in ("model.safetensors", "config.json")]
    with pytest.raises(FileNotFoundError, match=r"gpt2: cannot download .*\(no route\); give the path"):
        load_gpt2("gpt2")
    for package in ("huggingface_hub", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r"pip install 'nanofuse\[data\]'"):
            load_gpt2("gpt2")


def checkpoint_of(model: GPT, **extra) -> dict:
    args = dataclasses.asdict(model.config)
    del args["gelu"]  # nanoGPT has none
    return {"model": model.state_dict(), "model_args": args, "nanofuse": extra}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_checkpoint(dtype):
    """Halved checkpoints are converted; float32 ones share their memory with the model."""
    model = make_model(bias=False, dropout=0.1).to(dtype)
    again = from_checkpoint(checkpoint_of(model))
    assert again.config == model.config
    assert again.lm_head.weight is again.transformer.wte.weight
    for name, p in again.named_parameters():
        assert p.requires_grad
        assert p.dtype == torch.float32
        assert torch.equal(p, model.get_parameter(name).float())
        assert (p.data_ptr() == model.get_parameter(name).data_ptr()) == (dtype == torch.float32)
    assert from_checkpoint(checkpoint_of(model, gelu="tanh")).config.gelu == "tanh"
    assert from_checkpoint(checkpoint_of(model), dropout=0.0).config.dropout == 0.0


def test_what_is_no_gpts_is_refused():
    good = checkpoint_of(make_model())
    name, bias = "transformer.ln_f.bias", good["model"]["transformer.ln_f.bias"]
    for tensor, message in ((bias.long(), "has torch.int64"), (bias[:1].clone().expand(12), "has more elements than")):
        with pytest.raises(ValueError, match=f"^model: {name} {message}"):
            from_checkpoint(good | {"model": good["model"] | {name: tensor}})
    for changes, message in (
        ({"block_size": 16}, r"transformer\.wpe\.weight has shape \(8, 12\), expected \(16, 12\)"),
        ({"n_layer": 10**9}, r"transformer\.h\.2 is missing: n_layer is 1000000000"),  # it would take forever to build
    ):
        with pytest.raises(ValueError, match=f"^model: {message}"):
            from_checkpoint(good | {"model_args": good["model_args"] | changes})


TRANSFORMERS = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel

idx = torch.load("idx.pt")
logits = {}
for name in ("tanh", "erf"):
    model, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    logits[name] = model.eval()(idx).logits.detach()
torch.manual_seed(0)
config = GPT2Config(n_layer=2, n_head=2, n_embd=12, vocab_size=11, n_positions=8)
model = GPT2LMHeadModel(config).eval()
model.save_pretrained("theirs")
logits["theirs"] = model(idx).logits.detach()
torch.save(logits, "logits.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_agrees(tmp_path):
    """In a process of its own, away from our packages: transformers looks for one of the name `kernels`."""
    idx = torch.randint(11, (3, 8))
    torch.save(idx, tmp_path / "idx.pt")
    models = {"tanh": make_model(gelu="tanh", bias=False, dropout=0.1), "erf": make_model(gelu="erf")}
    for name, model in models.items():
        export_gpt2(model, tmp_path / name)
    command = [sys.executable, "-I", "-c", TRANSFORMERS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    models["theirs"] = load_gpt2(tmp_path / "theirs").eval()
    for name, logits in torch.load(tmp_path / "logits.pt").items():
        torch.testing.assert_close(models[name](idx, idx)[0], logits, rtol=0, atol=1e-4)
    assert "transformers" not in sys.modules
