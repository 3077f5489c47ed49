"""GPT-2: the model, its attention, its FLOP counts, sampling, and reading and writing weights.

from model import GPT, GPTConfig
model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))
logits, loss = model(idx, targets)
"""

try:
    from kernels import REFERENCE as _OURS  # noqa: F401
except ImportError as error:
    if not (error.name or "kernels").startswith("kernels"):  # torch, say, is not installed
        raise
    raise ImportError(
        f"the package `kernels` that Python found ({error.path or 'none at all'}) is not nanofuse's: "
        "start from nanofuse's folder, or `pip uninstall kernels` and then `pip install -e .` there"
    ) from error

from model.config import GPT2_SIZES, GPTConfig
from model.gpt import GPT, Precision

__all__ = ["GPT", "GPT2_SIZES", "GPTConfig", "Precision"]
