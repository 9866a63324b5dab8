"""Where a module's parameters and buffers are, by plain names: as a whole, or this process's shards: `Place`."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_cka.features.flat_parameters import FlatPart, flat_parts
from lit_cka.features.sharded_modules import free_gathered_weights, outermost, plain_name


@dataclass(frozen=True)
class Place:
    """A parameter or buffer of a module.

    Attributes:
        tensor: the module's own object, a `DTensor` if FSDP2 or tensor parallelism has sharded it.
        part: what is here of a parameter that FSDP or ZeRO-3 has flattened; None of any other.
    """

    tensor: Tensor
    part: FlatPart | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the whole, on all processes together."""
        return self.tensor.shape if self.part is None else self.part.shape

    @property
    def local(self) -> Tensor:
        """What is here; to write into it is to write into the module."""
        if self.part is not None:
            return self.part.held
        return self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor.detach()

    @property
    def layout(self) -> str:
        """Which part of the whole is here, in words that are the same for the same part alone."""
        if self.part is not None and len(self.part.held) < self.shape.numel():
            return f"{tuple(self.shape)} from {self.part.start}, {len(self.part.held)}"
        if isinstance(self.tensor, DTensor):
            mesh = self.tensor.device_mesh
            return f"{tuple(self.shape)} {self.tensor.placements} {mesh.get_coordinate()} of {tuple(mesh.shape)}"
        return f"{tuple(self.shape)}"

    def shard_of(self, whole: Tensor) -> Tensor:
        """Return this process's part of a whole tensor; all of it, if the module's is not sharded."""
        if self.part is not None:
            return self.part.of(whole)
        if not isinstance(self.tensor, DTensor):
            return whole
        mesh, placements = self.tensor.device_mesh, self.tensor.placements
        return distribute_tensor(whole.detach().to(self.local.device), mesh, placements, src_data_rank=None).to_local()


def places_of(module: nn.Module, root: nn.Module | None = None) -> dict[str, Place]:
    """Return the places of all parameters and buffers that hold data, by the names that they have without wrappers.

    Whatever has been gathered for a forward is freed before, so that every process has its shards.

    Args:
        module: whose.
        root: the module that the strategy runs, if `module` is a part of it.
    """
    root = module if root is None else root
    free_gathered_weights(root)
    parts = flat_parts(outermost(root))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        plain_name(name): Place(tensor, parts.get(id(tensor)))
        for name, tensor in tensors.items()
        if tensor.device.type != "meta" and (tensor.numel() or id(tensor) in parts)
    }


def state_of(module: nn.Module, root: nn.Module | None = None) -> dict[str, Place]:
    """Return the places of all tensors of a state dict, in its order; those of tied weights under each name.

    Args:
        module: whose.
        root: as for `places_of`.
    """
    root = module if root is None else root
    free_gathered_weights(root)
    parts = flat_parts(outermost(root))
    if not parts:
        return {plain_name(name): Place(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    # FSDP would gather all of it.
    places = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, tensor in {**child._parameters, **child._buffers}.items():
            if tensor is not None and name not in child._non_persistent_buffers_set:
                places[plain_name(f"{prefix}.{name}" if prefix else name)] = Place(tensor, parts.get(id(tensor)))
    return places


def marks_of(module: nn.Module) -> dict[str, Mark]:
    """Return the marks of a module's tensors by name."""
    return {name: Mark(place.tensor) for name, place in places_of(module).items()}


class Mark:
    """Which memory a tensor's values are in, and how often they were written to.

    As long as that is the same, nobody has changed them. It costs nothing; but where it differs, they may be equal.
    An address alone would not tell: `module.half().float()` may get the same one again.
    """

    def __init__(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self._storage: Callable[[], Any] = lambda: None
            self._where = (0, 0)
            return
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        try:
            self._storage = weakref.ref(local.untyped_storage())
        except RuntimeError:  # a wrapper around others, without a storage
            self._storage = weakref.ref(local)
        self._where = local.data_ptr(), -1 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mark):
            return NotImplemented
        storage = self._storage()
        return storage is not None and storage is other._storage() and self._where == other._where

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: Any) -> Mark:
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # in another process nothing is the same
        return Mark, (None,)


def layout_of(places: Mapping[str, Place]) -> str:
    """Return a hash of how tensors are shared out, and which shards this process has."""
    lines = [f"{name} {place.layout}" for name, place in sorted(places.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
