"""A dry run's recorder that also sees what no captured step may do."""

from contextvars import Context
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from train import dryrun

SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select"}


class Watching(dryrun.Recorder):
    """Records too what no captured step may do. faults: operations that make the host wait for the device, whose
    tensors lie on different devices, or whose fake disagrees with their body."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.faults: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code runs unchanged

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        if tensors and kwargs and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if func.namespace != "prim" and (func.overloadpacket.__name__ in SYNCS or len(devices) > 1):
            self.faults.append(f"{self.label} {func}: {[(tuple(x.shape), str(x.device)) for x in tensors]}")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _fused(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        unrecorded = Context()  # as torch.compile asks for shapes
        fakes = [layout(x) for x in tree_leaves(unrecorded.run(func, *args, **kwargs))]
        result = super()._fused(func, args, kwargs)
        if fakes != [layout(x) for x in tree_leaves(result)]:
            self.faults.append(f"{func}: fake {fakes}, body {tree_leaves(result)}")
        return result


def layout(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else None
