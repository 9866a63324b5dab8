"""What keeps the reference and the training apart: random states, and a guard against shared weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cka.features import tensors_in


class FollowsLiveWeightsError(ValueError):
    """The reference reads weights of the model in training."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The reference follows the live weights: running it used {name!r} of the model in training, so every CKA "
            "would be 1. Something in the model (a patched `forward`, a closure) holds on to the original. Pass "
            "`reference=` a freshly built module or the path of a checkpoint."
        )


class LiveWeightGuard(TorchDispatchMode):
    """Raises when any operation reads a tensor of the live model."""

    def __init__(self, live: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors_of(live).items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            name = self._names.get(tensor.untyped_storage().data_ptr())
            if name is not None:
                raise FollowsLiveWeightsError(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the random states of Python, NumPy, and torch (CPU and current GPU) as they were."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers that hold data, by name."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.numel() and tensor.device.type != "meta"}
