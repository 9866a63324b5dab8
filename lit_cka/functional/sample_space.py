"""Linear CKA through the samples' Gram matrices, tile by tile: neither d x d nor n x n numbers are ever held.

With centred `Xc` (n, d_x) and `Yc` (n, d_y), `||Xc' Yc||_F^2` is the sum over all `K_ij L_ij` of the Gram matrices
`K = Xc Xc'` and `L = Yc Yc'`. For wide features this takes `n^2 d` operations in place of `n d^2`, and no memory but
the features' own and a few tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.centring import is_constant
from lit_cka.functional.precision import Products, add_product, chosen_products
from lit_cka.functional.rows import Rows
from lit_cka.functional.terms import CKATerms
from lit_cka.functional.units import unit_exponent

_CPU_ELEMENTS, _GPU_ELEMENTS = 2**19, 2**22  # of a tile's features, at a time


class PairedRows(NamedTuple):
    """Features of the same samples in the same order, both measured from their means."""

    X: Rows
    Y: Rows


def cheaper_in_sample_space(n: int, d_x: int, d_y: int, *, with_yy: bool = True) -> bool:
    """Returns whether `n` samples of widths `d_x` and `d_y` cost less as rows than as moments.

    Counted are multiplications. Gram matrices are symmetric, and half of each is computed; moments are three products,
    or two without `yy` (see `paired_moments`):

        sample space    n^2 (d_x + d_y) / 2
        feature space   n (d_x^2 + d_x d_y + d_y^2)

    Memory leads to the same rule: rows in float32 take `4 n (d_x + d_y)` bytes, and moments in float64 eight for each
    element of their matrices. For `d` features on both sides the rule is `n < 3 d`.

    Example:
        >>> cheaper_in_sample_space(100, 768, 768), cheaper_in_sample_space(10_000, 768, 768)
        (True, False)
    """
    return n * (d_x + d_y) < 2 * (d_x * d_x + d_x * d_y + (d_y * d_y if with_yy else 0))


def sample_space_terms(X: Rows, Y: Rows, *, products: Products | None = None) -> CKATerms:
    """Returns the terms of CKA of all samples, as `terms_from_moments` has them of their moments.

    Args:
        X: features (n, d_x).
        Y: features (n, d_y) of the same samples in the same order.
        products: as for `add_samples`.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> from lit_cka.functional import cka_from_terms, linear_cka
        >>> torch.allclose(cka_from_terms(sample_space_terms(Rows([X]), Rows([Y]))), linear_cka(X, Y))
        True
    """
    (mean_x, size_x), (mean_y, size_y) = X.mean_and_size(), Y.mean_and_size()
    scale_x, scale_y = 2.0 ** -unit_exponent(size_x), 2.0 ** -unit_exponent(size_y)
    rows = PairedRows(X.measured_from(mean_x, scale_x), Y.measured_from(mean_y, scale_y))
    tile = tile_rows(X.device)
    means = mean_x * scale_x, mean_y * scale_y
    sums = torch.cat([gram_sums(rows, rows, tile, products=products), diagonal_sums(rows, *means)])
    return terms_from_sums(sums, len(X))


def tile_rows(device: torch.device) -> int:
    """Returns how many samples make a tile: enough to keep the device busy, at some MiB."""
    return 512 if device.type == "cpu" else 1024


def gram_sums(
    left: PairedRows,
    right: PairedRows,
    tile: int,
    first_left: int = 0,
    first_right: int = 0,
    *,
    products: Products | None = None,
    device: torch.device | None = None,
    with_yy: bool = True,
) -> Tensor:
    """Returns sums (3,) of `K_ij L_ij`, `K_ij^2`, `L_ij^2` over samples i of `left` and others j of `right`.

    The samples are cut into tiles, numbered through over all processes that take part. Of each two tiles one is to
    compute the pairs between them, which count twice: over all `left` and `right` there are, every pair is in once.

    Args:
        left: some of the samples, the same ones with their features on both sides.
        right: likewise.
        tile: samples in a tile.
        first_left: the number of the first tile of `left`.
        first_right: the number of the first tile of `right`.
        products: as for `add_samples`.
        device: where to multiply in float32; None for that of `left`.
        with_yy: compute the last sum too, or leave it at 0.
    """
    device = left.X.device if device is None else device
    products = chosen_products(products, device)
    sums = torch.zeros(3, dtype=torch.float64, device=left.X.device)
    for t, start in enumerate(range(0, len(left.X), tile), first_left):
        for u, begin in enumerate(range(0, len(right.X), tile), first_right):
            if t != u and not _is_for_first(t, u):
                continue
            K, L = (
                _gram_tile(rows, (start, start + tile), columns, (begin, begin + tile), products, device)
                for rows, columns in zip(left, right, strict=True)
            )
            if t == u:
                K.fill_diagonal_(0.0)
                L.fill_diagonal_(0.0)
            K, L = K.flatten(), L.flatten()
            sums += (1 if t == u else 2) * torch.stack([K @ L, K @ K, L @ L if with_yy else sums[2] * 0])
    return sums


def _is_for_first(t: int, u: int) -> bool:
    """Returns whether the first of two tiles is to compute their pairs: with each about half of all others are."""
    return (t > u) == ((t + u) % 2 == 0)


def _gram_tile(
    left: Rows,
    rows: tuple[int, int],
    right: Rows,
    columns: tuple[int, int],
    products: Products,
    device: torch.device,
) -> Tensor:
    """Returns products of samples with samples, float64, from some features at a time."""
    elements = _CPU_ELEMENTS if left.device.type == "cpu" else _GPU_ELEMENTS
    step = max(elements // (rows[1] - rows[0]), 512)
    dtype = torch.float64 if products == "float64" else torch.float32
    tile = None
    for first in range(0, left.width, step):
        x = left.read(*rows, first, first + step, dtype)
        y = x if left is right and rows == columns else right.read(*columns, first, first + step, dtype)
        if tile is None:
            tile = x.new_zeros(len(x), len(y), dtype=torch.float64)
        if products == "float32":
            x, y = x.to(device), y.to(device)
        factor = x.T
        add_product(tile, factor, factor if y is x else y.T)
    assert tile is not None
    return tile


def diagonal_sums(rows: PairedRows, mean_x: Tensor, mean_y: Tensor) -> Tensor:
    """Returns sums (7,) of a, b, a^2, b^2 and a b, where `a` and `b` are the samples' squared norms, and how many of
    `X` and `Y` vary by more than the rounding of what they were measured from, 0 or 1 each.
    """
    (a, squares_x), (b, squares_y) = rows.X.squares(), rows.Y.squares()
    sides = (squares_x, mean_x), (squares_y, mean_y)
    varies = [(~is_constant(squares, len(rows.X), mean)).to(torch.float64) for squares, mean in sides]
    return torch.stack([a.sum(), b.sum(), a @ a, b @ b, a @ b, *varies])


def terms_from_sums(sums: Tensor, n: int) -> CKATerms:
    """Returns the terms from the sums (10,) of `gram_sums` and `diagonal_sums` over all `n` samples."""
    xy, xx, yy, a, b, aa, bb, ab, varies_x, varies_y = sums.unbind()
    num_samples = torch.tensor(n, dtype=torch.float64, device=sums.device)
    return CKATerms(num_samples, xy + ab, xx + aa, yy + bb, a, b, aa, bb, ab, varies_x, varies_y)
