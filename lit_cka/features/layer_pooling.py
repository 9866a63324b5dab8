"""From what a layer returns within a call of its model to features (n, d) in float64: `LayerPooling`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_cka.features.given_masks import MaskCall, mask_for
from lit_cka.features.packed import PackedCalls
from lit_cka.features.pooling import Pooling, find_layout, parse_pooling, pool, pool_nested, pool_packed
from lit_cka.features.sharded_outputs import OutputShards, is_dtensor
from lit_cka.features.sharded_pooling import pool_shards


class LayerPooling:
    """Pools the outputs of a model's layers by what the calls around them tell: batch sizes and attention masks.

    Args:
        pooling: see `FeatureExtractor`.

    Raises:
        ValueError: if `pooling` is unknown.
    """

    def __init__(self, pooling: Pooling) -> None:
        self._method, self._layout = parse_pooling(pooling)
        # By layer, found once, so that a later batch of as many samples as tokens is no riddle.
        self._layouts: dict[str, str] = {}
        self._unused_masks: set[str] = set()
        self.tokens: Tensor | None = None  # that count, (n, tokens), where it is not left to the calls to say
        self.num_samples: int | None = None  # of the batch, likewise
        self.packed = PackedCalls()
        self.shards = OutputShards()

    @property
    def counts_positions(self) -> bool:
        """Whether all positions of a layer count but for a mask's, rather than what a callable makes of them."""
        return not callable(self._method)

    def features(
        self, name: str, module: nn.Module, parent: nn.Module, output: Any, batch_sizes: set[int],
        calls: Mapping[str, MaskCall], input_sizes: Set[int] = frozenset(),
    ) -> Tensor:  # fmt: skip
        """Returns the features (n, d), float64, in what a layer has returned. They share no memory with it, since an
        operation behind the layer may overwrite that in place.

        Args:
            name: of the layer.
            module: the layer.
            parent: the module that holds the layer.
            output: what the layer has returned.
            batch_sizes: sizes of the first axis of the model's inputs.
            calls: by the names of modules around layers, the masks that they were called with.
            input_sizes: sizes of the other axes of the model's inputs.

        Raises:
            ValueError: if the output is no floating-point tensor, its layout is ambiguous, its rows are of packed
                sequences of nobody knows which samples, or a callable pooling returns something else than features.
        """
        tensor = main_tensor(output)
        if tensor is None or not tensor.is_floating_point():
            got = type(output).__name__ if tensor is None else f"a tensor of {tensor.dtype}"
            raise ValueError(f"Expected layer {name!r} to return floating-point features, but it returned {got}.")
        tensor = tensor.detach() if tensor.requires_grad else tensor
        layout_of = partial(self._find_layout, name, module, parent, batch_sizes)
        tensor = self.shards.distributed(name, module, parent, tensor, layout_of, input_sizes)
        if callable(self._method):
            tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
            features = self._method(tensor)
            if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
                got = str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(
                    f"Expected `pooling` to return floating-point features (samples, features) for layer {name!r} of "
                    f"output shape {tuple(tensor.shape)}, but got {got}."
                )
        elif tensor.is_nested:
            features = pool_nested(tensor, self._method)
        elif (lengths := self.packed.rows_of_samples(name, tensor.shape, self.num_samples)) is not None:
            rows = tensor.full_tensor() if is_dtensor(tensor) else tensor
            features = pool_packed(rows.flatten(0, -2), self._method, lengths)
        else:
            layout = layout_of(tensor)
            mask = self._mask(name, layout, tensor, calls) if self._method in ("mean", "last") else None
            if is_dtensor(tensor):
                features = pool_shards(tensor, self._method, layout, mask)
            else:
                features = pool(tensor, self._method, layout, mask)
        features = features.cpu() if features.device.type == "mps" else features  # which has no float64
        is_copy = not callable(self._method) and features.dtype != tensor.dtype
        return features.to(torch.float64, copy=not is_copy)

    def _find_layout(
        self, name: str, module: nn.Module, parent: nn.Module, batch_sizes: set[int], tensor: Tensor
    ) -> str:
        if self._layout is not None and tensor.ndim != 2:
            if len(self._layout) != tensor.ndim:
                raise ValueError(
                    f"Expected layer {name!r} to return a tensor with the axes {self._layout}, but got shape "
                    f"{tuple(tensor.shape)}."
                )
            return self._layout
        layout = self._layouts.get(name)
        if layout is None or len(layout) != tensor.ndim or tensor.shape[layout.index("N")] not in batch_sizes:
            layout = self._layouts[name] = find_layout(name, module, tensor, batch_sizes, parent)
        return layout

    def _mask(self, name: str, layout: str, tensor: Tensor, calls: Mapping[str, MaskCall]) -> Tensor | None:
        """Returns which of a layer's tokens count, (n, tokens); None if all do."""
        if tensor.ndim != 3 or (self.tokens is None and not calls):
            return None
        shape = (
            tensor.shape[layout.index("N")],
            next(tensor.shape[axis] for axis, letter in enumerate(layout) if letter not in "NC"),
        )
        if self.tokens is None:
            return mask_for(name, shape, calls, self._warn_once)
        if self.tokens.shape == shape:
            return self.tokens
        got = tuple(self.tokens.shape)
        self._warn_once(
            "",
            f"Layer {name!r} has {shape[1]} positions of {shape[0]} samples, but `mask` is of shape {got}: "
            "all positions are pooled.",
        )
        return None

    def _warn_once(self, mask: str, message: str) -> None:
        if mask not in self._unused_masks:
            self._unused_masks.add(mask)
            warnings.warn(message, stacklevel=2)


def main_tensor(output: Any) -> Tensor | None:
    """Returns the hidden states in a layer's output: itself, the first of a tuple, or a ModelOutput's
    `last_hidden_state`; None where there are none.
    """
    if isinstance(output, Tensor):  # first, since asking for a Mapping takes longer
        return output
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state")
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None
