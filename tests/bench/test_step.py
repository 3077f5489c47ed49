"""The step benchmark: what it times must have been checked, and what it writes must hold every sample."""

import json
import sys
from pathlib import Path

import pytest

from bench import step
from train.errors import UserError

# A stand-in for a nanoGPT checkout: the same interface over our own model, with a fault to switch on.
STAND_IN = """
from dataclasses import dataclass
import torch
import model

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(model.GPTConfig(**vars(config)))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate * FAULT, betas=betas)
"""


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(fault: float) -> Path:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "model.py").write_text(STAND_IN.replace("FAULT", str(fault)))
        argv = ["bench.step", f"--nanogpt_dir={tmp_path}", "--device=cpu", "--dtype=float32"]
        monkeypatch.setattr(sys, "argv", [*argv, "--rounds=2", "--iters=3", "--out=results/step.json"])
        step.main()
        return tmp_path / "results" / "step.json"

    return measure


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_every_variant_is_checked_timed_and_written(measure, capsys) -> None:
    results = json.loads(measure(1).read_text())
    variants = ["nanoGPT eager", "ours eager", "nanoGPT compiled", "ours compiled"]
    assert list(results["milliseconds"]) == variants
    assert all(len(samples) == 6 and min(samples) > 0 for samples in results["milliseconds"].values())
    assert results["losses"]["ours eager"] == pytest.approx(results["losses"]["nanoGPT eager"], rel=1e-4)
    assert {"device", "torch", "commit", "date", "command"} <= results.keys()
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in variants)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_what_trains_another_model_is_not_timed(measure, tmp_path) -> None:
    with pytest.raises(UserError, match=r"its losses are off by .*; not timed"):
        measure(3)
    assert not (tmp_path / "results").exists()


def test_the_table_is_relative_to_the_better_of_nanogpts_modes() -> None:
    samples = {"nanoGPT eager": [40.0] * 4, "nanoGPT compiled": [30.0] * 4, "ours eager": [20.0] * 4}
    results = {"milliseconds": samples, "flops_per_iteration": 1e9, "peak_flops": {"flops": 1e11}}
    table = step.table(results).splitlines()
    assert table[2] == "| nanoGPT eager | 40.00 | 40.00 | 40.00 | 25.0% | 0.75x |"
    assert table[4] == "| ours eager | 20.00 | 20.00 | 20.00 | 50.0% | 1.50x |"


def test_a_folder_without_nanogpt(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"nanogpt_dir: got '.*', expected a nanoGPT checkout"):
        step.nanogpts(str(tmp_path), {}, None, None, None, compile=False)
