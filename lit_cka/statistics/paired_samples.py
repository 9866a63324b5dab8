"""The samples of one layer in one pass, on this rank: as rows, or as moments once that is less: `PairedSamples`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.moments import PairedMoments, add_samples, empty_moments, scaled_moments, without_yy
from lit_cka.functional.precision import Products, chosen_products
from lit_cka.functional.rows import Rows
from lit_cka.functional.sample_space import cheaper_in_sample_space
from lit_cka.functional.units import exponents_of, unit_exponent
from lit_cka.statistics.kept_rows import MIN_BYTES, KeptRows

_MIN_ROWS = 512  # to be added up at a time, if there are more


class Summary(NamedTuple):
    """What a rank tells of its samples: their number and widths, how large they are, and where."""

    n: int
    d_x: int  # 0 as long as it is not known
    d_y: int
    exponent_x: int  # see `unit_exponent`
    exponent_y: int
    mean_x: Tensor  # (d_x,), float64
    mean_y: Tensor  # (d_y,)


class _Moments(NamedTuple):
    """Moments, and the exponents of the unit that they are in."""

    of_rows: PairedMoments
    exponents: tuple[int, int]


class PairedSamples:
    """Features of the live model and of the reference, of the same samples in the same order.

    They are kept as rows (see `KeptRows`). Where there are so many that moments are less, and take less to compute,
    they are added up, and so is all that comes then.

    Args:
        products: as for `add_samples`.
        with_yy: keep the sums over the reference alone too, see `paired_moments`.
    """

    def __init__(self, products: Products | None = None, *, with_yy: bool = True) -> None:
        chosen_products(products, torch.device("cpu"))  # or an error now, not in the middle of a pass
        self.products = products
        self.with_yy = with_yy
        self._X, self._Y = KeptRows(), KeptRows()
        self._moments: _Moments | None = None  # of what is no longer kept as rows
        self._scored: _Moments | None = None  # of rows that are kept as well, until more come
        self._widths: tuple[int, int] | None = None

    def add(self, X: Tensor, Y: Tensor, origin: Tensor | None = None) -> None:
        """Add a batch's features, `X` (n, d_x) and `Y` (n, d_y), of which `Y` are measured from the `origin` (d_y,) if
        there is one. Raises a ValueError on other sizes than before.
        """
        (n, d_x), (m, d_y) = X.shape, Y.shape
        if n != m:
            raise ValueError(f"the live model gave features of {n} samples, the reference of {m}.")
        if self._widths not in (None, (d_x, d_y)):
            raise ValueError(
                f"its features and the reference's were {self._widths} wide before, and now are {(d_x, d_y)}."
            )
        self._widths = (d_x, d_y)
        if not n:
            return
        self._X.add(X)
        self._Y.add(Y, origin)
        self._scored = None
        if len(self._X) >= self._num_at_once and (self._moments is not None or not self._are_less()):
            self._add_up()

    def _add_up(self) -> None:
        self._moments = self._added_up()
        self._X, self._Y = KeptRows(), KeptRows()

    def _are_less(self) -> bool:
        """Returns whether the rows there are take less than moments."""
        return cheaper_in_sample_space(len(self._X), *self._widths or (0, 0), with_yy=self.with_yy)

    def rows(self, device: torch.device | None = None) -> tuple[Rows, Rows]:
        """Returns the rows of both sides, to be read to `device`. There must be some, and not in moments."""
        return self._X.read(device), self._Y.read(device)

    def _added_up(self) -> _Moments:
        """Returns the moments of all samples, and in which unit they are."""
        moments = self._moments
        for x, y in self._read():
            exponents = (int(exponents_of(x)), int(exponents_of(y))) if moments is None else moments.exponents
            moments = _Moments(self._added(None if moments is None else moments.of_rows, x, y, exponents), exponents)
        assert moments is not None
        return moments

    def _read(self, device: torch.device | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all rows that are not in moments, some at a time, in new tensors of float64."""
        if not len(self._X):
            return
        X, Y = self.rows(device)
        step = self._num_at_once
        for start in range(0, len(X), step):
            yield X.read(start, start + step), Y.read(start, start + step)

    @property
    def _num_at_once(self) -> int:
        """How many rows are added up at a time: so many that their products cost more than the sums."""
        d_x, d_y = self._widths or (0, 0)
        return max(_MIN_ROWS, MIN_BYTES // (8 * max(d_x, d_y, 1)))

    def _added(self, moments: PairedMoments | None, x: Tensor, y: Tensor, exponents: tuple[int, int]) -> PairedMoments:
        """Returns the moments with these rows, which are overwritten, in the unit of the exponents."""
        if moments is None:
            moments = empty_moments(x.shape[1], y.shape[1], x.device)
            moments = moments if self.with_yy else without_yy(moments)
        x, y = (rows.mul_(2.0**-power) if power else rows for rows, power in zip((x, y), exponents, strict=True))
        return add_samples(moments, x, y, products=self.products, overwrite=True)

    def summary(self, device: torch.device) -> Summary:
        """Returns the summary of all samples so far, with the means on `device`."""
        if len(self._X) and self._moments is not None:
            self._add_up()
        elif len(self._X) and not self._are_less():
            self._scored = self._added_up()  # and the rows stay, which are few: what comes is multiplied with them
        known = self._scored or self._moments
        if known is not None:
            mean_x, mean_y = known.of_rows.mean_x.to(device), known.of_rows.mean_y.to(device)
            i, j = known.exponents
            return Summary(int(known.of_rows.n), len(mean_x), len(mean_y), i, j, mean_x * 2.0**i, mean_y * 2.0**j)
        if not len(self._X):
            d_x, d_y = self._widths or (0, 0)
            mean_x, mean_y = torch.zeros(d_x + d_y, dtype=torch.float64, device=device).split([d_x, d_y])
            return Summary(0, d_x, d_y, 0, 0, mean_x, mean_y)
        X, Y = self.rows(device)
        (mean_x, size_x), (mean_y, size_y) = X.mean_and_size(), Y.mean_and_size()
        exponents = unit_exponent(size_x), unit_exponent(size_y)
        return Summary(len(X), X.width, Y.width, *exponents, mean_x, mean_y)

    def moments(self, device: torch.device, exponents: tuple[int, int]) -> PairedMoments | None:
        """Returns the moments of all samples that `summary` told of, in the unit of these exponents; None of none."""
        known = self._scored or self._moments
        if known is not None:
            moments = PairedMoments(*(value.to(device) for value in known.of_rows))
            powers = [own - common for own, common in zip(known.exponents, exponents, strict=True)]
            return scaled_moments(moments, 2.0 ** powers[0], 2.0 ** powers[1]) if any(powers) else moments
        added = None
        for x, y in self._read(device):
            added = self._added(added, x, y, exponents)
        return added
