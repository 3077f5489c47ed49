"""What a computation does with memory: which operations make tensors, and the most that was ever allocated."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Knows the operations done in its context, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.written: list[str] = []  # of these, those whose results lie in memory of their own

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given, made = (
            {x.untyped_storage()._cdata for x in tree_leaves(tree) if isinstance(x, Tensor)}
            for tree in ((args, kwargs), results)
        )
        self.ops.append(func.name())
        if made - given:
            self.written.append(func.overloadpacket.__name__)
        return results


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that a CPU's allocator had given out while it worked, beyond what it had before."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        torch.zeros(1)  # the first event tells what there was before
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [change["args"]["Total Allocated"] for change in changes]
    return max(totals) - (totals[0] - changes[0]["args"]["Bytes"])
