"""What the last frozen block returned for each sample, in memory or in a file: `ActivationStore`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_cka.reference.feature_store import MappedFile


class ActivationStore:
    """Rows of any shape, one for each sample, found again by a key of 16 bytes.

    Args:
        max_bytes: of memory; rows beyond that are not kept. A file takes all.
        folder: where to put a file without a name; None for memory.

    Attributes:
        nbytes: what the rows take.
        is_full: whether rows were left out.
    """

    def __init__(self, max_bytes: float, folder: Path | None = None) -> None:
        self._max_bytes = max_bytes
        self._file = None if folder is None else MappedFile(folder)
        self._blocks: list[Tensor] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self.nbytes, self.is_full = 0, False

    def __len__(self) -> int:
        return len(self._places)

    def num_known(self, keys: Sequence[bytes]) -> int:
        """Returns how many of the keys have a row."""
        return sum(key in self._places for key in keys)

    def add(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Keep the rows (n, ...) of keys that have none yet."""
        new = {key: index for index, key in enumerate(keys) if key not in self._places}
        if not new:
            return
        whole = len(new) == len(rows)
        kept = rows.detach() if whole else rows.detach()[list(new.values())]
        if self._file is None and self.nbytes + kept.nbytes > self._max_bytes:
            self.is_full = True
            return
        kept = kept.cpu().clone() if self._file is None else self._file.place(kept.cpu())
        self._places.update({key: (len(self._blocks), row) for row, key in enumerate(new)})
        self._blocks.append(kept)
        self.nbytes += kept.nbytes

    def rows(self, keys: Sequence[bytes], device: torch.device) -> Tensor | None:
        """Returns the rows (n, ...) of the keys; None if one of them has none, or they are of several shapes."""
        places = [self._places.get(key) for key in keys]
        found = [self._blocks[place[0]][place[1]] for place in places if place is not None]
        if len(found) < len(places) or len({row.shape for row in found}) != 1:
            return None
        return torch.stack(found).to(device)
