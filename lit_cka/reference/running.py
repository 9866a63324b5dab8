"""A reference that runs beside the live model, on copies of its inputs: for what a recording can't serve."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_cka.features.extractor import FeatureExtractor
from lit_cka.features.layers import named_layers
from lit_cka.features.nested import tensors_in
from lit_cka.features.pooling import Pooling
from lit_cka.reference.arguments import CopyError, private_copy
from lit_cka.reference.exchange import below
from lit_cka.reference.isolation import (
    FollowsLiveWeightsError,
    LiveWeightGuard,
    WeightsThatFeed,
    WeightTaint,
    tensors_of,
)
from lit_cka.samples.random_states import preserved_rng


class RunningReference:
    """A frozen model that runs on the inputs the live model is called with, just before the live model does.

    `on_call` and `on_return` are for `FeatureExtractor`: they report the calls of the modules around the layers. The
    reference runs at the outermost of these calls (or, with `prefix`, at that submodule's), on copies of the raw
    inputs, with the call's autocast, grad mode, and train or eval mode.

    Args:
        live: the model in training.
        module: the reference, which shares nothing with it.
        prefix: the submodule of `live` that the reference answers to; None for all of it.
        layer_names: the layers that are compared, as in `live.named_modules()`.
        pooling: as for `FeatureExtractor`.
    """

    def __init__(
        self, live: nn.Module, module: nn.Module, prefix: str | None, layer_names: list[str], pooling: Pooling
    ) -> None:
        self.module = module
        self._live = live
        self._prefix = prefix
        self._layer_names = layer_names
        self._pooling = pooling
        self.mask: str | None = None  # the name of the argument that says which tokens count
        self._tokens: Tensor | None = None
        self._extractors: dict[str, FeatureExtractor] = {}
        self._guarded: set[str] = set()  # calls that were seen not to read live weights
        self._called: dict[str, nn.Module] = {}  # the live model's modules that are called, by name
        self._features: dict[str, Tensor] = {}
        self._problems: dict[str, str] = {}
        self._taint: WeightTaint | None = None
        self._fed: dict[str, WeightsThatFeed] = {}  # what the inputs of calls come from, by name
        self._moved: dict[str, str | None] = {}  # which of that has changed, as was seen in this pass
        self._origins: frozenset[str] = frozenset()  # of the inputs of the outermost call
        self._running = self._first = False
        self._is_active = False  # whether the reference runs in this step

    def of(self, live: nn.Module) -> RunningReference:
        """Return the same reference for another live model of the same architecture."""
        return RunningReference(live, self.module, self._prefix, self._layer_names, self._pooling)

    def begin(self, *, first: bool, tokens: Tensor | None = None) -> None:
        """Prepare for the step on a batch. In the first one, what goes wrong is raised, and inputs are traced.

        `tokens` are those that count, if that is not left to the model's calls to say.
        """
        self._tokens = tokens
        self._features, self._problems = {}, {}
        self._is_active, self._first = True, first
        self._taint = WeightTaint(self._live) if first and self._prefix is None else None
        self._watch_step(True)

    def end(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Finish the step: the features (n, d) by layer, and the layers that failed with the reasons."""
        self._watch_step(False)
        self._taint, self._is_active = None, False
        return self._features, self._problems

    def close(self) -> None:
        """Remove all hooks from the reference; also after a step that failed."""
        self.end()
        for extractor in self._extractors.values():
            extractor.__exit__()
        self._extractors.clear()
        self._moved.clear()

    def _watch_step(self, active: bool) -> None:
        """Have noted what happens outside of the modules around the layers."""
        if self._taint is not None:
            self._taint.watch(active)

    def on_call(self, name: str, outermost: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run on the arguments of this call of the live model's module `name`, if it is the one to follow."""
        if self._running:
            raise FollowsLiveWeightsError(name or "the model")
        if not self._is_active:
            return
        if outermost and self._taint is not None:
            self._taint.paused = True
            self._origins = self._taint.origins((args, kwargs))
        if name != self._prefix if self._prefix is not None else not outermost:
            return
        layer_names = [layer for layer in self._layer_names if not name or layer.startswith(f"{name}.")]
        problem = self._problem_of_inputs(name, args, kwargs)
        if problem is not None:
            self._problems.update(dict.fromkeys(layer_names, problem))
            return
        try:
            self._run(name, layer_names, args, kwargs)
        except (FollowsLiveWeightsError, CopyError):
            raise
        except Exception as error:
            message = (
                f"The reference failed on the inputs of {name or 'the module'!r} ({type(error).__name__}: {error})."
            )
            if self._first:
                raise RuntimeError(message) from error
            self._problems.update(dict.fromkeys(layer_names, message))

    def _problem_of_inputs(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the reference can't be run on these inputs: they come from weights that are, or have been, trained."""
        shown = name or "the module"
        if self._taint is not None:
            origin = self._taint.trained_origin((args, kwargs))
            if origin is not None:
                return _FED.format(shown, origin)
            self._fed[name] = WeightsThatFeed(self._live, self._origins)
        if name in self._fed and name not in self._moved:
            self._moved[name] = self._fed[name].moved()
        moved = self._moved.get(name)
        return None if moved is None else _FED_LATER.format(shown, moved)

    def on_return(self, name: str, outermost: bool, output: Any) -> None:
        """Note what the live model's module `name` returned, and have the rest of the step watched."""
        if outermost and self._taint is not None:
            own = tensors_of({"": self._live, **named_layers(self._live)}[name])
            self._taint.note(list(tensors_in(output)), self._origins | self._taint.origins(list(own.values())))
            self._taint.paused = False

    def _run(self, name: str, layer_names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in self._extractors:
            self._extractors[name] = self._start(name, layer_names)
        extractor = self._extractors[name]
        # The model may change its inputs, or use them up: the reference gets copies.
        args, kwargs = private_copy((args, kwargs))
        extractor.model.train(self._called[name].training)
        self._running = extractor.enabled = True
        extractor.tokens = self._tokens
        try:
            guard = nullcontext() if name in self._guarded else LiveWeightGuard(self._live)
            with preserved_rng(), guard:
                extractor.model(*args, **kwargs)
        finally:
            self._running = extractor.enabled = False
            features, problems = extractor.drain(require_all=False)
        self._guarded.add(name)
        prefix = f"{name}." if name else ""
        self._features.update({prefix + layer: value for layer, value in features.items()})
        self._problems.update({prefix + layer: f"In the reference: {text}" for layer, text in problems.items()})

    def _start(self, name: str, layer_names: list[str]) -> FeatureExtractor:
        """Watch the reference's module that answers to `name`, on the device of the live one."""
        root = below(self._prefix, name) if self._prefix is not None else name
        module = {"": self.module, **named_layers(self.module)}[root]
        with torch.inference_mode(False):
            module.to(self._device(name))
        layers = [below(name, layer) for layer in layer_names]
        extractor = FeatureExtractor(module, layers, self._pooling, mask=self.mask).__enter__()
        extractor.enabled = False
        return extractor

    def _device(self, name: str) -> torch.device:
        """Where the live model's module of this name is."""
        if name not in self._called:
            self._called[name] = {"": self._live, **named_layers(self._live)}[name]
        tensors = [*self._called[name].parameters(), *self._called[name].buffers()]
        tensors = [tensor for tensor in tensors if tensor.device.type != "meta"]
        return max(tensors, key=lambda tensor: tensor.numel() > 0).device  # empty ones may be anywhere


_FED = (
    "The step calls {!r} on what it computed from the trained weight {!r} before, so the reference can't be run on the "
    "raw inputs. Give the module a `forward` that does both and use it in the step, or pass other `layers`."
)
_FED_LATER = (
    "The step calls {!r} on what it computed before, which the reference can be run on as long as all that took part "
    "in it is as it was; but {!r} has changed since the start. Give the module a `forward` that does both and use it "
    "in the step, or pass fixed batches as `probe=`."
)
