"""The command that exports a checkpoint."""

from pathlib import Path

import pytest
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
    assert capsys.readouterr().out.startswith("folder: iteration 7 of out/ckpt.pt, written")
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
