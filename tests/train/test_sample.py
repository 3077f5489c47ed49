"""The command that samples: it prints like nanoGPT, loads its checkpoints, and gives one line for each mistake."""

import gzip
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from model import GPT, GPTConfig, Precision
from tests.train.checkpoints import save_gpt
from tests.train.jobs import ROOT
from train.checkpoint import load
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


def test_the_first_token_does_not_wait_for_dynamo(run_dir):
    """Importing it takes two seconds, half of the time until there is text."""
    draw = "train.sample.main(['--num_samples=1', '--max_new_tokens=2'])"
    script = f"import sys, train.sample; {draw}; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


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
    Path("prompt.txt").write_bytes(gzip.compress(b"\xef\xbb\xbffrom a file\r\n"))
    assert samples(capsys, "--start=FILE:~/prompt.txt")[0].startswith("from a file\n")
    Path("bytes").write_bytes(b"\xefa\r\n\xff")
    assert ByteTokenizer().encode(read_prompt("FILE:bytes", ByteTokenizer())) == list(b"\xefa\r\n\xff")


def test_text_streams_and_ends_at_the_end_of_text_where_asked_and_never_inside_a_character(monkeypatch):
    drawn = []

    def draw(tokens):
        def generate(*_, **__):
            for token in tokens:
                drawn.append(token)
                yield torch.tensor([token])

        monkeypatch.setattr("train.sample.generate", generate)

    draw("aé€!".encode() + b"\xe2\x82")  # the last character is cut off
    pieces = sample_text(make_model(), ByteTokenizer(), SampleConfig(start="é"))
    assert next(pieces) == "é"
    assert drawn == []
    assert next(pieces) == "a"
    assert drawn == [ord("a")]
    assert list(pieces) == ["é", "€", "!", "\ufffd"]

    draw([11, 13, 50256, 13])
    for asked, text in ((False, "<|endoftext|>hi,.<|endoftext|>."), (True, "<|endoftext|>hi,.")):
        config = SampleConfig(start="<|endoftext|>hi", end_of_text=asked)
        assert "".join(sample_text(make_model(), GPT2Tokenizer(), config)) == text


@pytest.mark.parametrize(
    ("chars", "start"), [(CHARS, ""), ("'\"$`", "\n\nÜ"), ("\u2028", ""), ("\x1b", "Ü"), ("$`\\ ", "")]
)
def test_the_prompt_that_a_message_suggests_works(run_dir, capsys, chars, start):
    write_checkpoint(CharTokenizer(chars).meta())
    with pytest.raises(UserError, match=r"^start: ") as caught:
        samples(capsys, f"--start={start}")
    argument = str(caught.value)[str(caught.value).index("--start=") :]
    shell = subprocess.run(["bash", "-c", f"printf %s {argument}"], capture_output=True, check=True)
    assert len(samples(capsys, shell.stdout.decode(), "--max_new_tokens=1")) == 2


def test_a_sample_does_nothing_to_the_terminal(run_dir, capsys):
    chars = "\n\t\x1b\x07\x9b\ré"
    write_checkpoint(CharTokenizer(chars).meta())
    text = "".join(samples(capsys, f"--start={chars}"))
    assert text.startswith("\n\t\\x1b\\x07\\x9b\\ré")
    assert not set(text) & set("\x1b\x07\x9b\r")


def test_nanogpts_checkpoint_has_the_tokenizer_of_its_dataset(run_dir, capsys):
    tokenizer = CharTokenizer(CHARS + "1234")
    checkpoint = load(Path("out/ckpt.pt")) | {"config": {"dataset": "letters"}}
    del checkpoint["nanofuse"]
    torch.save(checkpoint, "out/ckpt.pt")
    Path("data/letters").mkdir(parents=True)
    Path("data/letters/meta.pkl").write_bytes(pickle.dumps({"vocab_size": 32, "itos": [*tokenizer.chars]}))
    expected = make_model().eval().generate(torch.tensor([tokenizer.encode("hey")]), 20, 0)[0].tolist()
    assert samples(capsys, "--start=hey", "--temperature=0", "--dtype=float32") == [tokenizer.decode(expected)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casting_once_changes_nothing(dtype):
    model, idx = make_model(Precision(dtype), bias=True).eval(), torch.randint(32, (2, 9))
    logits, _ = model(idx)
    to_inference(model, torch.device("cpu"))
    assert torch.equal(model(idx)[0], logits)
    assert {layer.weight.dtype for layer in model.modules() if isinstance(layer, torch.nn.Linear)} == {dtype}


def test_without_a_compiler_it_goes_on(run_dir, capsys, monkeypatch):
    expected = samples(capsys)

    def fail(model, **options):
        broken = make_model()
        broken.forward = mock.Mock(side_effect=RuntimeError("\nno C++ compiler\nat all"))
        return broken

    monkeypatch.setattr(torch, "compile", fail)
    main(["--device=cpu", "--num_samples=2", "--max_new_tokens=20", "--compile"])
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n---------------\n" for text in expected)
    assert err.startswith("out/ckpt.pt, iteration 7: 0.00M parameters, char tokens, ")
    assert "compile: not possible here, going on without it: no C++ compiler\n" in err


def test_mistakes(run_dir, capsys):
    Path("binary.txt").write_bytes(b"ab\xff\xfe")
    mine = CharTokenizer(CHARS).meta()
    for argument, message, tokenizer in (
        ("--out_dir=nowhere", r"no.* nowhere/ckpt\.pt", {}),
        ("--init_from=nowhere", "init_from: nowhere: no such file or folder, and not one of gpt2", {}),
        ("--start=FILE:binary.txt", r"start: binary\.txt: byte 2 is not UTF-8", {}),
        ("--top_p=0", "top_p: got 0", {}),
        ("--num_samples=0", "num_samples: got 0", {}),
        ("--max_new_tokens=1000000000000", "got 1000000000000, expected below 100000000", {}),
        ("--end_of_text", "end_of_text: got True, but the tokenizer, char, has no end-of-text token", {}),
        ("--seed=1", "the checkpoint's tokenizer: ", {"vocab_size": "28"}),
        ("--seed=1", r"the model has 32 tokens, its tokenizer \(char\) 33", CharTokenizer(map(chr, range(33))).meta()),
    ):
        write_checkpoint(mine | tokenizer)
        with pytest.raises(UserError, match=message):
            main(["--device=cpu", argument])
        assert capsys.readouterr().out == ""
