"""What the reference returned for every batch of fixed data, so that it runs once: `ReferenceCache`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

CacheDtype = Literal["float64", "bfloat16"]


class Batch(NamedTuple):
    """Which batch: of which dataloader of which stage, and its index there."""

    stage: str
    dataloader: int
    batch_idx: int

    @property
    def loader(self) -> tuple[str, int]:
        return self.stage, self.dataloader


class _Stored(NamedTuple):
    """Features as `mean + offsets`, the offsets perhaps rounded: of their spread then, not of their mean."""

    offsets: Tensor  # (n, d)
    mean: Tensor | None  # (d,); None if the offsets are the features

    @property
    def num_bytes(self) -> int:
        return self.offsets.nbytes + (0 if self.mean is None else self.mean.nbytes)


class ReferenceCache:
    """Features of the reference, in CPU memory, by batch and by the module that was called with the inputs.

    What was kept is found again only for inputs of the same fingerprint. Where a batch has other inputs than before,
    the dataloader shuffles or augments: none of its batches is kept from then on, with one warning.

    Args:
        max_bytes: how much to keep; for what is beyond, the reference runs again, with one warning. 0 keeps nothing.
        dtype: "float64" keeps the features as they are; "bfloat16" rounds them to 8 bits, each batch about its mean,
            in a quarter of the memory.
    """

    def __init__(self, max_bytes: float, dtype: CacheDtype = "float64") -> None:
        self.max_bytes = max_bytes
        self.dtype = dtype
        self._features: dict[Batch, dict[str, tuple[Hashable, dict[str, _Stored]]]] = {}  # by batch and call
        self._changing: set[tuple[str, int]] = set()
        self._num_bytes = 0
        self._full = False

    def find(self, batch: Batch, call: str, mark: Hashable | None, device: torch.device) -> dict[str, Tensor] | None:
        """The features by layer that were kept for this call, if its inputs had the same fingerprint `mark`."""
        kept = self._features.get(batch, {}).get(call)
        if kept is None or batch.loader in self._changing:
            return None
        if kept[0] != mark:
            self.give_up(
                batch,
                f"Batch {batch.batch_idx} of {batch.stage} dataloader {batch.dataloader} is not what it was in an "
                "earlier pass (shuffled, augmented, or in another precision)",
            )
            return None
        return {name: _features(stored, device) for name, stored in kept[1].items()}

    def give_up(self, batch: Batch, reason: str) -> None:
        """Keep nothing more of the batch's dataloader."""
        if batch.loader not in self._changing:
            self._changing.add(batch.loader)
            rank_zero_warn(
                f"{reason}: the reference runs again each time. The numbers are right all the same, but tracking is "
                "nearly free only where data and model are fixed in evaluation."
            )

    def keep(self, batch: Batch, call: str, mark: Hashable | None, features: dict[str, Tensor]) -> None:
        """Keep the features by layer of this call, if there is room."""
        is_kept = call in self._features.get(batch, {})
        if mark is None or not self.max_bytes or batch.loader in self._changing or is_kept:
            return
        stored = {name: self._store(value) for name, value in features.items()}
        num_bytes = sum(value.num_bytes for value in stored.values())
        if self._num_bytes + num_bytes > self.max_bytes:
            if not self._full:
                self._full = True
                rank_zero_warn(
                    f"The reference's features take more than the {self.max_bytes / 2**30:.3g} GiB of `cache_memory`: "
                    "for the batches beyond, the reference runs again in every validation. Raise `cache_memory`, or "
                    'take cache_dtype="bfloat16", fewer `layers`, or `max_batches`.'
                )
            return
        self._num_bytes += num_bytes
        self._features.setdefault(batch, {})[call] = (mark, stored)

    @property
    def rounds(self) -> bool:
        """Whether features that come back may differ from those that were kept."""
        return bool(self.max_bytes) and self.dtype != "float64"

    def has(self, batch: Batch) -> bool:
        """Whether anything is kept for this batch that can be found again."""
        return batch in self._features and batch.loader not in self._changing

    def recall(self, batch: Batch, layer: str, device: torch.device) -> Tensor | None:
        """The features (n, d) kept for this layer and batch, whatever the inputs are now; None if there are none."""
        for _, stored in self._features.get(batch, {}).values():
            if layer in stored:
                return _features(stored[layer], device)
        return None

    def forget(self, stage: str, dataloader: int) -> None:
        """Drop what was kept for this dataloader."""
        for batch in [batch for batch in self._features if batch.loader == (stage, dataloader)]:
            for _, stored in self._features.pop(batch).values():
                self._num_bytes -= sum(value.num_bytes for value in stored.values())

    def forget_changing(self) -> None:
        """Drop what was kept for dataloaders whose batches have changed."""
        for stage, dataloader in self._changing:
            self.forget(stage, dataloader)

    def stop_rounding(self) -> None:
        """Drop everything, and keep features as they are from now on."""
        self._features.clear()
        self._num_bytes = 0
        self.dtype = "float64"

    def _store(self, features: Tensor) -> _Stored:
        if self.dtype == "float64":
            return _Stored(features.cpu(), None)
        mean = features.mean(dim=0) if len(features) else features.new_zeros(features.shape[1])
        return _Stored((features - mean).to(torch.bfloat16).cpu(), mean.cpu())


def _features(stored: _Stored, device: torch.device) -> Tensor:
    if stored.mean is None:
        return stored.offsets.to(device)
    return stored.offsets.to(device, torch.float64) + stored.mean.to(device)
