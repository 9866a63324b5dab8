"""The samples of one layer in one pass, on this rank: as rows, or as moments once that is less: `PairedSamples`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.moments import PairedMoments, add_samples, empty_moments, scaled_moments, without_yy
from lit_cka.functional.precision import Products, chosen_products, float64_device
from lit_cka.functional.rows import Rows
from lit_cka.functional.sample_space import cheaper_in_sample_space
from lit_cka.functional.units import unit_exponent

Batch = tuple[Tensor, Tensor]  # features of the live model and of the reference
# So many rows are added up at a time: their products then cost more than the sums.
_MIN_ROWS = 1024
# Rows stay in float64 as long as they are few. Rounding to float32 costs CKA 6e-8 of a single value over the root of
# their number: it costs least where it saves most.
_MIN_BYTES = 2**20
_FLOAT32_ROOM = 2.0**100  # so that neither the largest nor what is a millionth of them leaves float32


class Summary(NamedTuple):
    """What a rank tells of its samples: their number and widths, how large they are, and where."""

    n: int
    d_x: int  # 0 as long as it is not known
    d_y: int
    exponent_x: int  # see `unit_exponent`
    exponent_y: int
    mean_x: Tensor  # (d_x,), float64
    mean_y: Tensor  # (d_y,)


class PairedSamples:
    """Features of the live model and of the reference, of the same samples in the same order.

    Rows are kept as they came, but float64 ones, once there are more than a few, in float32 if that has all their
    digits, or else as offsets in float32 from the first sample. Since that is one of the n samples, it is at most the
    root of n times their spread away from their mean, and the offsets leave CKA eight digits. Where there are so many
    rows that moments are less, and take less to compute, they are added up, and so is all that comes then.

    Args:
        products: as for `add_samples`.
        with_yy: keep the sums over the reference alone too, see `paired_moments`.
    """

    def __init__(self, products: Products | None = None, *, with_yy: bool = True) -> None:
        chosen_products(products, torch.device("cpu"))  # or an error now, not in the middle of a pass
        self.products = products
        self.with_yy = with_yy
        self._new: list[Batch] = []  # as they came
        self._kept: list[Batch] = []  # larger blocks of them
        self._origins: list[tuple[Tensor | None, Tensor | None]] = []  # what these are measured from
        self._moments: PairedMoments | None = None
        self._exponents = (0, 0)  # of the unit that the moments are in
        self._widths: tuple[int, int] | None = None

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Add a batch's features, `X` (n, d_x) and `Y` (n, d_y). Raises a ValueError on other sizes than before."""
        widths = (X.shape[1], Y.shape[1])
        if len(X) != len(Y):
            raise ValueError(f"the live model gave features of {len(X)} samples, the reference of {len(Y)}.")
        if self._widths not in (None, widths):
            raise ValueError(f"its features and the reference's were {self._widths} wide before, and now are {widths}.")
        self._widths = widths
        if not len(X):
            return
        device = float64_device(X.device)
        self._new.append((_without_more(X.detach()).to(device), _without_more(Y.detach()).to(device)))
        num_new = sum(len(x) for x, _ in self._new)
        if self._moments is not None:
            if num_new >= _MIN_ROWS:
                self._add_up()
            return
        num_rows = num_new + sum(len(x) for x, _ in self._kept)
        if num_rows >= _MIN_ROWS and not cheaper_in_sample_space(num_rows, *widths, with_yy=self.with_yy):
            self._add_up()
        elif _num_bytes(self._new) >= max(_MIN_BYTES, _num_bytes(self._kept) // 8):
            self._keep()

    def _keep(self) -> None:
        """Join the new batches to one block, in float32 where that has room for it."""
        X, Y = (torch.cat(rows) for rows in zip(*self._new, strict=True))
        self._new = []
        first_x, first_y = next(iter(self._origins), (None, None))
        (x, origin_x), (y, origin_y) = _in_float32(X, first_x), _in_float32(Y, first_y)
        self._kept.append((x, y))
        self._origins.append((origin_x, origin_y))

    def rows(self, device: torch.device | None = None) -> tuple[Rows, Rows]:
        """Returns the rows of both sides, to be read to `device`. There must be some, and not in moments."""
        X, Y = zip(*self._kept, *self._new, strict=True)
        origins_x, origins_y = zip(*self._origins, *[(None, None)] * len(self._new), strict=True)
        return Rows(X, origins_x, device=device), Rows(Y, origins_y, device=device)

    def _add_up(self) -> None:
        X, Y = self.rows()
        if self._moments is None:
            self._exponents = unit_exponent(X.mean_and_size()[1]), unit_exponent(Y.mean_and_size()[1])
        self._moments = self._added(X, Y, self._exponents)
        self._new, self._kept, self._origins = [], [], []

    def _added(self, X: Rows, Y: Rows, exponents: tuple[int, int]) -> PairedMoments:
        moments = self._moments
        if moments is None:
            moments = empty_moments(X.width, Y.width, X.device)
            moments = moments if self.with_yy else without_yy(moments)
        scale_x, scale_y = (2.0**-exponent for exponent in exponents)
        for start in range(0, len(X), _MIN_ROWS):
            x, y = X.read(start, start + _MIN_ROWS), Y.read(start, start + _MIN_ROWS)
            moments = add_samples(moments, x.mul_(scale_x), y.mul_(scale_y), products=self.products)
        return moments

    def summary(self, device: torch.device) -> Summary:
        """Returns the summary of all samples so far, with the means on `device`."""
        if self._moments is not None and self._new:
            self._add_up()
        if self._moments is not None:
            mean_x = self._moments.mean_x.to(device) * 2.0 ** self._exponents[0]
            mean_y = self._moments.mean_y.to(device) * 2.0 ** self._exponents[1]
            return Summary(int(self._moments.n), len(mean_x), len(mean_y), *self._exponents, mean_x, mean_y)
        if not self._new and not self._kept:
            d_x, d_y = self._widths or (0, 0)
            mean_x, mean_y = torch.zeros(d_x + d_y, dtype=torch.float64, device=device).split([d_x, d_y])
            return Summary(0, d_x, d_y, 0, 0, mean_x, mean_y)
        X, Y = self.rows(device)
        (mean_x, size_x), (mean_y, size_y) = X.mean_and_size(), Y.mean_and_size()
        exponents = unit_exponent(size_x), unit_exponent(size_y)
        return Summary(len(X), X.width, Y.width, *exponents, mean_x, mean_y)

    def moments(self, device: torch.device, exponents: tuple[int, int]) -> PairedMoments | None:
        """Returns the moments of all samples that `summary` told of, in the unit of these exponents; None of none."""
        if self._moments is None and not self._new and not self._kept:
            return None
        if self._moments is None:
            return self._added(*self.rows(device), exponents)
        moments = PairedMoments(*(value.to(device) for value in self._moments))
        powers = [own - common for own, common in zip(self._exponents, exponents, strict=True)]
        return scaled_moments(moments, 2.0 ** powers[0], 2.0 ** powers[1]) if any(powers) else moments


def _in_float32(features: Tensor, origin: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the same features in float32 and what they are measured from; in float64 if they have no room there."""
    if features.dtype != torch.float64:
        return features, None
    if _has_float32_digits(features[:1]) and _has_float32_digits(features):  # the first sample tells most of the time
        return features.to(torch.float32), None
    origin = features[0] if origin is None else origin
    offsets = features - origin
    size = float(torch.stack(offsets.aminmax()).abs().amax())
    if math.isfinite(size) and not 1 / _FLOAT32_ROOM < size < _FLOAT32_ROOM:
        return features, None
    return offsets.to(torch.float32), origin


def _has_float32_digits(features: Tensor) -> bool:
    return torch.equal(features.to(torch.float32).to(torch.float64), features)


def _without_more(features: Tensor) -> Tensor:
    """Returns the features, not as a part of something larger that would be kept with them."""
    return features.clone() if features.untyped_storage().nbytes() > 2 * features.nbytes else features


def _num_bytes(batches: list[Batch]) -> int:
    return sum(x.nbytes + y.nbytes for x, y in batches)
