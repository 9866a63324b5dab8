"""What a model in training is compared with: what kinds of reference there are, and which of them can be recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias, Union

from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import load_state_dict
from lit_cka.features.layers import named_layers
from lit_cka.features.pooling import Pooling
from lit_cka.features.sharded_modules import is_of_sharding, named_without_wrappers, original_class
from lit_cka.reference.adapters import check_adapters
from lit_cka.reference.exchange import Weights, below, common_parents, own_shards, weights_for
from lit_cka.reference.places import places_of
from lit_cka.reference.running import RunningReference
from lit_cka.reference.snapshot import snapshot

ReferenceLike: TypeAlias = Union[str, "os.PathLike[str]", nn.Module, Mapping[str, Tensor]]
INITIAL = "initial"
ADAPTER_OFF = "adapter-off"
PREVIOUS, BEST = "previous", "best"  # evaluations, whose features take the place of the initial model's


@dataclass(frozen=True)
class LiveReference:
    """The live model itself, recorded before it is trained: as it is, with other weights, or without its adapters."""

    weights: Weights | None = None  # to put in for the recording
    adapters_off: bool = False


def make_reference(
    live: nn.Module, spec: ReferenceLike, layer_names: list[str], pooling: Pooling
) -> LiveReference | RunningReference:
    """Return the frozen reference of `live`.

    Args:
        live: the model in training, whose layers are `layer_names`.
        spec: "initial" for the weights as they are at the recording, and so "previous" and "best"; "adapter-off" for a
            PEFT model itself, its adapters switched off; a module, which has the layers under the same names, or under
            those they have in a submodule of `live`; the path of a checkpoint, see
            `lit_cka.checkpoints.load_state_dict`; or a state dict.
        layer_names: the layers to compare, as in `live.named_modules()`.
        pooling: as for `FeatureExtractor`.

    Raises:
        ValueError: if the reference does not have the layers, or a module can't be copied.
        FileNotFoundError: if there is no file at the path.
    """
    if isinstance(spec, nn.Module):
        return _from_module(live, spec, layer_names, pooling)
    if isinstance(spec, Mapping):
        return LiveReference(own_shards(live, weights_for(live, spec, layer_names)))
    if spec == ADAPTER_OFF:
        check_adapters(live, layer_names)
        return LiveReference(adapters_off=True)
    if spec in (INITIAL, PREVIOUS, BEST):
        return LiveReference()
    near = get_close_matches(str(spec), (INITIAL, ADAPTER_OFF, PREVIOUS, BEST), 1)
    if near and not os.path.exists(spec):
        raise FileNotFoundError(
            f"Expected `reference` to be one of its names, or the path of a checkpoint, but there is no file {spec!r}: "
            f"did you mean {near[0]!r}?"
        )
    return LiveReference(own_shards(live, weights_for(live, load_state_dict(spec), layer_names)))


def running_copy(live: nn.Module, layer_names: list[str], pooling: Pooling) -> RunningReference:
    """Return a copy of the live model as it is now, to run beside it, where the data differ at every pass."""
    return RunningReference(live, snapshot(live), None, layer_names, pooling)


def _from_module(
    live: nn.Module, module: nn.Module, layer_names: list[str], pooling: Pooling
) -> LiveReference | RunningReference:
    modules, layers = {"": live, **named_layers(live)}, named_layers(module)
    for prefix in common_parents(layer_names):
        if not all(below(prefix, name) in layers for name in layer_names):
            continue
        if _differs_in_weights_alone(modules[prefix], module, live):
            names = {id(place.tensor): name for name, place in places_of(live).items()}
            mine, theirs = places_of(modules[prefix], live), places_of(module)
            weights = {names[id(mine[name].tensor)]: place.local for name, place in theirs.items()}
            return LiveReference(own_shards(live, weights))
        return RunningReference(live, snapshot(module), prefix or None, layer_names, pooling)
    raise ValueError(
        f"The reference {type(module).__name__} has another architecture: expected it to have the layers "
        f"{layer_names[:3]}{' ...' if len(layer_names) > 3 else ''}, or those of a submodule, but it has "
        f"{list(layers)[:6]} ..."
    )


def _differs_in_weights_alone(live: nn.Module, module: nn.Module, root: nn.Module) -> bool:
    """Whether two modules are built alike: the same classes, settings, and shapes of tensors throughout.

    Args:
        live: the live model, or a part of it.
        module: the reference.
        root: the live model.
    """
    modules = named_without_wrappers(live), named_without_wrappers(module)
    if modules[0].keys() != modules[1].keys():
        return False
    pairs = zip(*(each.values() for each in modules), strict=True)
    same = all(original_class(one) is original_class(two) and _settings(one) == _settings(two) for one, two in pairs)
    shapes = [
        {name: place.shape for name, place in each.items()} for each in (places_of(live, root), places_of(module))
    ]
    return same and shapes[0] == shapes[1]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what a forward may depend on besides tensors and submodules, as far as it can be compared."""
    plain = (str, bytes, int, float, bool, type(None))
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    settings: dict[str, Any] = {"hooks": sum(not is_of_sharding(hook) for hook in hooks)}
    for name, value in vars(module).items():
        if name.startswith("ds_") or is_of_sharding(value):  # DeepSpeed's
            continue
        is_plain = isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(x, plain) for x in value))
        if name != "training" and name[0] != "_" and (is_plain or callable(value)):
            settings[name] = value
    return settings


def starts_from_initial(spec: ReferenceLike) -> bool:
    """Whether the reference is what the training begins with, to begin with."""
    return isinstance(spec, str) and spec in (INITIAL, PREVIOUS, BEST)


def moves(spec: ReferenceLike) -> bool:
    """Whether the reference is that of an earlier evaluation, and so another one from time to time."""
    return isinstance(spec, str) and spec in (PREVIOUS, BEST)
