"""`--kernels` and `--loss_chunk` change only the speed of a run."""

import pytest
import torch

from kernels import REFERENCE, Ops
from kernels.launch import INTERPRETED
from tests.train.runs import logged, resume, run
from train import plan
from train.config import TrainConfig
from train.errors import UserError
from train.plan import choose_ops

FUSED = dict(
    kernels="fused", device="cpu" if INTERPRETED else "cuda", dtype="float32", dropout=0.0, n_layer=2, n_embd=16,
    n_head=2, block_size=8, batch_size=2, gradient_accumulation_steps=1, eval_interval=100, eval_iters=1, max_iters=4,
)  # fmt: skip


@pytest.mark.slow
def test_a_fused_run_its_checkpoint_and_the_loss_in_chunks(tmp_path):
    for name, changes in (
        ("reference", dict(kernels="reference")),
        ("fused", {}),
        ("chunks", dict(loss_chunk=5)),
        ("moved", dict(max_iters=2)),
    ):
        run(tmp_path / name, **FUSED | changes)
    resume(tmp_path / "moved", max_iters=4, kernels="reference")
    expected, *others = (
        {n: record["loss"] for n, record in logged(tmp_path / name).items()}
        for name in ("reference", "fused", "chunks", "moved")
    )
    assert len(expected) == 4
    for got in others:
        assert got == pytest.approx(expected, rel=1e-5)


# Where they cannot run

CUDA = torch.device("cuda")
BROKEN = "Failed to find C compiler."


def test_auto_goes_on_without_and_says_why(tmp_path, capsys, monkeypatch):
    """The rest of the run is the CPU's."""

    def as_on_cuda(config: TrainConfig, device: torch.device, *others: object) -> tuple:
        return choose_ops(config, CUDA, *others)

    monkeypatch.setattr(plan, "missing", lambda device: BROKEN)
    monkeypatch.setattr(plan, "choose_ops", as_on_cuda)
    assert run(tmp_path / "out", max_iters=1) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "kernels" in line]
    assert lines[0].endswith("float32, reference kernels")
    assert lines[1:] == [f"kernels: the fused ones cannot run here, going on with the reference's: {BROKEN}"]


def test_fused_is_refused_and_nothing_is_said_of_what_was_not_asked_for(monkeypatch):
    def choose(**settings) -> tuple[Ops, int, str]:
        return choose_ops(TrainConfig(**settings), CUDA, torch.float32, 50, TrainConfig.n_embd)

    monkeypatch.setattr(plan, "missing", lambda device: BROKEN)
    for settings, message in (
        (dict(kernels="fused"), f"kernels: got fused, expected reference or auto: {BROKEN}"),
        (dict(loss_chunk=5), rf"loss_chunk: got 5, .* all logits \(the fused ones .* here: {BROKEN}\)"),
        (dict(loss_chunk=5, kernels="reference"), "got 5, expected 0 or -1: the reference kernels hold all logits$"),
    ):
        with pytest.raises(UserError, match=message):
            choose(**settings)
    assert choose(kernels="reference") == (REFERENCE, 0, "")


def test_a_model_too_wide_for_a_kernel_takes_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "missing", lambda device: "")
    reason = "their LayerNorm takes at most 4096 channels, the model has 5120"
    ops, _, said = choose_ops(TrainConfig(), CUDA, torch.float32, 50, 5120)
    assert ops is REFERENCE
    assert said == f"kernels: the fused ones cannot run here, going on with the reference's: {reason}"
    with pytest.raises(UserError, match=f"kernels: got fused, expected reference or auto: {reason}"):
        choose_ops(TrainConfig(kernels="fused"), CUDA, torch.float32, 50, 5120)
