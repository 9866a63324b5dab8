"""A fixed part of the samples of a pass, the same on any number of ranks: `Subsample`, `jackknives_of_all_ranks`.

Samples are drawn by a hash of what they are: those with the smallest hashes. So whoever holds them, and in whatever
order they come, the same ones are drawn, at every evaluation of the same data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.jackknife import MIN_SAMPLES, Jackknife, jackknife_cka, unit_gram
from lit_cka.functional.precision import float64_device
from lit_cka.functional.rankme import rankme_from_gram
from lit_cka.parallel.exchange import Group, in_buckets
from lit_cka.statistics.repeated import num_repeated

SIZE = 256
_LAYERS_AT_ONCE = 8  # on an accelerator; a CPU's cache holds the matrices of one
_NONE = torch.iinfo(torch.int64).max


class SampledLayer(NamedTuple):
    """What the drawn samples of all ranks say of one layer."""

    hashes: Tensor  # (m,) int64, in ascending order: which samples they are
    samples: Jackknife
    num_repeated: int  # of them, that have the reference's features of another one
    rank: float = math.nan  # how many directions they use in the live model: RankMe, about the mean


class _Part(NamedTuple):
    hashes: Tensor  # (k,) on the CPU
    X: Tensor  # (k, d_x)
    Y: Tensor  # (k, d_y) measured from the origin
    origin: Tensor | None

    def where(self, chosen: Tensor) -> _Part:
        if bool(chosen.all()):
            return self
        places = chosen.nonzero()[:, 0]
        return _Part(
            self.hashes[places], self.X[places.to(self.X.device)], self.Y[places.to(self.Y.device)], self.origin
        )


class Subsample:
    """The drawn samples of one layer, of those that this rank adds."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._parts: list[_Part] = []
        self._limit = _NONE  # the smallest hash that is too large
        self._num_added = 0

    def __len__(self) -> int:
        return sum(len(part.hashes) for part in self._parts)

    @property
    def widths(self) -> tuple[int, int]:
        """Of the features of both sides; 0 as long as there are none."""
        return (self._parts[0].X.shape[1], self._parts[0].Y.shape[1]) if self._parts else (0, 0)

    def add(self, hashes: Tensor | None, X: Tensor, Y: Tensor, origin: Tensor | None = None) -> None:
        """Draw from a batch's samples.

        Args:
            hashes: (n,) of what they are, from `sample_hashes`; None if that can't be told: then by when they came.
            X: (n, d_x) of the live model; must not be changed in place afterwards.
            Y: (n, d_y) of the reference.
            origin: (d_y,) that `Y` is measured from; None for 0.
        """
        if hashes is None:
            numbers = torch.arange(self._num_added, self._num_added + len(X))
            hashes = sample_hashes(torch.stack([numbers, torch.zeros_like(numbers)], dim=1))
        self._num_added += len(X)
        chosen = hashes < self._limit
        if not bool(chosen.any()):
            return
        self._parts.append(_Part(hashes, X, Y, origin).where(chosen))
        if len(self) > 2 * self.size:
            self.prune()

    def prune(self) -> None:
        """Forget all samples but the drawn ones."""
        if len(self) > self.size:
            hashes = torch.cat([part.hashes for part in self._parts])
            self._limit = int(hashes.kthvalue(self.size + 1).values)
            parts = [part.where(part.hashes < self._limit) for part in self._parts]
            self._parts = [part for part in parts if len(part.hashes)]

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


def jackknives_of_all_ranks(
    subsamples: Mapping[str, Subsample], device: torch.device, group: Group, *, with_ranks: bool = False
) -> dict[str, SampledLayer]:
    """Returns what the drawn samples of all ranks say, by layer, of those layers that have enough of them.

    Every rank of the group has to call it, with the same layers in one order.

    Args:
        subsamples: of each layer.
        device: of the collectives, and where to compute.
        group: of the ranks.
        with_ranks: count the directions, too.
    """
    device = float64_device(device)
    at_once = 1 if device.type == "cpu" else _LAYERS_AT_ONCE
    for each in subsamples.values():
        each.prune()
    drawn = _draw(subsamples, device, group)
    chosen = [name for name in subsamples if len(drawn[name].hashes) >= MIN_SAMPLES]
    layers: dict[str, SampledLayer] = {}
    for some in in_buckets(chosen, [8 * len(drawn[name].hashes) * sum(drawn[name].widths) for name in chosen]):
        sides = [side for name in some for side in _own_rows(subsamples[name], drawn[name], device)]
        whole = iter(group.add_up(sides))
        grams = [_Grams(name, drawn[name].hashes, unit_gram(next(whole)), unit_gram(next(whole))) for name in some]
        for together in _alike(grams, at_once):
            layers.update(_jackknives(together, with_ranks=with_ranks))
    return layers


class _Grams(NamedTuple):
    name: str
    hashes: Tensor  # (m,)
    K: Tensor  # (m, m) of the live model
    L: Tensor  # (m, m) of the reference


class _Drawn(NamedTuple):
    hashes: Tensor  # (m,) of the drawn samples of all ranks, in ascending order
    places: Tensor  # (k,) of this rank's samples among them; -1 for those that are not
    widths: tuple[int, int]


def _draw(subsamples: Mapping[str, Subsample], device: torch.device, group: Group) -> dict[str, _Drawn]:
    """Returns which samples are drawn, by layer: from one collective for all."""
    size = max((each.size for each in subsamples.values()), default=0)
    mine = torch.full((len(subsamples), size + 2), _NONE)
    for row, each in zip(mine, subsamples.values(), strict=True):
        row[:2] = torch.tensor(each.widths)
        row[2 : 2 + len(each)] = each.hashes
    ranks = [rank.cpu() for rank in group.gather(mine.to(device))]
    drawn = {}
    for number, (name, each) in enumerate(subsamples.items()):
        hashes = torch.cat([rank[number, 2:] for rank in ranks])
        is_there = hashes != _NONE
        # Ranks may number samples alike that are not known by what they are: the lower rank's is first.
        order = hashes.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        first = group.rank * size
        own = places[first : first + len(each)]
        d_x, d_y = (max(int(rank[number, side]) for rank in ranks) for side in (0, 1))
        num_drawn = min(int(is_there.sum()), each.size)
        drawn[name] = _Drawn(hashes[order][:num_drawn], own.masked_fill(own >= each.size, -1), (d_x, d_y))
    return drawn


def _own_rows(subsample: Subsample, drawn: _Drawn, device: torch.device) -> list[Tensor]:
    """Returns the drawn samples' features (m, d_x) and (m, d_y) as far as this rank has them, zeros else."""
    sides = [torch.zeros(len(drawn.hashes), width, dtype=torch.float64, device=device) for width in drawn.widths]
    chosen = drawn.places >= 0
    if bool(chosen.any()):
        places, chosen = drawn.places[chosen].to(device), chosen.to(device)
        for side, rows in zip(sides, subsample.rows(device), strict=True):
            side[places] = rows[chosen]
    return sides


def _alike(layers: Sequence[_Grams], limit: int) -> Iterator[list[_Grams]]:
    """Yields neighbouring layers with as many samples, at most so many at a time."""
    for _, some in groupby(layers, key=lambda each: len(each.hashes)):
        together = list(some)
        for start in range(0, len(together), limit):
            yield together[start : start + limit]


def _jackknives(layers: Sequence[_Grams], *, with_ranks: bool) -> dict[str, SampledLayer]:
    Ks, Ls = torch.stack([each.K for each in layers]), torch.stack([each.L for each in layers])
    fields = (field.cpu() for field in jackknife_cka(Ks, Ls))
    samples = [Jackknife(*values) for values in zip(*fields, strict=True)]
    repeated = num_repeated(Ls).tolist()
    ranks = [rankme_from_gram(each.K) if with_ranks else math.nan for each in layers]
    return {
        each.name: SampledLayer(each.hashes, *values)
        for each, *values in zip(layers, samples, repeated, ranks, strict=True)
    }


def jackknives_of_first_rank(layers: Mapping[str, SampledLayer], device: torch.device) -> dict[str, SampledLayer]:
    """Returns those that the first process of all has; each of them has to call this, with the same layers."""
    device = float64_device(device)
    told = {}
    for name, layer in layers.items():
        without, *others = layer.samples.without, *(layer.samples[index] for index in (0, 2, 3))
        values = torch.cat([without, torch.stack(others)]).to(device)
        dist.broadcast(values, 0)
        *parts, value, pairs, concentration = values.cpu().split([len(without), 1, 1, 1])
        samples = Jackknife(value[0], parts[0], pairs[0], concentration[0])
        told[name] = layer._replace(samples=samples)
    return told
