"""The frozen reference: what kinds there are, and how it runs on the very inputs that the live model gets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain, takewhile
from typing import Any, TypeAlias, Union

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lit_cka.checkpoints.state_dicts import fitting_weights, load_into, load_state_dict, require_weights, strip_wrappers
from lit_cka.features.extractor import FeatureExtractor, tensors_in
from lit_cka.features.layers import named_layers
from lit_cka.features.pooling import Pooling
from lit_cka.reference.adapters import adapters_off, check_adapters
from lit_cka.reference.cache import Batch, ReferenceCache
from lit_cka.reference.fingerprint import fingerprint
from lit_cka.reference.isolation import (
    FollowsLiveWeightsError,
    LiveWeightGuard,
    Provenance,
    address,
    preserved_rng,
    tensors_of,
)
from lit_cka.reference.snapshot import snapshot

ReferenceLike: TypeAlias = Union[str, "os.PathLike[str]", nn.Module, Mapping[str, Tensor]]
INITIAL = "initial"
ADAPTER_OFF = "adapter-off"


def make_reference(live: nn.Module, spec: ReferenceLike, layer_names: list[str], pooling: Pooling) -> Reference:
    """Build the frozen reference of `live`.

    Args:
        live: the model in training, whose layers are `layer_names`.
        spec: "initial" for a copy of the weights as they are now; "adapter-off" for a PEFT model itself, its adapters
            switched off; another module, which has the layers under the same
            names, or under those they have in a submodule of `live`; the path of a checkpoint, see
            `lit_cka.checkpoints.load_state_dict`; or a state dict.
        layer_names: the layers to compare, as in `live.named_modules()`.
        pooling: as for `FeatureExtractor`.

    Raises:
        ValueError: if the reference has another architecture, or `live` can't be copied.
        FileNotFoundError: if there is no file at the path.
    """
    if isinstance(spec, nn.Module):
        return _from_module(live, spec, layer_names, pooling)
    if isinstance(spec, Mapping):
        return _from_weights(live, strip_wrappers(spec), layer_names, pooling)
    if spec == ADAPTER_OFF:
        check_adapters(live, layer_names)
        return Reference(live, live, None, layer_names, pooling)
    if spec == INITIAL:
        return Reference(live, snapshot(live), None, layer_names, pooling)
    return _from_weights(live, load_state_dict(spec), layer_names, pooling)


def _prefixes(layer_names: list[str]) -> list[str]:
    """Names of the submodules that hold all of the layers, from the root on ("")."""
    parents = zip(*(name.split(".")[:-1] for name in layer_names), strict=False)
    common = [segments[0] for segments in takewhile(lambda segments: len(set(segments)) == 1, parents)]
    return [".".join(common[:length]) for length in range(len(common) + 1)]


def _below(prefix: str, name: str) -> str:
    return name[len(prefix) + 1 :] if prefix else name


def _from_module(live: nn.Module, module: nn.Module, layer_names: list[str], pooling: Pooling) -> Reference:
    modules = named_layers(module)
    addresses = set(map(address, tensors_of(live).values()))
    if any(address(tensor) in addresses for tensor in tensors_of(module).values()):
        module = snapshot(module)  # it is the live model, or shares weights with it
    for prefix in _prefixes(layer_names):
        if all(_below(prefix, name) in modules for name in layer_names):
            return Reference(live, module.eval(), prefix or None, layer_names, pooling)
    raise ValueError(
        f"The reference {type(module).__name__} has another architecture: expected it to have the layers "
        f"{layer_names[:3]}{' ...' if len(layer_names) > 3 else ''}, or those of a submodule, but it has "
        f"{list(modules)[:6]} ..."
    )


def _from_weights(live: nn.Module, weights: dict[str, Tensor], layer_names: list[str], pooling: Pooling) -> Reference:
    """A copy of `live`, or of the submodule that the weights fit best, with these weights."""
    if not weights:
        raise ValueError("Expected the reference's weights to be a state dict, but got an empty one.")
    modules = {"": live, **named_layers(live)}
    fits = {}
    for prefix in _prefixes(layer_names):
        fits[prefix] = fitting_weights(strip_wrappers(modules[prefix].state_dict()), weights)
    prefix = max(fits, key=lambda prefix: len(fits[prefix]))
    expected = strip_wrappers(modules[prefix].state_dict())
    # All weights have to be there, but for those registered after the last layer, such as another head's.
    layers = tuple(f"{_below(prefix, name)}." for name in layer_names)
    last = max((i for i, name in enumerate(expected) if name.startswith(layers)), default=len(expected) - 1)
    names = list(expected)
    require_weights(names[: last + 1], expected, fits[prefix])
    module = snapshot(modules[prefix])
    load_into(module, fits[prefix], optional=tuple(names[last + 1 :]))
    return Reference(live, module, prefix or None, layer_names, pooling)


class Reference:
    """A frozen model that runs on the inputs the live model is called with, just before the live model does.

    `on_call` and `on_return` are for `FeatureExtractor`: they report the calls of the modules around the layers. The
    reference runs at the outermost of these calls (or, with `prefix`, at that submodule's), so that it sees the raw
    inputs, in the same autocast context, whatever the batch's format and whatever the model does to it. It does not
    run where `cache` has the features of the same inputs. If `module` is the live model itself, it is run without its
    adapters.
    """

    def __init__(
        self, live: nn.Module, module: nn.Module, prefix: str | None, layer_names: list[str], pooling: Pooling
    ) -> None:
        self.module = module
        self._live = live
        self._prefix = prefix
        self._layer_names = layer_names
        self._pooling = pooling
        self._extractors: dict[str, FeatureExtractor] = {}
        self._guarded: set[str] = set()  # calls that were seen not to read live weights
        self._called: dict[str, nn.Module] = {}  # the live model's modules that are called, by name
        self._features: dict[str, Tensor] = {}
        self._problems: dict[str, str] = {}
        self._provenance: Provenance | None = None
        self._running = self._first = False
        self.cache: ReferenceCache | None = None
        self.replayed = False  # whether all features of this step came from the cache
        self._batch: Batch | None = None

    def of(self, live: nn.Module) -> Reference:
        """The same reference for another live model of the same architecture."""
        module = live if self.module is self._live else self.module
        other = Reference(live, module, self._prefix, self._layer_names, self._pooling)
        other.cache = self.cache
        return other

    def begin(self, batch: Batch | None, *, first: bool) -> None:
        """Prepare for the step on a batch; None for one that is not to be kept in the cache.

        In the first one, what goes wrong is raised, and what the inputs come from is checked.
        """
        self._features, self._problems = {}, {}
        self._batch = batch
        self.replayed = True
        self._first = first
        self._provenance = Provenance(self._live) if first and self._prefix is None else None
        self._watch_step(True)

    def end(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Finish the step: the features (n, d) by layer, and the layers that failed with the reasons."""
        self._watch_step(False)
        self._provenance = None
        return self._features, self._problems

    def close(self) -> None:
        """Remove all hooks from the reference; also after a step that failed."""
        self.end()
        for extractor in self._extractors.values():
            extractor.__exit__()
        self._extractors.clear()

    def _watch_step(self, active: bool) -> None:
        """Have noted what happens outside of the modules around the layers."""
        if self._provenance is not None:
            self._provenance.watch(active)

    def on_call(self, name: str, outermost: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run on the arguments of this call of the live model's module `name`, if it is the one to follow."""
        if self._running:
            raise FollowsLiveWeightsError(name or "the model")
        if outermost and self._provenance is not None:
            self._provenance.paused = True
        if name != self._prefix if self._prefix is not None else not outermost:
            return
        layer_names = [layer for layer in self._layer_names if not name or layer.startswith(f"{name}.")]
        origin = self._provenance.origin((args, kwargs)) if self._provenance is not None else None
        if origin is not None:
            self._problems.update(dict.fromkeys(layer_names, _FED.format(name or "the module", origin)))
            return
        try:
            self._replay_or_run(name, layer_names, args, kwargs)
        except FollowsLiveWeightsError:
            raise
        except Exception as error:
            message = (
                f"The reference failed on the inputs of {name or 'the module'!r} ({type(error).__name__}: {error})."
            )
            if self._first:
                raise RuntimeError(message) from error
            self._problems.update(dict.fromkeys(layer_names, message))

    def on_return(self, name: str, outermost: bool, output: Any) -> None:
        """Note what the live model's module `name` returned, and have the rest of the step watched."""
        if outermost and self._provenance is not None:
            weights = {"": self._live, **named_layers(self._live)}[name].named_parameters()
            trained = next((weight for weight, parameter in weights if parameter.requires_grad), None)
            if trained is not None:
                self._provenance.note(list(tensors_in(output)), f"{name}.{trained}" if name else trained)
            self._provenance.paused = False

    def _replay_or_run(self, name: str, layer_names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.cache is None or self._batch is None or not self.cache.max_bytes:
            self.replayed = False
            self._run(name, layer_names, args, kwargs)
            return
        device = self._device(name)
        mark = fingerprint((args, kwargs))
        mark = None if mark is None else (mark, _autocast(device))
        features = self.cache.find(self._batch, name, mark, device)
        if features is not None:
            self._features.update(features)
            return
        self.replayed = False
        self._run(name, layer_names, args, kwargs)
        if not self._problems:
            self.cache.keep(
                self._batch,
                name,
                mark,
                {layer: self._features[layer] for layer in layer_names if layer in self._features},
            )

    def _run(self, name: str, layer_names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in self._extractors:
            self._extractors[name] = self._start(name, layer_names)
        extractor = self._extractors[name]
        # The model may change its inputs in place: the reference gets its own.
        args, kwargs = apply_to_collection((args, kwargs), Tensor, torch.clone)
        self._running = extractor.enabled = True
        try:
            with torch.no_grad(), preserved_rng() as draws, self._frozen(name):
                extractor.model(*args, **kwargs)
        finally:
            self._running = extractor.enabled = False
            features, problems = extractor.drain(require_all=False)
        if draws.any and self.cache is not None and self._batch is not None:
            # The live model is about to draw the same numbers, and others the next time.
            self.cache.give_up(self._batch, "The model draws random numbers in evaluation")
        self._guarded.add(name)
        prefix = f"{name}." if name else ""
        self._features.update({prefix + layer: value for layer, value in features.items()})
        self._problems.update({prefix + layer: f"In the reference: {text}" for layer, text in problems.items()})

    @contextmanager
    def _frozen(self, name: str) -> Iterator[None]:
        """Take care that the live model's trained weights play no part in a run."""
        if self.module is self._live:
            with adapters_off(self._live), self._extractors[name].alone():
                yield
        else:
            with nullcontext() if name in self._guarded else LiveWeightGuard(self._live):
                yield

    def _start(self, name: str, layer_names: list[str]) -> FeatureExtractor:
        """Watch the reference's module that answers to `name`, on the device of the live one."""
        root = _below(self._prefix, name) if self._prefix is not None else name
        module = {"": self.module, **named_layers(self.module)}[root]
        with torch.inference_mode(False):
            module.to(self._device(name))
        extractor = FeatureExtractor(module, [_below(name, layer) for layer in layer_names], self._pooling).__enter__()
        extractor.enabled = False
        return extractor

    def _device(self, name: str) -> torch.device:
        """Where the live model's module of this name is."""
        if name not in self._called:
            self._called[name] = {"": self._live, **named_layers(self._live)}[name]
        tensors = chain(self._called[name].parameters(), self._called[name].buffers())
        return next(tensor.device for tensor in tensors if tensor.numel() and tensor.device.type != "meta")


def _autocast(device: torch.device) -> torch.dtype | None:
    """The precision that autocast computes in on this device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


_FED = (
    "The step calls {!r} on what it computed from the trained weight {!r} before, so the reference can't be run on the "
    "raw inputs. Give the module a `forward` that does both and use it in the step, or pass other `layers`."
)
