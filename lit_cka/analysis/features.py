"""Features of a model's layers over a whole dataset, stored and read again: `Features`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
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

    Raises:
        ValueError: if a layer's features, or the labels, are not of as many samples as there are ids.
    """

    layers: dict[str, Tensor]
    ids: list[str]
    model: str = "model"
    data: str = "data"
    pooling: str = "mean"
    labels: list[Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_tensors(self.layers))
        for name, value in self.layers.items():
            if value.ndim != 2 or len(value) != len(self.ids):
                raise ValueError(
                    f"Expected features (n, d) of {len(self.ids)} samples, as many as there are ids, but those of "
                    f"layer {name!r} have shape {tuple(value.shape)}."
                )
        if self.labels is not None and len(self.labels) != len(self.ids):
            raise ValueError(f"Expected {len(self.ids)} labels, one for each id, but got {len(self.labels)}.")

    @property
    def num_samples(self) -> int:
        """The number of samples, n."""
        return len(self.ids)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, whole or not at all."""
        described = {
            "format": _FORMAT, "model": self.model, "data": self.data, "pooling": self.pooling,
            "layer_names": json.dumps(list(self.layers)), "ids": json.dumps(self.ids),
            "labels": json.dumps(self.labels),
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
                if described.get("format") != _FORMAT:
                    raise ValueError(f"Expected {str(path)!r} to hold features that lit_cka stored, but it doesn't.")
                layers = {name: file.get_tensor(name) for name in json.loads(described["layer_names"])}
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}.") from error
        return cls(
            layers, json.loads(described["ids"]), described["model"], described["data"], described["pooling"],
            json.loads(described["labels"]),
        )  # fmt: skip


def check_matched(a: Features, b: Features) -> None:
    """Raise a ValueError unless the samples of both are the same, in the same order."""
    if a.ids == b.ids:
        return
    if a.num_samples != b.num_samples:
        how = f"{a.model} has {a.num_samples} and {b.model} {b.num_samples}"
    elif set(a.ids) == set(b.ids):
        how = "they are in another order"
    else:
        place = next(index for index, pair in enumerate(zip(a.ids, b.ids, strict=True)) if pair[0] != pair[1])
        how = f"sample {place} is {a.ids[place]!r} for {a.model} and {b.ids[place]!r} for {b.model}"
    raise ValueError(f"Expected features of the same samples in the same order, but {how}.")
