"""What an operation refuses."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor


def assert_refused(
    function: Callable[..., Any], arguments: Mapping[str, Any], message: str, device: torch.device
) -> None:
    """ValueError with the message, of tensors on the device; those on the meta device stay there."""

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) and x.device.type != "meta" else x

    with pytest.raises(ValueError, match=message):
        function(**{name: moved(x) for name, x in arguments.items()})
