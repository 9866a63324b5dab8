"""Features of chosen layers, taken by forward hooks while a model runs: `FeatureExtractor`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lit_cka.features.compiled import is_redirected
from lit_cka.features.layers import Layers, named_layers, select_layers
from lit_cka.features.masks import find_mask
from lit_cka.features.pooling import Pooling, find_layout, parse_pooling, pool, pool_nested

OnCall = Callable[[str, bool, "tuple[Any, ...]", "dict[str, Any]"], None]
OnReturn = Callable[[str, bool, Any], None]


class FeatureExtractor:
    """Takes the pooled features of some of a model's layers, by forward hooks, whenever the model runs.

    A context manager: the hooks exist inside the `with` block alone, and leave the model's output untouched.

        with FeatureExtractor(model, layers="blocks.*", pooling="mean") as extractor:
            model(images)
            features = extractor.collect()      # {"blocks.0": (n, d), "blocks.1": (n, d), ...}, float64

    Args:
        model: the module to watch. Layers count from it, as in `model.named_modules()`.
        layers: which layers, see `lit_cka.features.select_layers`; None for the repeated blocks.
        pooling: "mean" over tokens (those the attention mask keeps) or space, "last" token that the mask keeps, "cls"
            token, "flatten"; each with a layout after a colon where it is ambiguous ("mean:NCHW"). Or a callable from
            the layer's output tensor to (n, d). The mask is the `attention_mask` (or torch's `key_padding_mask`)
            that the innermost module around the layer was called with.
        on_call: called as `(name, outermost, args, kwargs)` before the model, or a module on the way from it to a
            layer, runs. `outermost` tells that no other of these modules is running.
        on_return: called as `(name, outermost, output)` when it has run.

    Raises:
        ValueError: if `layers` matches nothing or `pooling` is unknown; see `collect` for what fails later.
    """

    _only: ClassVar[list[FeatureExtractor]] = []

    def __init__(
        self,
        model: nn.Module,
        layers: Layers | None = None,
        pooling: Pooling = "mean",
        *,
        on_call: OnCall | None = None,
        on_return: OnReturn | None = None,
    ) -> None:
        self.model = model
        self.layer_names = select_layers(model, layers)
        self.enabled = True
        self._method, self._layout = parse_pooling(pooling)
        self._on_call = on_call
        self._on_return = on_return
        self._handles = ExitStack()
        self._hooked = False
        self._by_name: dict[str, nn.Module] = {}
        # Found once, so that a later batch of as many samples as tokens is no riddle.
        self._layouts: dict[str, str] = {}
        self._running: list[str] = []
        self._batch_sizes: set[int] = set()
        self._masks: dict[str, Tensor | None] = {}
        self._features: dict[str, Tensor] = {}
        self._problems: dict[str, str] = {}
        self._unmatched_masks: set[str] = set()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a run of the model that is for this extractor only, whoever else watches it."""
        FeatureExtractor._only.append(self)
        try:
            yield
        finally:
            FeatureExtractor._only.pop()

    @property
    def _listens(self) -> bool:
        return not FeatureExtractor._only or FeatureExtractor._only[-1] is self

    def __enter__(self) -> Self:
        if self._hooked:
            raise RuntimeError("This FeatureExtractor is already active; leave its `with` block first.")
        self._hooked = True
        self._by_name = {"": self.model, **named_layers(self.model)}
        for name in self._ancestors():
            self._handles.callback(self._hook_ancestor(name, self._by_name[name]))
        for name in self.layer_names:
            self._handles.callback(self._hook_layer(name, self._by_name[name]))
        return self

    def __exit__(self, *exc: object) -> None:
        self._handles.close()
        self._by_name = {}
        self._hooked = False
        self._clear()

    def collect(self) -> dict[str, Tensor]:
        """Return the features (n, d), float64, of every layer since the last call, and forget them.

        Raises:
            ValueError: naming the layer, if one has not run, has run more than once, or has returned something that is
                no floating-point tensor, or whose layout is ambiguous.
        """
        features, problems = self.drain()
        if problems:
            raise ValueError(next(iter(problems.values())))
        return features

    def drain(self, *, require_all: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
        """As `collect`, but return `(features, problems)`: the sound layers' features, and the other layers' errors.

        Args:
            require_all: count it as an error if a layer has not run.
        """
        for name in self.layer_names if require_all else ():
            if name not in self._features and name not in self._problems:
                self._problems[name] = (
                    f"Layer {name!r} has not run. Either the model does not use it, or its `forward` is called "
                    "directly, past the hooks, or within a function that `torch.compile` was given (compile the "
                    "module instead); or leave it out of `layers`."
                )
        features = {name: value for name, value in self._features.items() if name not in self._problems}
        problems = self._problems
        self._clear()
        return features, problems

    def _clear(self) -> None:
        self._features, self._problems, self._masks = {}, {}, {}
        self._running, self._batch_sizes = [], set()

    def _ancestors(self) -> list[str]:
        parts = [name.split(".") for name in self.layer_names]
        return sorted({".".join(part[:length]) for part in parts for length in range(len(part))}, key=len)

    # The hooks are closures that compare the module with the one they were made for: a deep copy of the model carries
    # them along, and there they must do nothing.

    def _hook_ancestor(self, name: str, target: nn.Module) -> Callable[[], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not target or not self.enabled or not self._listens or is_redirected(module):
                return
            outermost = not self._running
            if self._on_call is not None:
                self._on_call(name, outermost, args, kwargs)
            if outermost:
                self._batch_sizes = _leading_sizes((args, kwargs))
            self._running.append(name)
            takes_mask, mask = find_mask(type(target), args, kwargs)
            if takes_mask:
                self._masks[name] = mask

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is target and self._listens and self._running and self._running[-1] == name:
                self._running.pop()
                if self._on_return is not None:
                    self._on_return(name, not self._running, output)

        # Before the user's own pre-hooks, so that the inputs are seen as they came.
        first = target.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        last = target.register_forward_hook(after, always_call=True)

        def remove() -> None:
            first.remove()
            last.remove()

        return remove

    def _hook_layer(self, name: str, target: nn.Module) -> Callable[[], None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is not target or not self.enabled or not self._listens:
                return
            if name in self._features or name in self._problems:
                self._problems[name] = (
                    f"Layer {name!r} has run more than once in one step (shared weights, several views of a batch, or "
                    "a second forward pass), so its samples are not paired. Choose a layer that runs once."
                )
                return
            try:
                with _plain_mode(_main_tensor(output)):
                    self._features[name] = self._pooled(name, module, args, output)
            except ValueError as error:
                self._problems[name] = str(error)

        return target.register_forward_hook(after).remove

    def _pooled(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        tensor = _main_tensor(output)
        if tensor is None or not tensor.is_floating_point():
            got = type(output).__name__ if tensor is None else f"a tensor of {tensor.dtype}"
            raise ValueError(f"Expected layer {name!r} to return floating-point features, but it returned {got}.")
        tensor = tensor.detach() if tensor.requires_grad else tensor
        if callable(self._method):
            features = self._method(tensor)
            if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
                got = str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(
                    f"Expected `pooling` to return floating-point features (samples, features) for layer {name!r} of "
                    f"output shape {tuple(tensor.shape)}, but got {got}."
                )
        elif tensor.is_nested:
            features = pool_nested(tensor, self._method)
        else:
            layout = self._find_layout(name, module, tensor, self._batch_sizes or _leading_sizes(args))
            mask = self._mask(name, layout, tensor) if self._method in ("mean", "last") else None
            features = pool(tensor, self._method, layout, mask)
        features = features.cpu() if features.device.type == "mps" else features  # which has no float64
        # A copy, unless it is one already: what a layer returns may be overwritten by an in-place operation behind it.
        return features.to(torch.float64, copy=callable(self._method) or features.dtype == tensor.dtype)

    def _find_layout(self, name: str, module: nn.Module, tensor: Tensor, batch_sizes: set[int]) -> str:
        if self._layout is not None and tensor.ndim != 2:
            if len(self._layout) != tensor.ndim:
                raise ValueError(
                    f"Expected layer {name!r} to return a tensor with the axes {self._layout}, but got shape "
                    f"{tuple(tensor.shape)}."
                )
            return self._layout
        known = self._layouts.get(name)
        if known is None or len(known) != tensor.ndim or tensor.shape[known.index("N")] not in batch_sizes:
            known = self._layouts[name] = find_layout(
                name, module, tensor, batch_sizes, self._by_name[name.rpartition(".")[0]]
            )
        return known

    def _mask(self, name: str, layout: str, tensor: Tensor) -> Tensor | None:
        """The innermost (n, tokens) mask around the layer; None where there is none, or it is for other tokens."""
        if not self._masks or tensor.ndim != 3:
            return None
        shape = (
            tensor.shape[layout.index("N")],
            next(tensor.shape[axis] for axis, letter in enumerate(layout) if letter not in "NC"),
        )
        around = [ancestor for ancestor in self._masks if ancestor == "" or name.startswith(f"{ancestor}.")]
        for ancestor in sorted(around, key=len, reverse=True):
            mask = self._masks[ancestor]
            if mask is None or mask.shape == shape:
                return mask
            if mask.ndim == 2 and name not in self._unmatched_masks:
                self._unmatched_masks.add(name)
                warnings.warn(
                    f"Layer {name!r} has {shape[1]} positions, but the attention mask is of shape {tuple(mask.shape)}: "
                    "all positions are pooled.",
                    stacklevel=2,
                )
        return None


def _plain_mode(tensor: Tensor | None) -> AbstractContextManager[None]:
    """Without gradients and autocast on the tensor's device."""
    device_type = "cpu" if tensor is None else tensor.device.type
    autocast = torch.is_autocast_enabled(device_type)
    return _plain(device_type, autocast) if autocast or torch.is_grad_enabled() else nullcontext()


@contextmanager
def _plain(device_type: str, autocast: bool) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        yield


def _main_tensor(output: Any) -> Tensor | None:
    """The hidden states in a layer's output: itself, the first of a tuple, or a ModelOutput's `last_hidden_state`."""
    if isinstance(output, Tensor):  # first, since asking for a Mapping takes longer
        return output
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state")
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def _leading_sizes(value: Any) -> set[int]:
    return {tensor.shape[0] for tensor in tensors_in(value) if tensor.ndim}
