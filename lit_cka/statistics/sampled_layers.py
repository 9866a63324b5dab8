"""What the drawn samples of all ranks say of the errors of every layer's score: `jackknives_of_all_ranks`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.jackknife import MIN_SAMPLES, Jackknife, SampledGram, pair_jackknife, unit_gram
from lit_cka.functional.precision import float64_device
from lit_cka.functional.rankme import rankme_from_gram
from lit_cka.parallel.exchange import Group, in_buckets
from lit_cka.statistics.repeated import num_repeated
from lit_cka.statistics.subsample import NO_HASH, Subsample

_LAYERS_AT_ONCE = 8  # on an accelerator; a CPU's cache holds the matrices of one


class SampledLayer(NamedTuple):
    """What the drawn samples of all ranks say of one layer."""

    hashes: Tensor  # (m,) int64, in ascending order: which samples they are
    samples: Jackknife
    num_repeated: int  # of them, that have the reference's features of another one
    rank: float = math.nan  # how many directions they use in the live model: RankMe, about the mean


class _ReferenceGram(NamedTuple):
    sketches: tuple[Tensor, ...]  # of the rows that it is of, by layer
    gram: SampledGram  # of the layers' stack
    repeated: Tensor  # (layers,)


class ReferenceGrams:
    """Gram matrices of the reference's drawn samples, kept from one pass to the next: half of the work.

    Those of a recording are the same at every pass. Whether they are is seen from the features, of which a sketch is
    kept: their products (m,) with one vector of random numbers, which differ as soon as the features do by more than
    the products round. Where one is not finite, nothing is kept.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], _ReferenceGram] = {}

    def of(self, names: Sequence[str], Ys: Sequence[Tensor]) -> tuple[SampledGram, Tensor]:
        """Returns the Gram matrices of neighbouring layers, and the numbers (layers,) of repeated samples.

        Args:
            names: of the layers.
            Ys: their features, (m, d) each.
        """
        sketches = tuple(map(_sketch, Ys))
        known = self._known.get(tuple(names))
        if known is None or not all(map(_is_the_same, known.sketches, sketches)):
            Ls = _stacked([unit_gram(Y) for Y in Ys])
            known = self._known[tuple(names)] = _ReferenceGram(sketches, SampledGram(Ls), num_repeated(Ls))
        return known.gram, known.repeated


def _is_the_same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) and bool(one.isfinite().all())


def _sketch(Y: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return Y @ torch.randn(Y.shape[1], dtype=Y.dtype, generator=generator, device="cpu").to(Y.device)


def jackknives_of_all_ranks(
    subsamples: Mapping[str, Subsample],
    device: torch.device,
    group: Group,
    *,
    references: ReferenceGrams | None = None,
    with_ranks: bool = False,
) -> dict[str, SampledLayer]:
    """Returns what the drawn samples of all ranks say, by layer, of those layers that have enough of them.

    Every rank of the group has to call it, with the same layers in one order.

    Args:
        subsamples: of each layer.
        device: of the collectives, and where to compute.
        group: of the ranks.
        references: of earlier passes over the same dataloader, if there may be some; this one's are added.
        with_ranks: count the directions, too.
    """
    references = ReferenceGrams() if references is None else references
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
        rows = [_Rows(name, drawn[name].hashes, next(whole), next(whole)) for name in some]
        for together in _alike(rows, at_once):
            layers.update(_jackknives(together, references, with_ranks=with_ranks))
    return layers


class _Rows(NamedTuple):
    name: str
    hashes: Tensor  # (m,)
    X: Tensor  # (m, d_x) of the live model
    Y: Tensor  # (m, d_y) of the reference


class _Drawn(NamedTuple):
    hashes: Tensor  # (m,) of the drawn samples of all ranks, in ascending order
    places: Tensor  # (k,) of this rank's samples among them; -1 for those that are not
    widths: tuple[int, int]


def _draw(subsamples: Mapping[str, Subsample], device: torch.device, group: Group) -> dict[str, _Drawn]:
    """Returns which samples are drawn, by layer: from one collective for all."""
    size = max((each.size for each in subsamples.values()), default=0)
    mine = torch.full((len(subsamples), size + 2), NO_HASH)
    for row, each in zip(mine, subsamples.values(), strict=True):
        row[:2] = torch.tensor(each.widths)
        row[2 : 2 + len(each)] = each.hashes
    ranks = [rank.cpu() for rank in group.gather(mine.to(device))]
    layers = torch.stack(ranks, dim=1)
    widths: list[list[int]] = layers[:, :, :2].amax(dim=1).tolist()
    drawn: dict[str, _Drawn] = {}
    before: tuple[Tensor, Tensor, Tensor] | None = None  # the last layer's, which most have in common
    for (name, each), hashes, (d_x, d_y) in zip(subsamples.items(), layers[:, :, 2:].flatten(1), widths, strict=True):
        if before is None or not torch.equal(hashes, before[0]):
            before = hashes, *_in_order(hashes, each.size)
        first = group.rank * size
        drawn[name] = _Drawn(before[1], before[2][first : first + len(each)], (d_x, d_y))
    return drawn


def _in_order(hashes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns the smallest hashes in order, and where in it each one is: -1 if it is not."""
    # Ranks may number samples alike that are not known by what they are: the lower rank's is first.
    order = hashes.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    smallest = hashes[order[: min(int((hashes != NO_HASH).sum()), size)]]
    return smallest, places.masked_fill(places >= size, -1)


def _own_rows(subsample: Subsample, drawn: _Drawn, device: torch.device) -> list[Tensor]:
    """Returns the drawn samples' features (m, d_x) and (m, d_y) as far as this rank has them, zeros else."""
    num_drawn = drawn.hashes.shape[0]
    if num_drawn and torch.equal(drawn.places, torch.arange(num_drawn)):  # it has all, in order
        return list(subsample.rows(device))
    sides = [torch.zeros(num_drawn, width, dtype=torch.float64, device=device) for width in drawn.widths]
    chosen = (drawn.places >= 0).nonzero()[:, 0]
    if len(chosen):
        places, chosen = drawn.places[chosen].to(device), chosen.to(device)
        for side, rows in zip(sides, subsample.rows(device), strict=True):
            side[places] = rows.index_select(0, chosen)
    return sides


def _alike(layers: Sequence[_Rows], limit: int) -> Iterator[list[_Rows]]:
    """Yields neighbouring layers with as many samples, at most so many at a time."""
    for _, some in groupby(layers, key=lambda each: len(each.hashes)):
        together = list(some)
        for start in range(0, len(together), limit):
            yield together[start : start + limit]


def _stacked(grams: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(grams)) if len(grams) > 1 else grams[0][None]


def _jackknives(layers: Sequence[_Rows], references: ReferenceGrams, *, with_ranks: bool) -> dict[str, SampledLayer]:
    reference, repeated = references.of([each.name for each in layers], [each.Y for each in layers])
    Ks = _stacked([unit_gram(each.X) for each in layers])
    fields = (field.cpu() for field in pair_jackknife(SampledGram(Ks), reference))
    samples = [Jackknife(*values) for values in zip(*fields, strict=True)]
    ranks = [rankme_from_gram(K) if with_ranks else math.nan for K in Ks]
    return {
        each.name: SampledLayer(each.hashes, *values)
        for each, *values in zip(layers, samples, repeated.tolist(), ranks, strict=True)
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
