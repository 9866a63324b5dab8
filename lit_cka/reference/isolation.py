"""What keeps the reference and the training apart: random states, and a guard against shared weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cka.features.nested import tensors_in
from lit_cka.features.shared_mode import SharedMode
from lit_cka.reference.places import Mark
from lit_cka.samples.hashing import content_hash


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
    """Notes, while active, from which weights and buffers of a model tensors are computed: for one step, by storage."""

    def __init__(self, live: nn.Module) -> None:
        self.trained = {name for name, tensor in live.named_parameters() if tensor.requires_grad}
        self._origins = {address(tensor): frozenset([name]) for name, tensor in tensors_of(live).items()}
        self.paused = False  # a mode can't be left within a call that began under it, and may end by an exception
        # So that no storage is freed and used again for another tensor. What comes from frozen weights alone, which may
        # be all of a large network, is not kept.
        self._kept: list[Tensor] = []

    def watch(self, active: bool) -> None:
        """Start noting what torch's operations compute, or stop."""
        (_WATCH.hold if active else _WATCH.release)(self)

    def origins(self, value: Any) -> frozenset[str]:
        """Names of the weights and buffers that tensors in `value` are, or are computed from."""
        found = [self._origins.get(address(tensor)) for tensor in plain_tensors_in(value)]
        return frozenset().union(*(names for names in found if names is not None))

    def trained_origin(self, value: Any) -> str | None:
        """Name of a trained weight that some tensor in `value` is, or is computed from; None if there is none."""
        return min(self.origins(value) & self.trained, default=None)

    def note(self, value: Any, origins: frozenset[str]) -> None:
        """Note the tensors in `value` as computed from these."""
        for tensor in plain_tensors_in(value):
            if origins & self.trained:
                self._kept.append(tensor)
            if origins:
                self._origins[address(tensor)] = self._origins.get(address(tensor), frozenset()) | origins
            else:  # if it is where another one was, that is gone
                self._origins.pop(address(tensor), None)


class _Watch(TorchDispatchMode):
    """Tells all that watch what torch's operations compute."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for taint in _WATCH.holders:
            if not taint.paused:
                taint.note(output, taint.origins((args, kwargs or {})))
        return output


class WeightsThatFeed:
    """Frozen weights and buffers that a model's inputs are computed from, to see later whether they are the same.

    Args:
        live: the model that has them.
        names: theirs.
    """

    def __init__(self, live: nn.Module, names: frozenset[str]) -> None:
        self._live = live
        self._names = names
        self._marks = self._marked()
        self._contents = {name: content_hash(tensor.detach()) for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors_of(self._live).items() if name in self._names}

    def _marked(self) -> dict[str, Mark]:
        return {name: Mark(tensor) for name, tensor in self._tensors().items()}

    def moved(self) -> str | None:
        """Name of one that has changed since; None if all are what they were."""
        parameters = dict(self._live.named_parameters())
        for name, tensor in self._tensors().items():
            mark = Mark(tensor)
            # Batch normalisation does not say that it writes to its running statistics.
            if mark != self._marks.get(name) or name not in parameters:
                if self._contents.get(name) is None or content_hash(tensor.detach()) != self._contents[name]:
                    return name
                self._marks[name] = mark
        return None


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
