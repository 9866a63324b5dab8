"""Where the rows of samples are, by their keys: `SampleIndex`."""

from __future__ import annotations

import torch
from torch import Tensor

UNKNOWN = -1  # the position of a sample that was not recorded


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
