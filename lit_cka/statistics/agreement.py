"""What ranks agree on before they add up: each layer's widths, how many samples there are, their mean, and the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.precision import Products, chosen_products
from lit_cka.functional.sample_space import cheaper_in_sample_space
from lit_cka.functional.terms import CKATerms
from lit_cka.parallel.exchange import Group
from lit_cka.statistics.paired_samples import PairedSamples, Summary


@dataclass
class Layer:
    """What the ranks have agreed on of one layer.

    Attributes:
        counts: how many samples each rank has.
        exponents: of the unit that means and terms are in, see `unit_exponent`.
        in_sample_space: whether the terms come from rows, not from moments.
        mean_x: of all samples; before `agree_on_means`, of this rank's.
        terms: of all samples; None if there are none.
    """

    samples: PairedSamples
    counts: list[int]
    d_x: int
    d_y: int
    exponents: tuple[int, int]
    in_sample_space: bool
    products: Products
    mean_x: Tensor
    mean_y: Tensor
    terms: CKATerms | None = None

    @property
    def n(self) -> int:
        return sum(self.counts)


class _Told(NamedTuple):
    """What ranks tell each other of a layer, in integers."""

    n: int
    d_x: int
    d_y: int
    exponent_x: int
    exponent_y: int
    with_yy: int
    in_float32: int


def agreed_layers(samples: Mapping[str, PairedSamples], device: torch.device, group: Group) -> dict[str, Layer]:
    """Returns what the ranks agree on of each layer, from one collective. Raises as `terms_of_all_ranks`."""
    summaries = [each.summary(device) for each in samples.values()]
    mine = [
        _Told(*summary[:5], each.with_yy, chosen_products(each.products, device) == "float32")
        for each, summary in zip(samples.values(), summaries, strict=True)
    ]
    of_ranks = zip(*group.gather_integers(mine, device), strict=True)
    return {
        name: _agreed_layer(name, each, summary, [_Told(*told) for told in of_layer])
        for (name, each), summary, of_layer in zip(samples.items(), summaries, of_ranks, strict=True)
    }


def _agreed_layer(name: str, samples: PairedSamples, summary: Summary, ranks: Sequence[_Told]) -> Layer:
    of_layer = f" of layer {name!r}" if name else ""
    widths = sorted({(rank.d_x, rank.d_y) for rank in ranks if rank.d_x or rank.d_y}) or [(0, 0)]
    if len(widths) > 1:
        raise ValueError(
            f"Expected the same numbers of features{of_layer} on all ranks, but got from {list(widths[0])} to "
            f"{list(widths[-1])}."
        )
    if len({rank.with_yy for rank in ranks}) > 1:
        raise ValueError(f"Expected `reference`{of_layer} on all ranks or on none, but only some have it.")
    (d_x, d_y), n = widths[0], sum(rank.n for rank in ranks)
    exponents = [(rank.exponent_x, rank.exponent_y) for rank in ranks if rank.n] or [(0, 0)]
    return Layer(
        samples,
        [rank.n for rank in ranks],
        d_x,
        d_y,
        (max(x for x, _ in exponents), max(y for _, y in exponents)),
        # Not where a rank is in moments already: as it has too many samples for rows, so have all together.
        cheaper_in_sample_space(n, d_x, d_y, with_yy=samples.with_yy),
        "float32" if any(rank.in_float32 for rank in ranks) else "float64",
        summary.mean_x if summary.d_x else summary.mean_x.new_zeros(d_x),
        summary.mean_y if summary.d_y else summary.mean_y.new_zeros(d_y),
    )


def agree_on_means(layers: Sequence[Layer], group: Group) -> None:
    """Put the mean of all samples in place of this rank's, in the unit of all."""
    for layer in layers:
        layer.mean_x, layer.mean_y = (
            mean * 2.0**-exponent for mean, exponent in zip((layer.mean_x, layer.mean_y), layer.exponents, strict=True)
        )
    if group.size == 1:
        return  # the mean itself, not its n-fold over n: constants stay exact
    sums = group.add_up([layer.counts[group.rank] * torch.cat([layer.mean_x, layer.mean_y]) for layer in layers])
    for layer, total in zip(layers, sums, strict=True):
        layer.mean_x, layer.mean_y = (total / layer.n).split([layer.d_x, layer.d_y])
