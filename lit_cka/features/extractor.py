"""Features of chosen layers, taken by forward hooks while a model runs: `FeatureExtractor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.module import register_module_forward_hook

from lit_cka.features.given_masks import Mask, MaskCall, mask_call, named_arguments, said_tokens
from lit_cka.features.layer_pooling import LayerPooling, main_tensor
from lit_cka.features.layers import Layers, modules_by_name, select_layers
from lit_cka.features.lightning_private import is_forward_redirected
from lit_cka.features.nested import has_images_of_several_sizes, sizes_in
from lit_cka.features.pooling import Pooling
from lit_cka.features.shared_mode import SharedMode

OnCall = Callable[[str, bool, "tuple[Any, ...]", "dict[str, Any]"], None]
OnReturn = Callable[[str, bool, Any], None]
_PADDED_INSIDE = (
    "Expected images of one size, but the model was called with a list of several, which it pads where nobody sees it. "
    "Have the dataset resize them, or pass a callable `pooling` that knows which positions count."
)


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
            the layer's output tensor to (n, d).
        mask: which tokens count. None for the mask that the model is called with, by any of its usual names and in any
            of its usual forms (see `lit_cka.features.masks`): the outermost one of the layer's tokens. Or the name of
            the argument that says it, or a callable of the model's arguments that returns it, (n, tokens), nonzero for
            tokens that count.
        on_call: called as `(name, outermost, args, kwargs)` before the model, or a module on the way from it to a
            layer, runs. `outermost` tells that no other of these modules is running.
        on_return: called as `(name, outermost, output)` when it has run.

    Raises:
        ValueError: if `layers` matches nothing or `pooling` is unknown; see `collect` for what fails later.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with FeatureExtractor(net, layers=["0", "2"]) as extractor:
        ...     _ = net(torch.randn(5, 4))
        ...     features = extractor.collect()
        >>> {name: tuple(X.shape) for name, X in features.items()}
        {'0': (5, 8), '2': (5, 3)}
    """

    _alone: ClassVar[SharedMode[FeatureExtractor]] = SharedMode()

    def __init__(
        self,
        model: nn.Module,
        layers: Layers | None = None,
        pooling: Pooling = "mean",
        *,
        mask: Mask | None = None,
        on_call: OnCall | None = None,
        on_return: OnReturn | None = None,
    ) -> None:
        self.model = model
        self.layer_names = select_layers(model, layers)
        self.enabled = True
        self.tokens: Tensor | None = None  # those that count, (n, tokens), where the watcher knows
        self.num_samples: int | None = None  # of the batch that the model is run on, likewise
        self._mask = mask
        self._pooling = LayerPooling(pooling)
        self._on_call = on_call
        self._on_return = on_return
        self._handles = ExitStack()
        self._hooked = False
        self._by_name: dict[str, nn.Module] = {}
        self._running: list[str] = []
        self._num_calls = 0
        self._call_of: dict[str, int] = {}
        self._batch_sizes: set[int] = set()
        self._input_sizes: set[int] = set()
        self._calls: dict[str, MaskCall] = {}
        self._features: dict[str, Tensor] = {}
        self._problems: dict[str, str] = {}

    def watch_replicas(self, mesh: DeviceMesh | None) -> None:
        """Compare what a layer returns between processes that hold the same samples and run the model together, since
        each may have a shard of it alone, once until this is called again.

        Args:
            mesh: the processes, of which all have to run the model; None if there are none.
        """
        self._pooling.shards.watch(mesh)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Makes all other extractors deaf: for a run of the model that is for this one only, whoever watches it."""
        FeatureExtractor._alone.hold(self)
        try:
            yield
        finally:
            FeatureExtractor._alone.release(self)

    @property
    def _listens(self) -> bool:
        alone = FeatureExtractor._alone.holders
        return not alone or alone[-1] is self

    def __enter__(self) -> Self:
        if self._hooked:
            raise RuntimeError("This FeatureExtractor is already active; leave its `with` block first.")
        self._hooked = True
        self._by_name = modules_by_name(self.model)
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
        """Returns `(features, problems)` and forgets them: the sound layers' features, and the other layers' errors.

        Args:
            require_all: count it as an error if a layer has not run.
        """
        for name in self.layer_names if require_all else ():
            if name not in self._features and name not in self._problems:
                self._problems[name] = not_run(name) + (
                    "Either the model does not use it, or its `forward` is called directly, past the hooks, or within "
                    "a function that `torch.compile` was given (compile the module instead); or leave it out of "
                    "`layers`."
                )
        features = {name: value for name, value in self._features.items() if name not in self._problems}
        problems = self._problems
        self._clear()
        return features, problems

    def _clear(self) -> None:
        self._features, self._problems, self._calls = {}, {}, {}
        self._running, self._batch_sizes, self._input_sizes = [], set(), set()
        self._num_calls, self._call_of = 0, {}
        self._pooling.packed.clear()

    def _ancestors(self) -> list[str]:
        parts = [name.split(".") for name in self.layer_names]
        return sorted({".".join(part[:length]) for part in parts for length in range(len(part))}, key=len)

    # The hooks are closures that compare the module with the one they were made for: a deep copy of the model carries
    # them along, and there they must do nothing.

    def _hook_ancestor(self, name: str, target: nn.Module) -> Callable[[], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not target or not self.enabled or not self._listens or is_forward_redirected(module):
                return
            outermost = not self._running
            if self._on_call is not None:
                self._on_call(name, outermost, args, kwargs)
            arguments = named_arguments(type(target), args, kwargs)
            self._pooling.packed.note(name, target, arguments, outermost=outermost)
            if outermost:
                self._num_calls += 1
                self._batch_sizes, self._input_sizes = sizes_in((args, kwargs))
                for n in (self.num_samples, self._pooling.packed.num_samples):
                    if n in self._batch_sizes:  # whatever other tensors there are
                        self._batch_sizes = {n}
                self._pooling.num_samples = self.num_samples
                if self._pooling.counts_positions and has_images_of_several_sizes((args, kwargs)):
                    self._problems = dict.fromkeys(self.layer_names, _PADDED_INSIDE)
                self._pooling.tokens = self._tokens_kept(type(target), args, kwargs)
            self._running.append(name)
            call = mask_call(type(target), arguments)
            if call is None:
                self._calls.pop(name, None)
            else:
                self._calls[name] = call

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is target and self._listens and self._running and self._running[-1] == name:
                self._running.pop()
                if self._on_return is not None:
                    self._on_return(name, not self._running, output)

        # Before the user's pre-hooks, so that the inputs are seen as they came.
        first = target.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        last = target.register_forward_hook(after, always_call=True)

        def remove() -> None:
            first.remove()
            last.remove()

        return remove

    def _tokens_kept(self, module_type: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Returns which tokens count in this call of the model, if that was said."""
        if self.tokens is not None or self._mask is None:
            return self.tokens
        try:
            return said_tokens(self._mask, module_type, args, kwargs)
        except ValueError as error:
            self._problems = dict.fromkeys(self.layer_names, str(error))
            return None

    def _hook_layer(self, name: str, target: nn.Module) -> Callable[[], None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is not target or not self.enabled or not self._listens:
                return
            if name in self._problems:
                return
            if name in self._features:
                in_another_call = self._num_calls > self._call_of[name]
                self._problems[name] = ran_again(name, in_another_call=in_another_call)
                return
            try:
                self._call_of[name] = self._num_calls
                with _plain_mode(main_tensor(output)):
                    sizes = (self._batch_sizes, self._input_sizes) if self._batch_sizes else sizes_in(args)
                    self._features[name] = self._pooling.features(
                        name, module, parent, output, sizes[0], self._calls, sizes[1]
                    )
            except ValueError as error:
                self._problems[name] = str(error)

        parent = self._by_name[name.rpartition(".")[0]]
        return _register(target, after)


def ran_again(name: str, *, in_another_call: bool) -> str:
    """The message that a layer has run more than once, in one call of the model or in several."""
    if in_another_call:
        return (
            f"Layer {name!r} has run in more than one call of the model since its features were last collected, so its "
            "samples are not paired. Call `collect()` after each call; in a training step, call the model once (on "
            "several views of a batch joined, say), or choose a layer that runs once."
        )
    return (
        f"Layer {name!r} has run more than once in one call of the model (shared weights, or several views of a "
        "batch), so its samples are not paired. Choose a layer that runs once."
    )


def not_run(name: str) -> str:
    """The beginning of the message that a layer has not run."""
    return f"Layer {name!r} has not run. "


def _register(target: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], None]) -> Callable[[], None]:
    """Have a hook called for a module, which looks which one it is called for; return how to remove it."""
    # In evaluation, torch's encoder layers compute otherwise, with other rounding, if they or their parts have hooks.
    if isinstance(target, nn.TransformerEncoderLayer) and not any(
        module._forward_hooks or module._forward_pre_hooks for module in target.modules()
    ):
        return register_module_forward_hook(hook).remove
    return target.register_forward_hook(hook).remove


def _plain_mode(tensor: Tensor | None) -> AbstractContextManager[None]:
    """Returns a context without gradients and without autocast on the tensor's device."""
    device_type = "cpu" if tensor is None else tensor.device.type
    autocast = torch.is_autocast_enabled(device_type)
    return _plain(device_type, autocast) if autocast or torch.is_grad_enabled() else nullcontext()


@contextmanager
def _plain(device_type: str, autocast: bool) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        yield
