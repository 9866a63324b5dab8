"""Other weights in the live model for a while, and its own ones back, bit for bit: `WeightExchange`, `kept_weights`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import (
    first_names,
    fitting_weights,
    require_one_reading,
    require_weights,
    with_tied,
)
from lit_cka.checkpoints.weight_sets import strip_wrappers
from lit_cka.features.layers import named_layers
from lit_cka.features.sharded_modules import is_in_partitions
from lit_cka.reference.feature_store import MappedFile
from lit_cka.reference.places import places_of, state_of


class WeightExchange:
    """Copies weights into a module's own tensors, and copies back what was there.

    The tensors stay the same objects, so that optimizers, wrappers and shards notice nothing. Of a sharded tensor each
    rank exchanges its shard.

    Args:
        module: the live model.
        weights: by the names of `places_of(module)`: whole tensors, or this rank's shards.

    Raises:
        ValueError: if the module has no place for one of them.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        if is_in_partitions(module):
            raise ValueError(
                "Expected weights that can be exchanged for the reference's, but got a model in DeepSpeed's "
                "partitions. Track all data from the start of the training, as dataloaders of the validation, with "
                'reference="initial".'
            )
        unknown = weights.keys() - places_of(module).keys()
        if unknown:
            raise ValueError(
                f"The weights to compare with have {sorted(unknown)[:3]}, which {type(module).__name__} has not: its "
                "architecture has changed since."
            )
        self._module = module
        self._weights = weights
        self._before: dict[str, Tensor] = {}

    @property
    def is_in_place(self) -> bool:
        """Whether the module has the other weights now."""
        return bool(self._before)

    def put_in(self) -> None:
        """Give the module the other weights, if it has not got them."""
        if not self._before:
            places = places_of(self._module)
            self._before = {name: places[name].local.to("cpu", copy=True) for name in self._weights}
            self._copy(self._weights)

    def put_back(self) -> None:
        """Give the module its own weights back, if it has the others."""
        if self._before:
            self._copy(self._before)
            self._before = {}

    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        places = places_of(self._module)
        with torch.no_grad():
            for name, value in weights.items():
                places[name].local.copy_(places[name].shard_of(value))


def kept_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers as they are now, in a file without a name rather than in memory.

    Of sharded tensors, each rank keeps its shard. Where no file can be written, the copy is in memory, with a warning.
    """
    tensors = {name: place.local for name, place in places_of(module).items()}
    try:
        file = MappedFile(Path(tempfile.gettempdir()))
        # Copies, since memory that NumPy has looked at can't be resized any more, which FSDP does.
        return {name: file.place(tensor.to("cpu", copy=True)) for name, tensor in tensors.items()}
    except OSError as error:
        rank_zero_warn(f"The initial weights could not be put into a temporary file ({error}): they stay in memory.")
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def weights_for(module: nn.Module, weights: Mapping[str, Tensor], layer_names: list[str]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the module's names, for an exchange.

    The weights may be those of a submodule around the layers. All that the layers need have to be there, but for those
    registered after the last layer, such as another head's. Of tied weights one name is enough.

    Args:
        module: the live model.
        weights: by name, as a file has them.
        layer_names: the layers that are compared, as in `module.named_modules()`.

    Raises:
        ValueError: if they are of another architecture; the message names what is missing.
    """
    weights = strip_wrappers(weights)
    if not weights:
        raise ValueError("Expected the reference's weights to be a state dict, but got an empty one.")
    modules = {"": module, **named_layers(module)}
    fits = {}
    for prefix in common_parents(layer_names):
        fits[prefix] = fitting_weights(strip_wrappers(state_of(modules[prefix])), weights)
    prefix = max(fits, key=lambda prefix: len(fits[prefix]))
    expected = strip_wrappers(state_of(modules[prefix]))
    tensors = {name: id(place.tensor) for name, place in expected.items()}
    require_one_reading(expected, weights)
    fitting = with_tied(fits[prefix], first_names(tensors))
    layers = tuple(f"{below(prefix, name)}." for name in layer_names)
    last = max((i for i, name in enumerate(expected) if name.startswith(layers)), default=len(expected) - 1)
    require_weights(list(expected)[: last + 1], expected, fitting)
    # A wrapper's names: those that the module's tensors have where they stand.
    names = {id(place.tensor): name for name, place in places_of(module).items()}
    return {names[tensors[name]]: value for name, value in fitting.items() if tensors[name] in names}


def common_parents(layer_names: list[str]) -> list[str]:
    """Return the names of the modules that hold all of the layers, from the root ("") on."""
    parents = [name.split(".")[:-1] for name in layer_names]
    common: list[str] = []
    for segments in zip(*parents, strict=False):
        if len(set(segments)) > 1:
            break
        common.append(segments[0])
    return [".".join(common[:length]) for length in range(len(common) + 1)]


def below(prefix: str, name: str) -> str:
    """Return what a module of this name is called within the module `prefix`."""
    return name[len(prefix) + 1 :] if prefix else name
