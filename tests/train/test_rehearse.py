"""`--rehearse`: what a run would do on a GPU that is not there, said and judged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train.__main__ as command
from tests.train.jobs import make_data
from train.errors import UserError
from train.hardware import CARDS
from train.settings import settings_of

ROOT = Path(__file__).parents[2]
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--batch_size=4"]


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs `python -m train ARGV` in an empty folder; what it printed. It must leave the folder empty."""
    monkeypatch.chdir(tmp_path)

    def go(*argv: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["train", *argv])
        try:
            assert command.main() == 0
        finally:
            assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().out

    return go


def refused(rehearse, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        rehearse(*argv)
    assert caught.value.status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    "argv",
    [
        ("gpt2", "--rehearse=h100", "--batch_size=512"),
        ("gpt2", "--rehearse=4090", "--batch_size=64"),
        ("gpt2", "--rehearse=l4", "--batch_size=64", "--kernels=reference"),
    ],
)
def test_what_does_not_fit_is_refused_with_settings_that_fit(rehearse, argv: tuple[str, ...]) -> None:
    message = refused(rehearse, *argv)
    found = re.fullmatch(r"memory: got a step of .* GB \(.*\), expected at most .* has free; (--.*) fits", message)
    assert found, message
    assert "it would run" in rehearse(*argv, *found[1].split())


def test_every_card_of_the_setting_is_known(rehearse) -> None:
    choices = settings_of(command.TrainConfig)["rehearse"].metadata["choices"]
    assert set(choices) == {"", "auto", *CARDS}
    for name in CARDS:
        assert "expected:" in rehearse(*SMALL, f"--rehearse={name}")


def test_bare_it_is_an_h100_where_there_is_no_gpu(rehearse) -> None:
    for argv in (["--rehearse"], ["--rehearse", "--max_iters=5"], ["--rehearse", "h100"]):
        assert "H100" in rehearse(*SMALL, *argv).splitlines()[0]
    assert "expected auto | a100 | h100" in refused(rehearse, "--rehearse=h300")


def test_data_that_is_there_is_checked(rehearse, tmp_path: Path) -> None:
    make_data(tmp_path / "data" / "mine")
    said = rehearse(*SMALL, "--block_size=16", "--dataset=mine", "--rehearse=a10")
    assert re.search(r"^data: data/mine, [\d,]+ tokens to train on, a vocabulary of \d+$", said, re.MULTILINE)
    assert "block_size=100000" in refused(rehearse, *SMALL, "--block_size=100000", "--dataset=mine", "--rehearse=a10")


def test_bad_settings_are_refused_as_for_a_run(rehearse) -> None:
    assert "n_embd" in refused(rehearse, *SMALL, "--n_embd=63", "--rehearse=h100")
    for attention, dropout in (("cudnn", 0.2), ("fa3", 0.25)):
        settings = f"--attention={attention}", f"--dropout={dropout}"
        assert f"(with dropout={dropout}): {attention} " in refused(rehearse, *SMALL, *settings, "--rehearse=h100")
    assert "out_dir" in refused(rehearse, *SMALL, "--out_dir=/dev/null/x", "--rehearse=h100")
    assert "loss_chunk" in refused(rehearse, *SMALL, "--kernels=reference", "--loss_chunk=64", "--rehearse=h100")
    assert "n_layer" in refused(rehearse, "--init_from=gpt2-xl", "--n_layer=3", "--rehearse=h200")


def test_weights_by_name_are_not_downloaded(rehearse) -> None:
    said = rehearse("--init_from=gpt2-xl", "--batch_size=1", "--rehearse=b200")
    assert re.search(r"^number of parameters: 155\d\.\d\dM", said, re.MULTILINE)


def test_the_reference_kernels(rehearse) -> None:
    said = rehearse(*SMALL, "--kernels=reference", "--rehearse=h100")
    assert "kernels: not compiled: the reference has none of its own" in said
    assert "\nmeasured on the card when the run starts: attention; " in said
    assert "measured on the card" not in rehearse(*SMALL, "--kernels=reference", "--attention=flash", "--rehearse=h100")
    for changes in (["--n_embd=60"], ["--dtype=float32"]):
        assert "the MLP's matmuls" not in rehearse(*SMALL, *changes, "--rehearse=h100")


def outside(tmp_path: Path, *argv: str, before: str = "pass") -> str:
    """What `python -m train` prints in a process of its own, without the interpreter; `before` is run there first."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {['train', *argv]}; {before}"
    code += "; import train.__main__; sys.exit(train.__main__.main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_are_compiled_without_spills(tmp_path: Path) -> None:
    said = outside(tmp_path, *SMALL, "--dropout=0.1", "--rehearse=h100")
    rows = re.findall(r"^  (\w+_kernel) +x(\d+) +(\d+) registers, (\d+) spills", said, re.MULTILINE)
    kernels = {"add_layer_norm_fwd_kernel", "gelu_bwd_kernel", "cross_entropy_fwd_kernel", "adamw_update_kernel"}
    assert kernels <= {row[0] for row in rows}
    assert all(spills == "0" for *_, spills in rows)
    assert not list(tmp_path.iterdir())


def test_without_triton_the_kernels_are_left_out(tmp_path: Path) -> None:
    said = outside(tmp_path, *SMALL, "--rehearse=h100", before="sys.modules['triton'] = None")
    assert "Triton is not installed here" in said
    assert "it would run" in said
