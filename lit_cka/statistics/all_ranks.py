"""The terms of CKA of the samples of all ranks, of many layers at once: `terms_of_all_ranks`.

For every layer, ranks agree on the widths, the mean and the way: moments are added up, or, where that is less, rows go
round in blocks, and each rank multiplies its share of every block with the rows it has. A collective serves all
layers, or as many as make up some MiB, and no rank holds more of what is another's than such a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.moments import PairedMoments, empty_moments, recentre_moments, without_yy
from lit_cka.functional.precision import float64_device
from lit_cka.functional.rows import Rows
from lit_cka.functional.sample_space import PairedRows, diagonal_sums, gram_sums, terms_from_sums, tile_rows
from lit_cka.functional.terms import terms_from_moments
from lit_cka.parallel.exchange import MAX_BYTES, Group, in_buckets
from lit_cka.statistics.agreement import Layer, agree_on_means, agreed_layers
from lit_cka.statistics.paired_samples import PairedSamples


def terms_of_all_ranks(samples: Mapping[str, PairedSamples], device: torch.device, group: Group) -> dict[str, Layer]:
    """Returns every layer with its terms. Each rank of the group has to call it, with the same layers in one order.

    Raises:
        ValueError: on all ranks, if some have features of other widths, or sums over the reference alone that others
            have not.
    """
    device = float64_device(device)
    layers = agreed_layers(samples, device, group)
    with_samples = [layer for layer in layers.values() if layer.n]
    agree_on_means(with_samples, group)
    _add_up_moments([layer for layer in with_samples if not layer.in_sample_space], device, group)
    _exchange_rows([layer for layer in with_samples if layer.in_sample_space], device, group)
    return layers


def _add_up_moments(layers: Sequence[Layer], device: torch.device, group: Group) -> None:
    sizes = [8 * (layer.d_x**2 + layer.d_x * layer.d_y + layer.d_y**2) for layer in layers]
    for some in in_buckets(layers, sizes):
        sums = iter(group.add_up([value for layer in some for value in _sums_about_mean(layer, device)]))
        for layer in some:
            n = torch.tensor(layer.n, dtype=torch.float64, device=device)
            fields = [next(sums) for _ in PairedMoments._fields[3:]]
            layer.terms = terms_from_moments(PairedMoments(n, layer.mean_x, layer.mean_y, *fields))


def _sums_about_mean(layer: Layer, device: torch.device) -> list[Tensor]:
    """Returns the fields of this rank's moments from `xx` on, measured from the mean of all ranks."""
    moments = layer.samples.moments(device, layer.exponents)
    if moments is None:
        moments = empty_moments(layer.d_x, layer.d_y, device)
        moments = moments if layer.samples.with_yy else without_yy(moments)
    if len(layer.counts) == 1:
        return list(moments[3:])  # about the mean of them all already
    return list(recentre_moments(moments, layer.mean_x, layer.mean_y)[3:])


def _exchange_rows(layers: Sequence[Layer], device: torch.device, group: Group) -> None:
    if not layers:
        return
    shares = [_Share(layer, group, device) for layer in layers]
    if group.size == 1:
        for share in shares:
            assert share.rows is not None
            share.multiply(share.rows, 0, 0)
    else:
        # Rounded as they are going to be multiplied.
        dtype = torch.float32 if all(layer.products == "float32" for layer in layers) else torch.float64
        pieces = [[piece for share in shares for piece in share.pieces(rank)] for rank in range(group.size)]
        exchange = group.exchange(pieces, _Piece.shapes, lambda piece: piece.read(dtype), dtype, device)
        for piece, (x, y) in exchange:
            piece.share.multiply(PairedRows(Rows([x]), Rows([y])), piece.rank, piece.start)
    (total,) = group.add_up([torch.stack([share.all_sums() for share in shares])])
    for layer, sums in zip(layers, total, strict=True):
        layer.terms = terms_from_sums(sums, layer.n)


class _Share:
    """What this rank computes of a layer's Gram matrices: its rows by those that come in."""

    def __init__(self, layer: Layer, group: Group, device: torch.device) -> None:
        self.layer = layer
        self.rank = group.rank
        self.row_bytes = 8 * (layer.d_x + layer.d_y)
        self.tile = tile_rows(device)
        if group.size > 1:
            self.tile = max(min(self.tile, MAX_BYTES // self.row_bytes), 1)  # since whole tiles are sent
        self.rows = _centred_rows(layer, device) if layer.counts[self.rank] else None
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def pieces(self, rank: int) -> list[_Piece]:
        """Returns all samples of a rank, in pieces of whole tiles that are small enough to be sent at once."""
        step, count = self.tile * max(MAX_BYTES // (self.tile * self.row_bytes), 1), self.layer.counts[rank]
        return [_Piece(self, rank, start, min(start + step, count)) for start in range(0, count, step)]

    def multiply(self, others: PairedRows, rank: int, start: int) -> None:
        """Add the products with others, which are the samples of `rank` from `start` on."""
        if self.rows is None:
            return
        first = [sum(-(-count // self.tile) for count in self.layer.counts[:each]) for each in (self.rank, rank)]
        self.sums += gram_sums(
            self.rows, others, self.tile, first[0], first[1] + start // self.tile,
            products=self.layer.products, with_yy=self.layer.samples.with_yy,
        )  # fmt: skip

    def all_sums(self) -> Tensor:
        """Returns the sums (10,) of `terms_from_sums` that are this rank's."""
        if self.rows is None:
            return torch.cat([self.sums, self.sums.new_zeros(7)])
        return torch.cat([self.sums, diagonal_sums(self.rows, self.layer.mean_x, self.layer.mean_y)])


class _Piece(NamedTuple):
    """Some of a rank's samples of a layer, from `start` to `stop`."""

    share: _Share
    rank: int
    start: int
    stop: int

    def shapes(self) -> list[tuple[int, int]]:
        return [(self.stop - self.start, width) for width in (self.share.layer.d_x, self.share.layer.d_y)]

    def read(self, dtype: torch.dtype) -> Iterator[Tensor]:
        assert self.share.rows is not None
        return (side.read(self.start, self.stop, dtype=dtype) for side in self.share.rows)


def _centred_rows(layer: Layer, device: torch.device) -> PairedRows:
    X, Y = layer.samples.rows(device)
    (i, j), mean_x, mean_y = layer.exponents, layer.mean_x, layer.mean_y
    return PairedRows(X.measured_from(mean_x * 2.0**i, 2.0**-i), Y.measured_from(mean_y * 2.0**j, 2.0**-j))
