"""`--rehearse`: what it prints and decides about a run on a GPU that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train.__main__ as command
from tests.train.jobs import ROOT, make_data
from tests.train.runs import refusal

pytest.importorskip("triton")  # without it less is counted
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=64", "--block_size=64", "--batch_size=4", "--dataset=mine"]


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs `python -m train ARGV` in a folder with data/mine, which must not change. Returns what it printed."""
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data" / "mine")

    def go(*argv: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["train", *argv])
        try:
            assert command.main() == 0
        finally:
            assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().out

    return go


GPT2 = """
data: data/openwebtext is not prepared yet: python -m train.prepare openwebtext makes it; its vocabulary is taken to be 50,304
number of parameters: 123.59M; tokens per iteration: 491,520
memory: 7.3 GB estimated: weights 0.5, copies 0.2, moments 1.0, gradients 0.5, activations 3.7, logits 1.2, workspace 0.1; NVIDIA H100 80GB HBM3 has 84.5 GB free
measured on the card when the run starts: attention, the MLP's matmuls; counted here: torch's own and cuBLAS
launches: 268 a micro-step, 4 an update
bytes: 31.4 GB a micro-step, 4.7 GB an update, 1258.8 GB a step; 5 launches of a micro-step move less than 2 MB; counted without torch.compile
peak: 989 TFLOP/s, 3,350 GB/s: NVIDIA H100 data sheet, SXM, dense bf16
floor: 508.96 ms/iter, mfu 83.5%: every part at the card's peaks
expected: 729.6 to 971 ms/iter, mfu 44% to 58%, 506,220 to 673,691 tokens/s: an estimate, nothing was measured
"""  # noqa: E501, as the README shows it


def test_gpt2_on_an_h100(rehearse, monkeypatch: pytest.MonkeyPatch) -> None:
    said = rehearse("gpt2", "--compile", "--rehearse=h100")
    assert GPT2 in said
    assert said.splitlines()[-1] == "it would run: 77.2 GB of memory would be left"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "8" if name == "WORLD_SIZE" else "0")
    said = rehearse("gpt2", "--rehearse=h100")  # a rank has 5 of 40 micro-steps
    assert "4.7 GB an update, 161.5 GB a step" in said
    assert "nothing was measured, communication not counted" in said
    said = rehearse("gpt2", "--rehearse=h100", "--shard")
    assert "590.8 MB an update, 157.4 GB a step" in said  # an eighth of an update
    assert "; counted without torch.compile, FSDP's copies and torch's AdamW\n" in said


def test_a_peak_that_is_set_is_the_mfus_alone(rehearse) -> None:
    """The card is no slower if MFU is a share of an A100's peak, as nanoGPT's is."""
    of_a_h100, of_an_a100 = (rehearse("gpt2", "--rehearse=h100", *more) for more in ([], ["--peak_flops=312e12"]))
    times = r"([\d.]+) (?:to ([\d.]+) )?ms/iter, mfu ([\d.]+)%(?: to (\d+)%)?"
    ours, theirs = (re.findall(times, said) for said in (of_a_h100, of_an_a100))
    assert [found[:2] for found in ours] == [found[:2] for found in theirs]
    for own, other in zip(ours, theirs, strict=True):
        assert float(other[2]) == pytest.approx(float(own[2]) * 989 / 312, rel=0.02)
    assert "peak: 989 TFLOP/s, 3,350 GB/s: NVIDIA H100 data sheet, SXM, dense bf16\n" in of_a_h100
    assert "dense bf16; mfu is of 312 TFLOP/s, as set\n" in of_an_a100
    medium = ["--n_layer=24", "--n_head=16", "--n_embd=1024", "--batch_size=8"]
    assert re.search(r"^expected: 1\d,\d{3} to 1\d,\d{3} ms/iter", rehearse("gpt2", "--rehearse=l4", *medium), re.M)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--block_size=100000"], "block_size=100000"),
        (["--attention=cudnn", "--dropout=0.2"], "(with dropout=0.2): cudnn "),
        (["--out_dir=/dev/null/x"], "out_dir"),
        (["--kernels=reference", "--loss_chunk=64"], "loss_chunk"),
        (["--batch_size=65536", "--loss_chunk=4095"], "loss_chunk: got 4095, expected 0, -1 or at least 4096: at most"),
        (["--init_from=gpt2-xl", "--n_layer=3"], "n_layer"),
        (["--kernels=fused", "--n_embd=4160"], "kernels: got fused, expected reference or auto: their LayerNorm"),
        (["--batch_size=65536", "--n_embd=512", "--kernels=reference"], "GB, what NVIDIA H100 80GB HBM3 has free; --"),
    ],
)
def test_bad_settings_are_refused_as_for_a_run(rehearse, argv: list[str], words: str) -> None:
    assert words in refusal(rehearse, *SMALL, "--rehearse=h100", *argv)


def test_weights_by_name_and_what_the_card_would_measure(rehearse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not downloaded. Of the fused kernels, the MLP's matmuls are measured too: `test_gpt2_on_an_h100`."""
    said = rehearse("--init_from=gpt2", "--dataset=openwebtext", "--batch_size=1", "--rehearse=b200")
    assert re.search(r"^number of parameters: 123\.\d\dM", said, re.MULTILINE)
    said = rehearse(*SMALL, "--kernels=reference", "--rehearse=a10")
    assert "\nmeasured on the card when the run starts: attention; " in said
    assert "kernels: not compiled: the reference has none of its own" in said
    said = rehearse(*SMALL, "--n_embd=4160", "--rehearse=b200")  # wider than a kernel takes
    assert "kernels: not compiled: the run would take the reference's" in said
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = rehearse(*SMALL, "--dtype=float32", "--attention=flash", "--rehearse")  # bare: an H100, if there is no GPU
    assert "measured on the card" not in said
    assert "H100" in said.splitlines()[0]
    assert re.search(r"^data: data/mine, [\d,]+ tokens to train on, a vocabulary of \d+$", said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("triton", [True, False])
def test_kernels_are_compiled_without_spills_where_triton_is(tmp_path: Path, triton: bool) -> None:
    """In a separate process, without the interpreter."""
    make_data(tmp_path / "data" / "mine")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    more = [] if triton else ["--loss_chunk=64"]  # of which the reference, that is counted instead, has none
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {['train', *SMALL, *more, '--rehearse=h100']}; "
    code += "" if triton else "sys.modules['triton'] = None; "
    code += "import train.__main__; sys.exit(train.__main__.main())"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "it would run" in done.stdout
    rows = re.findall(r"^  (\w+_kernel) +x(\d+) +(\d+) registers, (\d+) spills", done.stdout, re.MULTILINE)
    kernels = {"add_layer_norm_fwd_kernel", "gelu_bwd_kernel", "cross_entropy_fwd_kernel", "adamw_update_kernel"}
    assert ({row[0] for row in rows} >= kernels) == triton
    assert all(spills == "0" for *_, spills in rows)
    assert ("Triton is not installed here" in done.stdout) != triton
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
