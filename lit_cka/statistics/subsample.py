"""A fixed part of the samples of a pass, the same on any number of ranks: `Subsample`, `jackknives_of_all_ranks`.

Samples are drawn by a hash of what they are: those with the smallest hashes. So whoever holds them, and in whatever
order they come, the same ones are drawn, at every evaluation of the same data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.jackknife import MIN_SAMPLES, Jackknife, jackknife_cka, unit_gram
from lit_cka.functional.precision import float64_device
from lit_cka.functional.rankme import rankme_from_gram
from lit_cka.parallel.exchange import Group

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
    layers: dict[str, SampledLayer] = {}
    waiting: list[tuple[str, Tensor, Tensor, Tensor]] = []
    for name, subsample in subsamples.items():
        hashes, places, widths = drawn[name]
        if len(hashes) < MIN_SAMPLES:
            continue
        if waiting and (len(waiting) == at_once or len(waiting[0][1]) != len(hashes)):
            layers.update(_jackknives(waiting, with_ranks=with_ranks))
            waiting = []
        X, Y = _all_rows(subsample, places, len(hashes), widths, device, group)
        waiting.append((name, hashes, unit_gram(X), unit_gram(Y)))
    layers.update(_jackknives(waiting, with_ranks=with_ranks))
    return layers


class _Drawn(NamedTuple):
    hashes: Tensor  # (m,) of the drawn samples of all ranks, in ascending order
    places: Tensor  # (k,) of this rank's samples among them; -1 for those that are not
    widths: tuple[int, int]


def _draw(subsamples: Mapping[str, Subsample], device: torch.device, group: Group) -> dict[str, _Drawn]:
    mine = [[len(each), *each.widths] for each in subsamples.values()]
    told = group.gather_integers(mine, device)
    size = max((numbers[0] for rank in told for numbers in rank), default=0)
    padded = torch.full((len(subsamples), size), _NONE)
    for row, each in zip(padded, subsamples.values(), strict=True):
        row[: len(each)] = each.hashes
    all_hashes = group.gather(padded.to(device))
    drawn = {}
    for number, (name, each) in enumerate(subsamples.items()):
        hashes = torch.cat(
            [rank[number, : counts[number][0]].cpu() for rank, counts in zip(all_hashes, told, strict=True)]
        )
        # Ranks may number samples alike that are not known by what they are: the lower rank's is first.
        order = hashes.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        first = sum(counts[number][0] for counts in told[: group.rank])
        own = places[first : first + len(each)]
        widths = max(counts[number][1] for counts in told), max(counts[number][2] for counts in told)
        drawn[name] = _Drawn(hashes[order][: each.size], own.masked_fill(own >= each.size, -1), widths)
    return drawn


def _all_rows(
    subsample: Subsample, places: Tensor, m: int, widths: tuple[int, int], device: torch.device, group: Group
) -> list[Tensor]:
    """Returns the drawn samples' features (m, d_x) and (m, d_y), of all ranks."""
    sides = [torch.zeros(m, width, dtype=torch.float64, device=device) for width in widths]
    chosen = places >= 0
    if bool(chosen.any()):
        places, chosen = places[chosen].to(device), chosen.to(device)
        for side, rows in zip(sides, subsample.rows(device), strict=True):
            side[places] = rows[chosen]
    return group.add_up(sides)


def _jackknives(layers: Sequence[tuple[str, Tensor, Tensor, Tensor]], *, with_ranks: bool) -> dict[str, SampledLayer]:
    if not layers:
        return {}
    Ks, Ls = torch.stack([K for _, _, K, _ in layers]), torch.stack([L for *_, L in layers])
    fields = jackknife_cka(Ks, Ls)
    repeated = _num_repeated(Ls).tolist()
    each = [Jackknife(*values) for values in zip(*(field.cpu() for field in fields), strict=True)]
    return {
        name: SampledLayer(hashes, samples, number, rankme_from_gram(K) if with_ranks else math.nan)
        for (name, hashes, K, _), samples, number in zip(layers, each, repeated, strict=True)
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


def _num_repeated(K: Tensor) -> Tensor:
    """Returns how many samples (...) have the features of an earlier one, from Gram matrices (..., m, m)."""
    diagonal = K.diagonal(dim1=-2, dim2=-1)
    distances = diagonal[..., :, None] + diagonal[..., None, :] - 2 * K
    same = distances <= _SAME * diagonal.mean(-1)[..., None, None]
    return same.tril(-1).any(-1).sum(-1)


_SAME = 1e-10  # a squared distance, next to the mean one from the centre: what rounding in float32 leaves of 0
