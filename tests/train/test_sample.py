"""The command that samples: it prints like nanoGPT, loads its checkpoints, and gives one line for each mistake."""

import itertools
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from model import GPT, GPTConfig, Precision
from tests.train.checkpoints import save_gpt
from train.errors import UserError
from train.sample import SampleConfig, load_model, main, read_prompt, sample_text, to_inference
from train.text import ByteTokenizer, CharTokenizer, GPT2Tokenizer

CHARS = "\n abcdefghijklmnopqrstuvwxyz"


def make_model(precision: Precision = Precision(), **shape) -> GPT:
    torch.manual_seed(0)
    config = {"block_size": 16, "vocab_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 8, "bias": False}
    return GPT(GPTConfig(**config | shape), precision=precision)


def write_checkpoint(tokenizer: dict) -> None:
    save_gpt(make_model(gelu="tanh"), tokenizer=tokenizer)


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> None:
    """The current folder has a checkpoint in out/."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(CharTokenizer(CHARS).meta())


def samples(capsys, *argv: str) -> list[str]:
    main(["--device=cpu", "--num_samples=2", "--max_new_tokens=20", *argv])
    *found, rest = capsys.readouterr().out.split("\n---------------\n")
    assert rest == ""
    return found


def test_output(run_dir, capsys):
    found = samples(capsys, "--start=to be ")
    assert [len(text) for text in found] == [6 + 20] * 2  # ids from 28 on are padding and would not decode
    assert all(text.startswith("to be ") for text in found)
    assert found[0] != found[1]
    assert load_model(SampleConfig(), torch.float32)[0].config.gelu == "tanh"  # from the checkpoint
    assert samples(capsys, "--start=to be ", "--seed=1") != found
    a, b = samples(capsys, "--temperature=0")
    assert a == b
    assert samples(capsys, "--top_k=1") == samples(capsys, "--top_p=0.0001") == [a, b]
    assert samples(capsys, "--top_k=0") == samples(capsys, "--top_k=1000")
    Path("out").rename("moved")
    for named in ("moved", "moved/ckpt.pt"):  # as `python -m train` takes them
        assert samples(capsys, "--start=to be ", f"--init_from={named}") == found


def test_prompt_from_a_file(run_dir, capsys, monkeypatch):
    """It is read as a corpus is."""
    monkeypatch.setenv("HOME", os.getcwd())
    Path("prompt.txt").write_bytes(b"\xef\xbb\xbffrom a file\r\n")
    assert samples(capsys, "--start=FILE:~/prompt.txt")[0].startswith("from a file\n")
    assert read_prompt("FILE:prompt.txt", ByteTokenizer()).endswith("from a file\r\n")


def test_text_streams_and_ends_at_the_end_of_text_where_asked_and_never_inside_a_character(monkeypatch):
    def draw(tokens):
        drawn = (torch.tensor([token]) for token in tokens)
        monkeypatch.setattr("train.sample.generate", lambda *_, **__: drawn)
        return drawn

    rest = draw("aé€!".encode() + b"\xe2\x82")  # the last character is cut off
    pieces = sample_text(make_model(), ByteTokenizer(), SampleConfig(start="é"))
    assert [next(pieces), next(pieces)] == ["é", "a"]
    assert len(list(itertools.islice(rest, 2))) == 2  # not drawn before: é, which the text lacks now
    assert list(pieces) == ["€", "!", "\ufffd"]

    for asked, text in ((False, "<|endoftext|>hi,.<|endoftext|>."), (True, "<|endoftext|>hi,.")):
        draw([11, 13, 50256, 13])
        config = SampleConfig(start="<|endoftext|>hi", end_of_text=asked)
        assert "".join(sample_text(make_model(), GPT2Tokenizer(), config)) == text


def test_a_device_without_memory_is_said(run_dir, monkeypatch):
    full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    monkeypatch.setattr("train.sample.to_inference", full)
    with pytest.raises(UserError, match=r"^memory: CUDA out of memory.; --device=cpu takes none of it$"):
        main(["--device=cpu"])


def test_the_prompt_that_a_message_suggests_works_and_does_nothing_to_the_terminal(run_dir, capsys):
    write_checkpoint(CharTokenizer("\x1b'").meta())
    with pytest.raises(UserError, match=r"^start: ") as caught:
        samples(capsys, "--start=Ü")
    argument = str(caught.value)[str(caught.value).index("--start=") :]
    shell = subprocess.run(["bash", "-c", f"printf %s {argument}"], capture_output=True, check=True)
    assert "\\x1b" in samples(capsys, shell.stdout.decode())[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casting_once_changes_nothing(dtype):
    model, idx = make_model(Precision(dtype), bias=True).eval(), torch.randint(32, (2, 9))
    logits, _ = model(idx)
    to_inference(model, torch.device("cpu"))
    assert torch.equal(model(idx)[0], logits)
    assert {layer.weight.dtype for layer in model.modules() if isinstance(layer, torch.nn.Linear)} == {dtype}


def test_without_a_compiler_it_goes_on(run_dir, capsys, monkeypatch):
    expected, broken = samples(capsys), make_model()
    broken.forward = mock.Mock(side_effect=RuntimeError("\nno C++ compiler\nat all"))
    monkeypatch.setattr(torch, "compile", lambda model, **options: broken)
    main(["--device=cpu", "--num_samples=2", "--max_new_tokens=20", "--compile"])
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n---------------\n" for text in expected)
    assert "compile: not possible here, going on without it: no C++ compiler\n" in err


def test_mistakes(run_dir, capsys):
    mine = CharTokenizer(CHARS).meta()
    for argument, message, tokenizer in (
        ("--out_dir=nowhere", r"no.* nowhere/ckpt\.pt", {}),
        ("--init_from=nowhere", "init_from: nowhere: no such file or folder, and not one of gpt2", {}),
        ("--start=FILE:nowhere.txt", r"start: nowhere\.txt: ", {}),
        ("--top_p=0", "top_p: got 0", {}),
        ("--end_of_text", "end_of_text: got True, but the tokenizer, char, has no end-of-text token", {}),
        ("--seed=1", "tokenizer: Expected `int`", {"vocab_size": "28"}),
        ("--seed=1", r"the model has 32 tokens, its tokenizer \(char\) 33", CharTokenizer(map(chr, range(33))).meta()),
    ):
        write_checkpoint(mine | tokenizer)
        with pytest.raises(UserError, match=message):
            main(["--device=cpu", argument])
        assert capsys.readouterr().out == ""
