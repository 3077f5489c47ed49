"""The command that exports a checkpoint."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from model import GPT, GPTConfig
from model.pretrained import load_gpt2
from train.checkpoint import MODEL_ARGS, pack, save
from train.errors import UserError
from train.export import main


@pytest.fixture
def model(tmp_path, monkeypatch) -> GPT:
    """A model. Its checkpoint is in out/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=12, gelu="tanh"))
    args = {name: getattr(model.config, name) for name in MODEL_ARGS}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    save(Path("out"), pack(model.state_dict(), optimizer, args, 7, 1.5, {}, {"gelu": "tanh"}), keep=1)
    return model


def test_export(model, capsys):
    main(["--out_dir=out", "--to=folder"])
    assert capsys.readouterr().out.startswith("folder: written")
    again = load_gpt2("folder")
    assert again.config == model.config
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "to: got '', expected a folder"),
        (["--to=folder", "--out_dir=nowhere"], r"no.* nowhere/ckpt\.pt"),
        (["--to=out/ckpt.pt"], r"to: out/ckpt\.pt cannot be written \(File exists\)"),
    ],
)
def test_mistakes(model, argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)
    assert not Path("folder").exists()


def test_a_failed_export_leaves_the_old_one(model, monkeypatch):
    main(["--to=folder"])
    before = {path.name: path.read_bytes() for path in Path("folder").iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors"]
    Path("folder/.staging-killed").mkdir()  # what a killed export left
    Path("folder/.staging-killed/model.safetensors").write_bytes(b"half")

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(UserError, match=r"to: folder cannot be written \(No space left on device\)"):
        main(["--to=folder"])
    assert {path.name: path.read_bytes() for path in Path("folder").iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_export_goes_over_files_only(model, name):
    Path("folder", name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"to: folder cannot be written \(it is a folder, expected a regular file"):
        main(["--to=folder"])
    assert [path.name for path in Path("folder").iterdir()] == [name]
