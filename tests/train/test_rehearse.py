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


def test_gpt2_on_an_h100(rehearse) -> None:
    said = rehearse("gpt2", "--compile", "--rehearse=h100")
    assert "data/openwebtext is not prepared yet" in said
    assert "vocabulary is taken to be 50,304" in said
    assert re.search(r"^launches: \d+ a micro-step, \d+ an update$", said, re.MULTILINE)
    assert re.search(r"^memory: \d+\.\d GB estimated: weights 0\.5.*has 84\.5 GB free$", said, re.MULTILINE)
    floor, best, worst = map(
        float, re.search(r"floor: ([\d.]+) ms(?s:.)*expected: ([\d.]+) to ([\d.]+) ms", said).groups()
    )
    assert floor < best < worst
    assert "an estimate, nothing was measured" in said
    assert "\nmeasured on the card when the run starts: attention, the MLP's matmuls; counted here: torch's own" in said
    assert said.splitlines()[-1].startswith("it would run")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--block_size=100000"], "block_size=100000"),
        (["--attention=cudnn", "--dropout=0.2"], "(with dropout=0.2): cudnn "),
        (["--out_dir=/dev/null/x"], "out_dir"),
        (["--kernels=reference", "--loss_chunk=64"], "loss_chunk"),
        (["--init_from=gpt2-xl", "--n_layer=3"], "n_layer"),
        (["--batch_size=65536", "--n_embd=512", "--kernels=reference"], "GB, what NVIDIA H100 80GB HBM3 has free; --"),
    ],
)
def test_bad_settings_are_refused_as_for_a_run(rehearse, argv: list[str], words: str) -> None:
    assert words in refusal(rehearse, *SMALL, "--rehearse=h100", *argv)


def test_weights_by_name_and_what_the_card_would_measure(rehearse) -> None:
    """Weights are not downloaded. Of the fused kernels, the MLP's matmuls are measured too: `test_gpt2_on_an_h100`."""
    said = rehearse("--init_from=gpt2", "--dataset=openwebtext", "--batch_size=1", "--rehearse=b200")
    assert re.search(r"^number of parameters: 123\.\d\dM", said, re.MULTILINE)
    said = rehearse(*SMALL, "--kernels=reference", "--rehearse=a10")
    assert "\nmeasured on the card when the run starts: attention; " in said
    assert "kernels: not compiled: the reference has none of its own" in said
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
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {['train', *SMALL, '--rehearse=h100']}; "
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
