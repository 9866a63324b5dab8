"""Features of a model's layers over a whole dataset, stored and read again: `Features`."""

from __future__ import annotations

import json
import os
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_cka.files import written_whole
from lit_cka.functional.arrays import as_tensors

_FORMAT = "lit_cka features 1"


@dataclass(frozen=True)
class Features:
    """What a model makes of a dataset.

    Attributes:
        layers: features (n, d) by layer, in the model's order, float64 on the CPU; given NumPy arrays become tensors.
        ids: of the samples, in order; what two sets of features are matched by.
        model: a name for the model.
        data: a name for the dataset.
        pooling: how a layer's output became a vector per sample.
        labels: of the samples, where the data had some.
        inputs: hashes of what the model has read of each sample, where the data had no ids: what two sets of features
            are matched by if both models have read the same.

    Raises:
        ValueError: if a layer's features, the labels or the inputs are not of as many samples as there are ids.

    Example:
        >>> import torch
        >>> X = torch.randn(3, 4)
        >>> Features({"blocks.0": X, "blocks.1": 2 * X}, ["a", "b", "c"], model="vit", data="digits").num_samples
        3
    """

    layers: dict[str, Tensor]
    ids: list[str]
    model: str = "model"
    data: str = "data"
    pooling: str = "mean"
    labels: list[Any] | None = None
    inputs: list[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_tensors(self.layers))
        for name, value in self.layers.items():
            if value.ndim != 2 or len(value) != len(self.ids):
                raise ValueError(
                    f"Expected features (n, d) of {len(self.ids)} samples, as many as there are ids, but those of "
                    f"layer {name!r} have shape {tuple(value.shape)}."
                )
        for name, of_samples in (("labels", self.labels), ("inputs", self.inputs)):
            if of_samples is not None and len(of_samples) != len(self.ids):
                raise ValueError(f"Expected {len(self.ids)} {name}, one for each id, but got {len(of_samples)}.")

    @property
    def num_samples(self) -> int:
        """The number of samples, n."""
        return len(self.ids)

    def in_order(self, places: list[int]) -> Features:
        """Returns the same samples in another order: first that of the first of `places`, and so on."""

        def ordered(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[place] for place in places]

        layers = {name: value[places] for name, value in self.layers.items()}
        ids, labels, inputs = ordered(self.ids) or [], ordered(self.labels), ordered(self.inputs)
        return replace(self, layers=layers, ids=ids, labels=labels, inputs=inputs)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, whole or not at all."""
        described = {
            "format": _FORMAT, "model": self.model, "data": self.data, "pooling": self.pooling,
            "layer_names": json.dumps(list(self.layers)), "ids": json.dumps(self.ids),
            "labels": json.dumps(self.labels), "inputs": json.dumps(self.inputs),
        }  # fmt: skip
        with written_whole(path) as partial:
            save_file({name: value.contiguous() for name, value in self.layers.items()}, partial, described)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Features:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or holds no features.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"Expected a file of features at {str(path)!r}, but there is none.")
        try:
            with safe_open(path, framework="pt") as file:
                described = file.metadata() or {}
                if described.get("format") == _FORMAT:
                    return cls._described(described, file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}.") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The features in {str(path)!r} are damaged ({type(error).__name__}): {error}") from error
        raise ValueError(f"Expected {str(path)!r} to hold features that lit_cka stored, but it doesn't.")

    @classmethod
    def _described(cls, described: dict[str, str], file: Any) -> Features:
        names, ids, labels, inputs = (
            json.loads(described.get(key, "null")) for key in ("layer_names", "ids", "labels", "inputs")
        )
        for key, value in (("layer_names", names), ("ids", ids), ("inputs", [] if inputs is None else inputs)):
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"Expected `{key}` to be names, but got {value!r:.80}.")
        is_plain = isinstance(labels, list) and all(isinstance(each, (str, int, float, type(None))) for each in labels)
        if labels is not None and not is_plain:
            raise ValueError(f"Expected `labels` to be words and numbers, but got {labels!r:.80}.")
        layers = {name: file.get_tensor(name) for name in names}
        for name, value in layers.items():
            if value.is_complex() or (value.is_floating_point() and value.dtype.itemsize < 2):
                raise ValueError(f"Expected real features of 16 bits or more, but those of {name!r} are {value.dtype}.")
        return cls(layers, ids, described["model"], described["data"], described["pooling"], labels, inputs)


def matched(a: Features, b: Features, *, same_loader: bool = False) -> Features:
    """Returns `b` with its samples in the order of those of `a`.

    They are matched by their inputs, where both have read some of the same; else by their ids.

    Args:
        a: features of one model.
        b: features of another.
        same_loader: both models have read from one loader, so that their inputs have to be the same.

    Raises:
        ValueError: unless the samples of both are the same, or if they have other labels.
    """
    inputs_a, inputs_b = a.inputs or [], b.inputs or []
    by_inputs = not {*inputs_a}.isdisjoint(inputs_b) or (same_loader and bool(inputs_a and inputs_b))
    keys_a, keys_b = (inputs_a, inputs_b) if by_inputs else (a.ids, b.ids)
    if a.num_samples != b.num_samples:
        raise ValueError(
            f"Expected features of the same samples, but {a.model} has {a.num_samples} and {b.model} {b.num_samples}."
        )
    if keys_a != keys_b:
        b = b.in_order(_places(a, b, keys_a, keys_b, by_inputs=by_inputs))
    if a.labels is not None and b.labels is not None and a.labels != b.labels:
        place = next(index for index, pair in enumerate(zip(a.labels, b.labels, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"Expected features of the same samples in the same order, but sample {place} has the label "
            f"{a.labels[place]!r} for {a.model} and {b.labels[place]!r} for {b.model}."
        )
    return b


def _places(a: Features, b: Features, keys_a: list[str], keys_b: list[str], *, by_inputs: bool) -> list[int]:
    """Returns where in `b` each sample of `a` is; equal ones in turn."""
    places: dict[str, deque[int]] = {}
    for place, key in enumerate(keys_b):
        places.setdefault(key, deque()).append(place)
    found = [places[key].popleft() if places.get(key) else None for key in keys_a]
    missing = [index for index, place in enumerate(found) if place is None]
    if not missing:
        return [place for place in found if place is not None]
    if by_inputs:
        raise ValueError(
            f"Expected features of the same samples, but {len(missing)} of {a.num_samples} that {a.model} has read are "
            f"not among those of {b.model}. Use a loader that gives the same samples each time, or batches that are "
            'mappings with an "id" for each sample.'
        )
    place = next(index for index, pair in enumerate(zip(a.ids, b.ids, strict=True)) if pair[0] != pair[1])
    raise ValueError(
        f"Expected features of the same samples, but sample {place} is {a.ids[place]!r} for {a.model} and "
        f"{b.ids[place]!r} for {b.model}."
    )
