"""Other weights in the live model for a while, and its own ones back, bit for bit: `WeightExchange`, `kept_weights`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import (
    first_names,
    fitting_weights,
    require_one_reading,
    require_weights,
    with_tied,
)
from lit_cka.checkpoints.weight_sets import strip_wrappers
from lit_cka.features.flat_parameters import has_nameless_parameters, why_parts_are_closed
from lit_cka.features.layers import named_layers
from lit_cka.features.sharded_modules import is_sharded, outermost
from lit_cka.parallel.warning import warn
from lit_cka.reference.feature_store import MappedFile
from lit_cka.reference.places import layout_of, places_of, state_of


@dataclass(frozen=True)
class Weights:
    """Weights by the names of `places_of`.

    Attributes:
        tensors: whole ones, or what one process has of each.
        layout: the `layout_of` the module that they are shards of; None of whole tensors.
    """

    tensors: Mapping[str, Tensor]
    layout: str | None = None


class WeightExchange:
    """Copies weights into a module's own tensors, and copies back what was there.

    The tensors stay the same objects, so that optimizers, wrappers and shards notice nothing. Of a sharded tensor each
    rank exchanges its shard.

    Args:
        module: the live model.
        weights: whole, or this rank's shards.

    Raises:
        ValueError: if the module has no place for one of them.
    """

    def __init__(self, module: nn.Module, weights: Weights) -> None:
        closed = why_parts_are_closed(module)
        if closed is not None:
            raise ValueError(
                f"Expected weights that can be exchanged for the reference's, but {closed}. Track all data from the "
                'start of the training, as dataloaders of the validation, with reference="initial".'
            )
        places = places_of(module)
        unknown = weights.tensors.keys() - places.keys()
        if unknown:
            raise ValueError(
                f"The weights to compare with have {sorted(unknown)[:3]}, which {type(module).__name__} has not: its "
                "architecture has changed since."
            )
        if weights.layout not in (None, layout_of(places)):
            raise ValueError(
                f"The weights to compare with are one process's shards, and {type(module).__name__} is sharded in "
                "another way now. Compare in a run of as many processes and the same strategy, or pass the weights as "
                "`reference=`, a state dict or the path of a checkpoint."
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
            self._before = {name: places[name].local.to("cpu", copy=True) for name in self._weights.tensors}
            self._copy(self._weights.tensors, are_whole=self._weights.layout is None)

    def put_back(self) -> None:
        """Give the module its own weights back, if it has the others."""
        if self._before:
            self._copy(self._before, are_whole=False)
            self._before = {}

    def _copy(self, weights: Mapping[str, Tensor], *, are_whole: bool) -> None:
        places = places_of(self._module)
        with torch.no_grad():
            for name, value in weights.items():
                target = places[name].local
                shard = places[name].shard_of(value) if are_whole else value
                target.copy_(shard.reshape(target.shape))  # an error of torch's, if it is of another size


def kept_weights(module: nn.Module) -> Weights:
    """Return a copy of all parameters and buffers as they are now, in a file without a name rather than in memory.

    Of sharded tensors, each rank keeps its shard. Where no file can be written, the copy is in memory, with a warning.
    """
    places = places_of(module)
    copies = _put_aside((name, place.local) for name, place in places.items())
    return Weights(copies, layout_of(places) if is_sharded(module) else None)


def own_shards(module: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """Return a copy of what this process needs of whole weights, kept like that of `kept_weights`.

    Args:
        module: the live model.
        weights: by the names of `places_of(module)`.
    """
    places = places_of(module)
    copies = _put_aside((name, places[name].shard_of(value)) for name, value in weights.items())
    return Weights(copies, layout_of(places) if is_sharded(module) else None)


def _put_aside(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    file: MappedFile | None = None
    try:
        file = MappedFile(Path(tempfile.gettempdir()))
    except OSError as error:
        _warn_no_file(error)
    for name, tensor in tensors:
        # A copy, since memory that NumPy has looked at can't be resized any more, which FSDP does.
        kept[name] = tensor.detach().to("cpu", copy=True)
        try:
            kept[name] = kept[name] if file is None else file.place(kept[name])
        except OSError as error:
            _warn_no_file(error)
            file = None
    return kept


def _warn_no_file(error: OSError) -> None:
    warn(f"Weights to compare with could not be put into a temporary file ({error}): they stay in memory.")


def weights_for(module: nn.Module, weights: Mapping[str, Tensor], layer_names: list[str]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the module's names, whole.

    The weights may be those of a submodule around the layers. All that the layers need have to be there, but for those
    registered after the last layer, such as another head's. Of tied weights one name is enough.

    Args:
        module: the live model.
        weights: by name, as a file has them.
        layer_names: the layers that are compared, as in `module.named_modules()`.

    Raises:
        ValueError: if they are of another architecture, the message names what is missing, or what is tied in the
            module alone; or if FSDP has put the module's parameters where they have no names.
    """
    if has_nameless_parameters(outermost(module)):
        raise ValueError(
            "Expected FSDP to leave the model's parameters their names, so that the reference's weights can take their "
            "places: FSDPStrategy(use_orig_params=True), which is its default."
        )
    weights = strip_wrappers(weights)
    if not weights:
        raise ValueError("Expected the reference's weights to be a state dict, but got an empty one.")
    modules = {"": module, **named_layers(module)}
    fits = {}
    for prefix in common_parents(layer_names):
        fits[prefix] = fitting_weights(strip_wrappers(state_of(modules[prefix], module)), weights)
    prefix = max(fits, key=lambda prefix: len(fits[prefix]))
    expected = strip_wrappers(state_of(modules[prefix], module))
    tensors = {name: id(place.tensor) for name, place in expected.items()}
    require_one_reading(expected, weights)
    fitting = with_tied(fits[prefix], first_names(tensors))
    layers = tuple(f"{below(prefix, name)}." for name in layer_names)
    last = max((i for i, name in enumerate(expected) if name.startswith(layers)), default=len(expected) - 1)
    require_weights(list(expected)[: last + 1], expected, fitting)
    # A wrapper's names: those that the module's tensors have where they stand.
    names = {id(place.tensor): name for name, place in places_of(module).items()}
    found: dict[str, Tensor] = {}
    for name, value in fitting.items():
        target = names.get(tensors[name])
        if target is None:
            continue
        first = found.setdefault(target, value)
        if first is not value and not torch.equal(first, value):
            raise ValueError(
                f"{name!r} is one tensor with {target!r} in {type(module).__name__}, but they differ in the weights to "
                "compare with, which are of another architecture. Pass a module with these weights as `reference=`."
            )
    return found


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
