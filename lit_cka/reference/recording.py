"""What the reference returned for every sample, kept by what the sample is: `Recording`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_cka.reference.feature_store import FeatureStore, MappedFile
from lit_cka.samples.sample_keys import BatchSamples

# Positions of samples that were not recorded, and of rows that a layer did not give.
UNKNOWN, GAP = -1, -2
CacheDtype = Literal["auto", "float64", "bfloat16"]
_FLOAT64_BYTES = 2**28  # up to which features are kept as they are, where the type is left open
_log = logging.getLogger(__name__)


class Dataloader(NamedTuple):
    """Which dataloader: of which stage, and its number there."""

    stage: str
    number: int


class SampleIndex:
    """Where the rows with given keys are: keys (n, 2) of int64 in, positions out."""

    def __init__(self) -> None:
        self._positions: dict[tuple[int, ...], int] = {}
        self._keys: list[Tensor] = []
        self.num_rows = 0
        self.num_repeated = 0  # rows whose key another one had before

    @property
    def keys(self) -> Tensor:
        """The keys (n, 2) of all rows, in their order."""
        return torch.cat(self._keys) if self._keys else torch.empty(0, 2, dtype=torch.int64)

    def add(self, keys: Tensor) -> None:
        """Append rows with these keys; of equal keys the first row counts."""
        self._keys.append(keys)
        for row, key in enumerate(map(tuple, keys.tolist()), start=self.num_rows):
            self._positions.setdefault(key, row)
        self.num_rows += len(keys)
        self.num_repeated = self.num_rows - len(self._positions)

    def find(self, keys: Tensor) -> Tensor:
        """Return the positions (n,) of rows with these keys (n, 2); -1 for those that are not there."""
        return torch.tensor([self._positions.get(key, UNKNOWN) for key in map(tuple, keys.tolist())], dtype=torch.int64)


class RecordedDataloader:
    """What was recorded of one dataloader: by layer the features of every row, and the rows by key.

    Most layers have a row for each sample, and share an index. A layer with more (several crops of an image) has one
    of its own.

    Attributes:
        stores: features by layer.
        contents: hashes of whole batches, by hashes of their keys, to find out whether the data are still the same.
        is_complete: whether the pass that recorded it has come to its end.
    """

    def __init__(self, layer_names: list[str], dtype: torch.dtype) -> None:
        self.stores = {name: FeatureStore(dtype) for name in layer_names}
        self.contents: dict[str, str] = {}
        self.is_complete = False
        self.indices: dict[str, SampleIndex] = {}
        self._shared = SampleIndex()
        self._by_content = SampleIndex()  # of the rows of the shared index

    def __len__(self) -> int:
        return max((index.num_rows for index in self.indices.values()), default=0)

    @property
    def nbytes(self) -> int:
        """What the features take."""
        return sum(store.nbytes for store in self.stores.values())

    def add(self, samples: BatchSamples, features: Mapping[str, Tensor], file: MappedFile | None) -> dict[str, str]:
        """Add a batch's features (rows, d) by layer; return, by layer, why something could not be added.

        A layer that is not among them leaves a gap: its rows of this batch will not be found.
        """
        problems: dict[str, str] = {}
        shared_before = self._shared.num_rows
        for name, value in features.items():
            keys = samples.row_keys(len(value))
            if keys is None:
                problems[name] = _UNKNOWN
                continue
            if name not in self.indices:
                self.indices[name] = self._shared if len(value) == len(samples) else SampleIndex()
            index = self.indices[name]
            if index is self._shared and len(value) != len(samples):
                problems[name] = f"it gave {len(value)} rows for {len(samples)} samples, and one for each before."
                continue
            try:
                self.stores[name].add(value, file)
            except ValueError as error:
                problems[name] = str(error)
                continue
            if index is not self._shared:
                index.add(keys)
        if any(index is self._shared for index in self.indices.values()):
            self._shared.add(samples.keys)
            self._by_content.add(samples.keys if samples.content is None else samples.content)
            for name, index in self.indices.items():
                if index is self._shared:
                    self.stores[name].skip_to(shared_before + len(samples))
        return problems

    def round_to(self, dtype: torch.dtype) -> None:
        """Keep the features in another type from now on."""
        for store in self.stores.values():
            store.round_to(dtype)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything, for a file: tensors by name, and what they are, JSON."""
        indices = {id(index): index for index in self.indices.values()}
        numbers = {key: number for number, key in enumerate(indices)}
        tensors = {f"keys.{numbers[key]}": index.keys for key, index in indices.items()}
        tensors["content"] = self._by_content.keys
        for layer, store in enumerate(self.stores.values()):
            tensors[f"pivot.{layer}"] = store.pivot
            tensors.update({f"offsets.{layer}.{number}": block for number, block in enumerate(store.blocks)})
        about = {
            "indices": {name: numbers[id(index)] for name, index in self.indices.items()},
            "shared": numbers.get(id(self._shared)),
            "num_blocks": [len(store.blocks) for store in self.stores.values()],
            "gaps": [store.gaps for store in self.stores.values()],
            "contents": self.contents,
        }
        return tensors, about

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Add what `tensors` has returned, after what is there."""
        for layer, (name, store) in enumerate(self.stores.items()):
            if name not in about["indices"]:
                continue
            number = about["indices"][name]
            if name not in self.indices:
                self.indices[name] = self._shared if number == about["shared"] else SampleIndex()
            blocks = [tensors[f"offsets.{layer}.{block}"] for block in range(about["num_blocks"][layer])]
            store.extend(blocks, tensors[f"pivot.{layer}"], about["gaps"][layer])
            if number != about["shared"]:
                self.indices[name].add(tensors[f"keys.{number}"])
        if about["shared"] is not None:
            self._shared.add(tensors[f"keys.{about['shared']}"])
            self._by_content.add(tensors["content"])
        self.contents.update(about["contents"])
        self.is_complete = True

    def find_keys(self, name: str, keys: Tensor) -> Tensor:
        """Return where a layer's rows are, (n,); `UNKNOWN` or `GAP` for those that were not recorded.

        Args:
            name: of the layer.
            keys: (n, 2), or (n, 4) with the keys by content beside them, for what the first ones do not find.
        """
        if name not in self.indices:
            return torch.full((len(keys),), UNKNOWN)
        positions = self.indices[name].find(keys[:, :2])
        if keys.shape[1] == 4 and self.indices[name] is self._shared:
            positions = torch.where(positions < 0, self._by_content.find(keys[:, 2:]), positions)
        return self.stores[name].mask_gaps(positions, GAP)

    def knows(self, samples: BatchSamples) -> bool:
        """Whether all of these samples are found by their keys alone."""
        return bool((self._shared.find(samples.keys) >= 0).all())

    def is_of(self, words: set[int]) -> bool:
        """Whether samples of the dataset, whose keys have these second words, were recorded."""
        keys = self._shared.keys
        return not words or not len(keys) or bool(torch.isin(keys[:, 1], torch.tensor(list(words))).any())


_UNKNOWN = (
    "which samples the batch holds can't be told: they have no indices, and hold something besides tensors, arrays, "
    "numbers and strings. Use a map-style dataset, or pass fixed batches as `probe=`."
)


class Recording:
    """The reference's features of every sample of every dataloader, of all layers.

    Args:
        layer_names: the layers.
        max_bytes: how much of it to hold in memory; what is beyond goes into a file without a name.
        dtype: of the features, as offsets from about their mean: "auto" is float64 as long as they are few, then
            float32, which changes a score by less than 1e-7; "bfloat16" where it does no harm.
        folder: where that file would be.
    """

    def __init__(self, layer_names: list[str], max_bytes: float, dtype: CacheDtype, folder: str | Path) -> None:
        self.layer_names = layer_names
        self.dtype: CacheDtype = dtype
        self.dataloaders: dict[Dataloader, RecordedDataloader] = {}
        # In bfloat16 only once it is known to do no harm.
        self._kept_in = torch.float32 if dtype == "bfloat16" else torch.float64
        self._max_bytes = max_bytes
        self._folder = Path(folder)
        self._file: MappedFile | None = None

    def start(self, dataloader: Dataloader) -> None:
        """Record this dataloader anew."""
        self.dataloaders[dataloader] = RecordedDataloader(self.layer_names, self._kept_in)

    def add(self, dataloader: Dataloader, samples: BatchSamples, features: Mapping[str, Tensor]) -> dict[str, str]:
        """Add a batch's features (rows, d) by layer; return, by layer, why something could not be added."""
        if self.dtype == "auto" and self._kept_in == torch.float64 and self.nbytes > _FLOAT64_BYTES:
            self._kept_in = torch.float32
            for recorded in self.dataloaders.values():
                recorded.round_to(torch.float32)
        if self._file is None and self.nbytes > self._max_bytes:
            self._file = self._open_file()
        return self.dataloaders[dataloader].add(samples, features, self._file)

    def _open_file(self) -> MappedFile | None:
        try:
            file = MappedFile(self._folder)
        except OSError as error:
            self._max_bytes = float("inf")
            rank_zero_warn(
                f"The recorded features take more than `cache_memory`, and no file could be made for them in "
                f"{str(self._folder)!r} ({error}): they stay in memory."
            )
            return None
        _log.debug("The recorded features take more than `cache_memory`: the rest goes into a file in %s", self._folder)
        return file

    @property
    def nbytes(self) -> int:
        """What all features take, in memory and in the file."""
        return sum(recorded.nbytes for recorded in self.dataloaders.values())

    @property
    def is_empty(self) -> bool:
        """Whether there was no pass that recorded; after one, this rank may have no rows, and others have."""
        return not self.dataloaders

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything, for a file: tensors by name, and what they are, JSON."""
        tensors: dict[str, Tensor] = {}
        described = []
        for number, (dataloader, recorded) in enumerate(self.dataloaders.items()):
            held, about = recorded.tensors()
            tensors.update({f"{number}.{name}": value for name, value in held.items()})
            described.append({"stage": dataloader.stage, "number": dataloader.number, **about})
        return tensors, {"layers": self.layer_names, "dtype": self.dtype, "dataloaders": described}

    def fits(self, notes: Mapping[str, Any]) -> bool:
        """Whether these notes are of a recording of the same layers."""
        return notes.get("layers") == self.layer_names

    def load(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Add what `tensors` has returned, of one rank or of several, one after the other."""
        for number, about in enumerate(notes["dataloaders"]):
            dataloader = Dataloader(about["stage"], about["number"])
            if dataloader not in self.dataloaders:
                self.start(dataloader)
            start = f"{number}."
            held = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
            self.dataloaders[dataloader].load(held, about)

    def load_outline(self, notes: Mapping[str, Any]) -> None:
        """Learn what was recorded, of which other ranks have all rows."""
        for about in notes["dataloaders"]:
            self.start(Dataloader(about["stage"], about["number"]))
            self.dataloaders[Dataloader(about["stage"], about["number"])].is_complete = True
