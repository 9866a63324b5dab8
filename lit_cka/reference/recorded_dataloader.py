"""What the reference returned for every sample of a dataloader, kept by what the sample is: `RecordedDataloader`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_cka.reference.feature_store import FeatureStore, MappedFile
from lit_cka.reference.sample_index import UNKNOWN, SampleIndex
from lit_cka.samples.sample_keys import BatchSamples

GAP = -2  # the position of a row that a layer did not give


class RecordedBatch(NamedTuple):
    """What a batch was: a hash of all that it held, "" if that was not told, and what the step passed to the model."""

    content: str
    passed: str


class RecordedDataloader:
    """What was recorded of one dataloader: by layer the features of every row, and the rows by key.

    Most layers have a row for each sample, and share an index. A layer with more (several crops of an image) has one
    of its own.

    Attributes:
        stores: features by layer.
        batches: what they were, by `BatchSamples.batch_key`, to find out whether the data are still the same.
        is_complete: whether the pass that recorded it has come to its end.
    """

    def __init__(self, layer_names: list[str], dtype: torch.dtype) -> None:
        self.stores = {name: FeatureStore(dtype) for name in layer_names}
        self.batches: dict[str, RecordedBatch] = {}
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
            "batches": self.batches,
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
        self.batches.update({key: RecordedBatch(*batch) for key, batch in about["batches"].items()})
        self.is_complete = True

    def find_keys(self, name: str, keys: Tensor) -> Tensor:
        """Return where a layer's rows are, (n,); `UNKNOWN` or `GAP` for those that were not recorded.

        Args:
            name: of the layer.
            keys: (n, 2), or (n, 4) with the keys by content beside them, for what the first ones do not find.
        """
        positions = self.find(self.indices.get(name), keys)
        return self.stores[name].mask_gaps(positions, GAP) if name in self.indices else positions

    def find(self, index: SampleIndex | None, keys: Tensor) -> Tensor:
        """Return where rows are in all layers that have this index, but for their gaps; see `find_keys`."""
        if index is None:
            return torch.full((len(keys),), UNKNOWN)
        positions = index.find(keys[:, :2])
        if keys.shape[1] == 4 and index is self._shared:
            positions = torch.where(positions < 0, self._by_content.find(keys[:, 2:]), positions)
        return positions

    def pairs_of(self, samples: BatchSamples, features: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return features of a batch, and what was recorded of the same samples, by layer, of those that were.

        Args:
            samples: of the batch.
            features: by layer, (rows, d).
        """
        pairs = {}
        for name, value in features.items():
            keys = samples.row_keys(len(value))
            if keys is not None:
                positions = self.find_keys(name, keys)
                found = positions >= 0
                rows = self.stores[name].rows(positions[found], value.device)
                pairs[name] = value[found.to(value.device)], rows
        return pairs

    def note_content(self, samples: BatchSamples) -> None:
        """Note what a batch holds."""
        self.batches[samples.batch_key()] = RecordedBatch(samples.content_key(), "")

    def has(self, samples: BatchSamples) -> bool:
        """Whether this very batch was recorded."""
        return samples.batch_key() in self.batches

    def note_passed(self, samples: BatchSamples, passed: str) -> None:
        """Note what the step passes to the model for a batch."""
        key = samples.batch_key()
        self.batches[key] = self.batches.get(key, RecordedBatch("", ""))._replace(passed=passed)

    def has_other_content(self, samples: BatchSamples) -> bool:
        """Whether it is known of this batch that it held something else."""
        known = self.batches.get(samples.batch_key())
        return known is not None and known.content not in ("", samples.content_key())

    def was_passed_otherwise(self, samples: BatchSamples, passed: str) -> bool:
        """Whether it is known of this batch that the step passed something else to the model."""
        known = self.batches.get(samples.batch_key())
        return known is not None and known.passed != passed

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
