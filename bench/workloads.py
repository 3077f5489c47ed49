"""The training steps that are timed, by their shapes."""

from dataclasses import dataclass

from bench.results import Shape
from model import GPTConfig


@dataclass(frozen=True)
class Workload:
    name: str
    config: GPTConfig
    batch_size: int
    accumulation: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of an iteration."""
        return self.accumulation * self.batch_size * self.config.block_size

    @property
    def shape(self) -> Shape:
        """The shape as a results file stores it."""
        sizes = {
            name: getattr(self.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        }
        return Shape(**sizes, bias=int(self.config.bias), batch_size=self.batch_size, accumulation=self.accumulation)


def _gpt2(name: str, batch_size: int, **shape: int) -> Workload:
    return Workload(name, GPTConfig(bias=False, **shape), batch_size)


_CHAR = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "bias": False}
_CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 96, "bias": False}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cpu", GPTConfig(**_CPU), 12),  # what a machine without a GPU runs by default
        Workload("shakespeare_char", GPTConfig(**_CHAR, dropout=0.2), 64),  # many small launches
        _gpt2("gpt2", 32),
        _gpt2("gpt2-batch-1", 1),  # shows the host's overhead
        _gpt2("gpt2-batch-4", 4),
        _gpt2("gpt2-medium", 16, n_layer=24, n_head=16, n_embd=1024),
        _gpt2("gpt2-large", 8, n_layer=36, n_head=20, n_embd=1280),
        _gpt2("gpt2-xl", 4, n_layer=48, n_head=25, n_embd=1600),
    )
}
DEFAULTS = {"cpu": ("cpu",), "cuda": ("gpt2", "shakespeare_char", "gpt2-batch-1")}
