"""torch.compile, for a model with our operations in it."""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir  # TORCHINDUCTOR_CACHE_DIR, or the default

from model import GPT
from train.config import TrainConfig
from train.data import Batch
from train.errors import first_line
from train.hardware import synchronize
from train.step import Evaluation


def compile_module(function: Callable) -> Callable:
    """torch.compile for a model, or a part of one, with our operations in it."""
    register_fallbacks()
    return torch.compile(function)


def register_fallbacks() -> None:
    """Tell Inductor, before it meets our operations, that they are to be called as they are.

    It would find out by itself, but too late for the first graph. Of a sum that two of them read it would make two
    copies. And before torch 2.13 it writes out the arguments of an operation that it does not know, as deep as the
    graph goes: five times the text for every layer, so that 12 layers never end (pytorch #185937).
    """
    # only here: they take a second
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("nanofuse::"):
            op = getattr(torch.ops.nanofuse, name.removeprefix("nanofuse::")).default
            if op not in lowerings:
                make_fallback(op, tag_to_layout_constraint(get_layout_constraint_tag(op)))


def model_to_train(
    model: GPT, config: TrainConfig, device: torch.device, say: Callable[[str], None], *, by_block: bool = False
) -> nn.Module:
    """`model` as the step runs it: compiled if wanted and possible. by_block: in place and block by block, because a
    sharded block's parameters are gathered between blocks.

    torch.compile works at the first call. That call is made here, on zeros, as a step and as an evaluation make it. If
    it fails, the run goes on without. It leaves gradients behind, which the caller clears, and no loss: no loss may be
    alive when graphs are captured (see `GraphedStep`). A run that only evaluates ends before compiling would pay.
    """
    if not config.compile or config.eval_only:
        return model
    say("compiling the model... (takes a ~minute)")
    begin = time.perf_counter()
    compiled = model if by_block else compile_module(model)
    for block in model.transformer.h if by_block else ():
        block.forward = compile_module(block.forward)
    shape = config.batch_size, config.block_size
    # two tensors: one in both places would be compiled for that case alone
    idx, targets = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    try:
        compiled(idx, targets)[1].backward()
        Evaluation(compiled)([Batch(idx[None], targets[None], (0,))])
        synchronize(device)
        say(f"compiled in {time.perf_counter() - begin:.1f} s, kept for the next run in {cache_dir()}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from Dynamo, Inductor, a C++ compiler that is not there, Triton, a driver: all kinds
        say(f"compile: not possible on this machine, going on without it: {first_line(error)}")
        compiled = model
        for block in model.transformer.h if by_block else ():
            del block.forward  # what the class has shows again
    return compiled
