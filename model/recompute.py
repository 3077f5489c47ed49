"""Activation checkpointing: insides of a block are not kept for the backward pass but computed again in it (Chen et al.
2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174).

| mode    | not kept, but computed again                                     |
|---------|------------------------------------------------------------------|
| "none"  | nothing                                                          |
| "mlp"   | the MLP's insides, more than half of what a block keeps          |
| "block" | all of a block but attention and what draws random numbers       |

How much each keeps, `train/dryrun.py` finds. A fused MLP is one operation, so all of it is computed again, its second
matmul in vain.

What draws random numbers is never done twice: the backward pass must see the forward pass's dropout masks, and setting
the generator back is no way to get them. CUDA forbids to read its state while a graph is captured, as steps are
(`train/graph.py`). So a selective policy keeps the results of these operations: masks, or the fused kernels' seeds, 8
bytes each. torch tags them `nondeterministic_seeded`, and with them every operation of scaled dot product attention,
with dropout or without. That suits: attention costs most to compute again, and its result is small, M x C and a float32
a row and head. Attention by matmuls (`model/attention.py`) is computed again from its random bits.

The policy sees single operations. One that writes in place cannot be kept, for the computation goes on to write over
it, as F.dropout does with its noise on a CPU: hence `dropout` in `kernels/reference.py`. torch.compile follows the
policy too, and warns once of just this. Where no gradient is wanted, as in an evaluation, these are plain calls.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "mlp", "block")


def recompute_mlp(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which the backward pass finds nothing but the arguments. It must draw no random numbers."""
    return _checkpointed(function, *args)


def recompute_block(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which the backward pass finds the arguments, attention's results and what was drawn at
    random: dropout's masks, or the seeds that they are made of."""
    return _checkpointed(function, *args, context_fn=_contexts)


def _checkpointed(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():  # torch 2.11 would do more than call it
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_random(context: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    attention = op.namespace.startswith("flash_attn")  # that package's operations, which are not tagged
    kept = attention or torch.Tag.nondeterministic_seeded in op.tags
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _keep_random)
