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
keeps the results of random operations: masks. (The fused kernels' masks come from seeds that a block is given.) torch
marks these operations with a tag, `nondeterministic_seeded`. It marks attention's operations too, with dropout or
without. That is good: attention takes the most time to repeat, and its result is small, M x C and one float32 a row and
head. Attention by plain matmuls (`kernels/cpu.py`) is computed again from its mask.

The policy sees single operations. The result of one that writes in place cannot be kept, since the computation writes
over it; F.dropout on a CPU does so, `kernels/reference.py`'s does not. torch.compile follows the policy too, and warns
once about such operations. Without gradients, as in an evaluation, these are plain calls.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "mlp", "block")


def recompute_mlp(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args). Only the arguments are kept for the backward pass. `function` must draw no random numbers."""
    return _checkpointed(function, *args)


def recompute_block(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args). Only the arguments, attention's results and random results are kept for the backward pass.
    Random results are dropout's masks, or their seeds."""
    return _checkpointed(function, *args, context_fn=_contexts)


def _checkpointed(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():  # torch 2.11's `checkpoint` would do more than this call
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_random(context: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    attention = op.namespace.startswith("flash_attn")  # this package's operations have no tag
    kept = attention or torch.Tag.nondeterministic_seeded in op.tags
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _keep_random)
