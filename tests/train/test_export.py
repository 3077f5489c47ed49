"""The command that exports a checkpoint."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch

from model import GPT, GPTConfig
from model.pretrained import load_gpt2
from tests.train.checkpoints import save_gpt
from train.errors import UserError
from train.export import main, tokenizer_files
from train.sample import main as sample
from train.text import ByteTokenizer, CharTokenizer, GPT2Tokenizer

TEXT = "Hello  world\n\n it's 'some 1234 é€ ab<|endoftext|> x\t"
MODEL_FILES = ["config.json", "model.safetensors"]


@pytest.fixture
def model(tmp_path, monkeypatch) -> GPT:
    """A model. Its checkpoint is in out/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=12, gelu="tanh"))
    save_gpt(model)
    return model


def files(folder: str = "folder") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_export(model, capsys):
    """With its tokenizer, if the checkpoint holds one. That of an earlier export does not stay in the folder."""
    save_gpt(model, tokenizer=CharTokenizer("abcdefghijk").meta())
    main(["--to=folder"])
    said = capsys.readouterr().out
    assert said.startswith("folder: iteration 7 of out/ckpt.pt, written")
    assert "its tokenizer (char), too: transformers.AutoTokenizer.from_pretrained('folder')" in said
    again = load_gpt2("folder")
    assert again.config == model.config
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())
    assert sorted(files()) == sorted([*MODEL_FILES, "meta.json", "tokenizer.json", "tokenizer_config.json"])
    sample(["--init_from=folder", "--device=cpu", "--start=ba", "--num_samples=1", "--max_new_tokens=9"])
    assert set(capsys.readouterr().out.split("\n")[0]) <= set("abcdefghijk")
    Path("folder/notes.md").write_text("mine")
    save_gpt(model)
    main(["--to=folder"])
    assert "folder: without a tokenizer: tokenizer: the dataset's is not known" in capsys.readouterr().out
    assert sorted(files()) == [*MODEL_FILES, "notes.md"]


@pytest.mark.parametrize("make", [lambda: CharTokenizer(sorted(set(TEXT))), ByteTokenizer, GPT2Tokenizer])
def test_the_tokenizer_is_that_of_the_checkpoint(make):
    ours = make()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_files(ours, 8)["tokenizer.json"]))
    assert theirs.encode(TEXT).ids == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT), skip_special_tokens=False) == TEXT


def test_mistakes_and_a_full_disk_change_nothing(model, monkeypatch):
    """An export goes over another export only, not over a model that was downloaded or a dataset's meta.json."""
    main(["--to=folder"])
    before = files()
    Path("folder/.staging-killed").mkdir()  # what a killed export left
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text('{"model_type": "gpt2"}')

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for argv, message in (
        ([], "to: got '', expected a folder"),
        (["--to=new", "--out_dir=nowhere"], r"no.* nowhere/ckpt\.pt"),
        (["--to=out/ckpt.pt"], r"to: out/ckpt\.pt: cannot be written: File exists"),
        (["--to=theirs"], r"to: theirs holds config\.json, which is not of an export; name another folder"),
        (["--to=folder"], "to: folder: cannot be written: No space left on device"),
        (["--to=new"], "to: new: cannot be written: No space left on device"),
    ):
        with pytest.raises(UserError, match=message):
            main(argv)
    assert files() == before
    assert list(files("theirs")) == ["config.json"]
    assert sorted(path.name for path in Path().iterdir()) == ["folder", "out", "theirs"]
