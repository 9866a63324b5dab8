"""What keeps the reference and the training apart: random states, and a guard against shared weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cka.features.extractor import tensors_in
from lit_cka.features.shared_mode import SharedMode


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
        self._names = {address(tensor): name for name, tensor in tensors_of(live).items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in plain_tensors_in((args, kwargs or {})):
            name = self._names.get(address(tensor))
            if name is not None:
                raise FollowsLiveWeightsError(name)
        return func(*args, **(kwargs or {}))


class WeightTaint:
    """Notes, while active, which tensors are computed from trained weights of a model: for one step, by storage."""

    def __init__(self, live: nn.Module) -> None:
        trained = (
            (name, tensor) for name, tensor in live.named_parameters() if tensor.requires_grad and tensor.numel()
        )
        self._origins = {address(tensor): name for name, tensor in trained}
        self.paused = False  # a mode can't be left within a call that began under it, and may end by an exception
        self._kept: list[Tensor] = []  # so that no storage is freed and used again for another tensor

    def watch(self, active: bool) -> None:
        """Start noting what torch's operations compute, or stop."""
        (_WATCH.hold if active else _WATCH.release)(self)

    def origin(self, value: Any) -> str | None:
        """Name of a trained weight that some tensor in `value` is, or is computed from; None if there is none."""
        names = (self._origins.get(address(tensor)) for tensor in plain_tensors_in(value))
        return next((name for name in names if name is not None), None)

    def note(self, value: Any, origin: str) -> None:
        """Note the tensors in `value` as computed from the weight `origin`."""
        for tensor in plain_tensors_in(value):
            self._kept.append(tensor)
            self._origins.setdefault(address(tensor), origin)


class _Watch(TorchDispatchMode):
    """Tells all that watch what torch's operations compute."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for taint in _WATCH.holders:
            if taint.paused:
                continue
            origin = taint.origin((args, kwargs or {}))
            if origin is not None:
                taint.note(output, origin)
        return output


_WATCH: SharedMode[WeightTaint] = SharedMode(lambda: _Watch())  # type: ignore[no-untyped-call]


def plain_tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that have a storage of their own: not nested, sparse or empty ones."""
    for tensor in tensors_in(value):
        if tensor.layout is torch.strided and not tensor.is_nested and tensor.device.type != "meta" and tensor.numel():
            yield tensor


def address(tensor: Tensor) -> int:
    """Where the tensor's values are: the same for tensors that share them. Of a sharded one, those of this rank."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except RuntimeError:  # a wrapper around others, without a storage
        return id(tensor)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers that hold data, by name."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.numel() and tensor.device.type != "meta"}
