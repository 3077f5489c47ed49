"""torch.compile for a model that uses our operations."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from model import GPT
from train.config import TrainConfig
from train.errors import first_line
from train.hardware import synchronize


def compile_module(
    function: Callable, device: torch.device, *, profiled: bool = False, dynamic: bool | None = None
) -> Callable:
    """torch.compile for a model, or a part of one, that uses our operations, on `device`. RuntimeError on mps.

    torch's own generator draws random numbers, not Inductor's code. So dropout's masks are those of a run that is not
    compiled, and on a GPU the seeds of the fused kernels are one launch, not two.

    On a CPU C++ calls a graph's operations. Python would take about half a millisecond longer for a step of 4 layers.
    But torch's profiler sees only what Python calls. profiled: whether it must see all. dynamic: as torch has it; where
    it is set, Python calls.
    """
    if device.type == "mps":
        raise RuntimeError("compiled for mps, torch's LayerNorm can be wrong (pytorch #184328, #191976)")
    register_fallbacks()
    from_cpp = device.type == "cpu" and not (profiled or dynamic)
    # built separately from the kernels, it compiles sooner
    options = {"fallback_random": True, "cpp_wrapper": from_cpp, "cpp_wrapper_build_separate": from_cpp}
    return torch.compile(function, dynamic=dynamic, options=options)


def register_fallbacks() -> None:
    """Tell Inductor, before the first graph, to call our operations as they are.

    It would register them by itself, but too late for the first graph: if two of them read a sum, it would make two
    copies of it. Before torch 2.13 it also writes out the arguments of an unknown operation, to the full depth of the
    graph. Each layer makes this text five times longer, so 12 layers never finish (pytorch #185937).
    """
    # imported here: they take a second
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, short = name.partition("::")
        if namespace in ("nanofuse", "nanofuse_cpu"):
            op = getattr(getattr(torch.ops, namespace), short).default
            if op not in lowerings:
                make_fallback(op, tag_to_layout_constraint(get_layout_constraint_tag(op)))


def compile_model(model: GPT, compile: Callable[[Callable], Callable], *, in_parts: bool) -> nn.Module:
    """`model` compiled by `compile`: as one graph, or in parts, which changes `model` itself until `uncompile`.

    In parts is for CUDA and for sharded models, whose parameters are gathered between blocks.

    Parts are the blocks and, if operations are plain torch's, what surrounds them. Blocks are equal, so Dynamo compiles
    the first one, which has no branch to add yet, and one other, whatever the depth. As one graph, 12 layers take the
    processor four times as long. But calling a compiled block costs the host about half a millisecond. On CUDA graphs
    hide that, on a CPU nothing does.
    """
    if not in_parts:
        return compile(model)
    modules = list(model.transformer.h)
    if model.ops.name == "reference":  # of the fused operations each one is a part by itself
        modules.append(model.transformer.ln_f)
        names = "embedding", "linear_cross_entropy"
        model.ops = replace(model.ops, **{name: compile(getattr(model.ops, name)) for name in names})
    for module in modules:
        module.forward = compile(module.forward)
    return model


def uncompile(model: GPT) -> None:
    """Undo what `compile_model` changed in `model`."""
    for module in (*model.transformer.h, model.transformer.ln_f):
        vars(module).pop("forward", None)
    model.ops = model.transformer.ln_f.ops  # all modules were built with the same bundle


def model_to_train(
    model: GPT, config: TrainConfig, device: torch.device, say: Callable[[str], None], *, sharded: bool = False
) -> nn.Module:
    """`model` as the step runs it: compiled if the settings ask for it and it is possible.

    torch.compile works at the first call. That call is made here, on zeros, as a step and as an evaluation make it. If
    it fails, the run goes on without. It leaves gradients, which the caller clears, but no loss: no loss may be alive
    when graphs are captured (see `GraphedStep`). A run that only evaluates is too short to gain from compiling.
    """
    if not config.compile or config.eval_only:
        return model
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # here: importing Inductor takes two seconds

    say("compiling the model... (takes a ~minute)")
    begin = time.perf_counter()
    compile = partial(compile_module, device=device, profiled=config.profile)
    shape = config.batch_size, config.block_size
    try:
        compiled = compile_model(model, compile, in_parts=sharded or device.type == "cuda")
        # two tensors: with one in both places, the compiled code would serve only that case
        idx, targets = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        dloss = torch.ones((), device=device)
        compiled(idx, targets, dloss=dloss)[1].backward(dloss)
        with torch.no_grad():
            compiled.eval()(idx, targets)
        synchronize(device)
        say(f"compiled in {time.perf_counter() - begin:.1f} s, kept for the next run in {cache_dir()}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any type: from Dynamo, Inductor, Triton, a driver, a missing C++ compiler
        say(f"compile: not possible on this machine, going on without it: {first_line(error)}")
        uncompile(model)
        compiled = model
    return compiled.train()
