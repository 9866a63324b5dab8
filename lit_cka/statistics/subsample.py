"""A fixed part of the samples of a pass, those of one rank: `Subsample`.

Samples are drawn by a hash of what they are: those with the smallest hashes. So whoever holds them, and in whatever
order they come, the same ones are drawn, at every evaluation of the same data.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZE = 256
NO_HASH = torch.iinfo(torch.int64).max


class BatchHashes:
    """Hashes (n,) of what a batch's samples are, from `sample_hashes`, for all layers.

    Layers that have seen the same samples draw the same ones, which are looked for once.
    """

    def __init__(self, hashes: Tensor) -> None:
        self.hashes = hashes
        self._below: dict[int, tuple[Tensor, Tensor]] = {}

    def below(self, limit: int) -> tuple[Tensor, Tensor]:
        """Returns the smaller ones (k,), and where they are (k,)."""
        if limit not in self._below:
            places = (self.hashes < limit).nonzero()[:, 0]
            self._below[limit] = self.hashes.index_select(0, places), places
        return self._below[limit]

    def of(self, chosen: Tensor) -> BatchHashes:
        """Returns those of some of the samples, chosen by a mask (n,)."""
        return BatchHashes(self.hashes[chosen])


class _Part(NamedTuple):
    hashes: Tensor  # (k,) on the CPU
    X: Tensor  # (k, d_x)
    Y: Tensor  # (k, d_y) measured from the origin
    origin: Tensor | None

    def at(self, hashes: Tensor, places: Tensor) -> _Part:
        """Returns the samples at these places, which have these hashes."""
        if places.shape == self.hashes.shape:
            return self
        X, Y = (rows.index_select(0, places.to(rows.device)) for rows in (self.X, self.Y))
        return _Part(hashes, X, Y, self.origin)

    def smallest(self, limit: int) -> _Part:
        """Returns the samples whose hashes are below the limit, in the order of these."""
        hashes, places = self.hashes.sort()
        count = int((hashes < limit).sum())
        return self.at(hashes[:count], places[:count])

    def kind(self) -> tuple[object, ...]:
        """Returns what parts have to have in common to be joined."""
        return id(self.origin), self.X.dtype, self.X.device, self.Y.dtype, self.Y.device


class Subsample:
    """The drawn samples of one layer, of those that this rank adds."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._parts: list[_Part] = []
        self._num_drawn = 0
        self._limit = NO_HASH  # the smallest hash that is too large
        self._num_added = 0

    def __len__(self) -> int:
        return self._num_drawn

    @property
    def widths(self) -> tuple[int, int]:
        """Of the features of both sides; 0 as long as there are none."""
        return (self._parts[0].X.shape[1], self._parts[0].Y.shape[1]) if self._parts else (0, 0)

    def add(self, hashes: BatchHashes | None, X: Tensor, Y: Tensor, origin: Tensor | None = None) -> None:
        """Draw from a batch's samples.

        Args:
            hashes: of what they are; None if that can't be told: then by when they came.
            X: (n, d_x) of the live model; must not be changed in place afterwards.
            Y: (n, d_y) of the reference.
            origin: (d_y,) that `Y` is measured from; None for 0.
        """
        if hashes is None:
            numbers = torch.arange(self._num_added, self._num_added + len(X))
            hashes = BatchHashes(sample_hashes(torch.stack([numbers, torch.zeros_like(numbers)], dim=1)))
        self._num_added += X.shape[0]
        drawn, places = hashes.below(self._limit)
        num_drawn = places.shape[0]
        if not num_drawn:
            return
        self._parts.append(_Part(hashes.hashes, X, Y, origin).at(drawn, places))
        self._num_drawn += num_drawn
        if self._num_drawn > 2 * self.size:
            self.prune()

    def prune(self) -> None:
        """Forget all samples but the drawn ones, and put these in the order of their hashes if they are of one kind."""
        if self._num_drawn > self.size:
            self._limit = int(self.hashes.kthvalue(self.size + 1).values)
            joined = [_joined(list(parts)) for _, parts in groupby(self._parts, _Part.kind)]
            parts = [part.smallest(self._limit) for part in joined]
            self._parts = [part for part in parts if len(part.hashes)]
            self._num_drawn = sum(len(part.hashes) for part in self._parts)

    @property
    def hashes(self) -> Tensor:
        """Of the drawn samples (k,), in the order of `rows`."""
        return torch.cat([part.hashes for part in self._parts]) if self._parts else torch.zeros(0, dtype=torch.int64)

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the features of the drawn samples, (k, d_x) and (k, d_y), in float64."""
        X = torch.cat([part.X.to(device).to(torch.float64) for part in self._parts])
        Y = [part.Y.to(device).to(torch.float64) for part in self._parts]
        origins = [0.0 if part.origin is None else part.origin.to(device) for part in self._parts]
        return X, torch.cat([rows + origin for rows, origin in zip(Y, origins, strict=True)])


def _joined(parts: list[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    hashes, X, Y = (torch.cat(tensors) for tensors in zip(*(part[:3] for part in parts), strict=True))
    return _Part(hashes, X, Y, parts[0].origin)


def sample_hashes(keys: Tensor) -> Tensor:
    """Returns hashes (n,) int64 of the first two words of keys (n, c), as good as random: the finaliser of splitmix64
    (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", fig. 16) over one word and then the other.
    """
    words = keys[:, :2].contiguous().numpy().view(np.uint64)
    mixed = _mixed(_mixed(words[:, 0] + np.uint64(0x9E3779B97F4A7C15)) ^ words[:, 1])
    return torch.from_numpy(mixed.view(np.int64))


def _mixed(words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
