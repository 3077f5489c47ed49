"""What a computation does with memory: the tensors that it makes, which are still there, the most ever allocated."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCALAR = 16  # bytes: losses, divisors and seeds are no larger


class Made(TorchDispatchMode):
    """Knows the operations done in its context, by name, and the storage of every tensor that they made."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ops: list[str] = []
        self.written: list[str] = []  # of the operations, those whose results lie in memory of their own

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x.untyped_storage() for x in tree_leaves(results) if isinstance(x, Tensor)]
        made = [storage for storage in made if storage._cdata not in given]
        self.ops.append(func.name())
        if made:
            self.written.append(func.overloadpacket.__name__)
        for storage in made:
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def held(self) -> int:
        """Bytes of those that are still there, scalars aside."""
        return sum(size for storage, size in self._storages.values() if size > SCALAR and not storage.expired())


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
