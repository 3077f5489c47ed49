"""Every op as torch.library wants it: what its schema says of its arguments, and its fake of its results."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels import FUSED, cpu
from kernels.cases import CASES
from kernels.check import outputs_and_gradients
from kernels.launch import INTERPRETED
from model import GPTConfig
from train import dryrun

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nanofuse"))
SCHEMA, GRADIENTS = ("test_schema", "test_faketensor"), ("test_autograd_registration", "test_aot_dispatch_dynamic")


class Calls(TorchDispatchMode):
    """Of each of our operations, the arguments of one call of each kind: what is None, empty, true."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, dict[tuple, tuple]] = {name: {} for name in OPS}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.name() in self.made:
            self.made[func.name()].setdefault(tuple(map(kind, tree_leaves((args, kwargs)))), (func, args, kwargs))
        return func(*args, **kwargs)


def kind(x: Any) -> Any:
    return x.numel() > 0 if isinstance(x, Tensor) else x if isinstance(x, bool) else x is None


@cache
def calls() -> dict[str, dict[tuple, tuple]]:
    """Made by the registry's cases; by a step, whose gradients are put in place; and by a CPU's operations."""
    shape = GPTConfig(block_size=4, vocab_size=37, n_layer=1, n_head=1, n_embd=16, dropout=0.1)
    step = dryrun.build(dryrun.Job(shape, 2, FUSED, on=DEVICE.type))
    x, y = torch.randint(37, (2, 2, 4), device=DEVICE)
    with Calls() as seen:
        for case in CASES:
            inputs = case.make_inputs(case.shapes[0], case.dtypes[-1], DEVICE)
            for more in case.compiled_with:
                outputs_and_gradients(case.fused, inputs | more)
        step.micro_step(x, y)
        step.update()
        packed, table = torch.randn(2, 5, 3, 2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        (cpu.attention(packed, 0.3) + cpu.attention(packed, 0.0)).sum().backward()
        cpu.embedding(torch.ones(2, 5, dtype=torch.int64), table).sum().backward()
        cpu.gelu(table, "tanh").sum().backward()
    return seen.made


@pytest.mark.parametrize("name", OPS)
def test_registered_as_torch_wants_it(name: str) -> None:
    """Of an op with an autograd rule the first call also for its gradient and for shapes that are not known."""
    assert calls()[name], "no call was seen"
    checks = SCHEMA + GRADIENTS if name in OPDEFS and OPDEFS[name]._backward_fn else SCHEMA
    for op, *arguments in calls()[name].values():
        if checks == SCHEMA:
            arguments = tree_map_only(Tensor, Tensor.detach, arguments)
        torch.library.opcheck(op, *arguments, test_utils=checks)
        checks = SCHEMA
