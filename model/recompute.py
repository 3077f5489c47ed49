"""Activation checkpointing: parts of a block are not kept for the backward pass; it computes them again (Chen et al.
2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174).

| mode    | computed again                                                     |
|---------|--------------------------------------------------------------------|
| "none"  | nothing                                                            |
| "mlp"   | the MLP, more than half of what a block keeps                      |
| "block" | all of a block except attention and operations that draw at random |

`train/dryrun.py` finds how much memory each mode takes. A fused MLP is one operation, so all of it is computed again,
also its second matmul, which is not needed.

Random operations are never repeated: the backward pass needs the forward pass's dropout masks. The generator cannot be
set back, because CUDA forbids reading its state while a graph is captured (`train/graph.py`). So a selective policy
keeps the results of random operations: masks, or the seeds of the fused kernels' masks. torch marks these operations
with a tag, `nondeterministic_seeded`. It marks attention's operations too. That is good: attention takes the most time
to repeat, and its result is small, M x C and one float32 a row and head. Attention by plain matmuls (`kernels/cpu.py`)
is computed again from its mask. The result of an operation that writes in place cannot be kept; F.dropout on a CPU
does so, `kernels/reference.py`'s does not.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "mlp", "block")


def recomputed(function: Callable[..., Any], *args: Any, keep_random: bool) -> Any:
    """function(*args). Only the arguments are kept for the backward pass; with `keep_random` attention's results and
    random results too, which are dropout's masks or their seeds. Without it `function` must draw no random numbers."""
    if not torch.is_grad_enabled():  # torch 2.11's `checkpoint` would do more than this call
        return function(*args)
    options = {"context_fn": _contexts} if keep_random else {}
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_random(context: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    attention = op.namespace.startswith("flash_attn")  # this package's operations have no tag
    kept = attention or torch.Tag.nondeterministic_seeded in op.tags
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _keep_random)
