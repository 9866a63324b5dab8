"""CKA of every layer of one model with every layer of another: `cka_matrix`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import centred
from lit_cka.functional.cka import check_num_samples, cka_from_hsic, hsic_from_sums
from lit_cka.functional.moments import check_features
from lit_cka.functional.units import in_usual_unit

_TILE = 256  # rows and columns of the Gram matrices at a time


@takes_arrays
def cka_matrix(Xs: Sequence[Tensor], Ys: Sequence[Tensor], *, debiased: bool = False) -> Tensor:
    """Returns `linear_cka` of every pair, `(i, j)` of `Xs[i]` and `Ys[j]`, at about the cost of one product.

    Computed in float64, from the samples' Gram matrices, tile by tile, or from the products of the
    features, whichever is cheaper: the two are equal.

    Args:
        Xs: features (n, d_i) of each layer, any floating dtypes and widths.
        Ys: features of the same samples in the same order; the same object as `Xs` to compare a model with itself.
        debiased: use the unbiased HSIC (Song et al. 2012), which needs 4 samples.

    Returns:
        Float64 (len(Xs), len(Ys)); NaN where a layer's features are the same for all samples, or not finite.

    Raises:
        ValueError: on no layers, integer features, wrong shapes, unequal `n`, or fewer than 2 samples (4 if debiased).

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> values = cka_matrix([X, Y], [2 * X, X + Y])
        >>> values.shape, round(values[0, 0].item(), 6)
        (torch.Size([2, 2]), 1.0)
    """
    if not Xs or not Ys:
        raise ValueError("Expected features of at least one layer on both sides, but got none.")
    for layer in (*Xs, *Ys):
        check_features(Xs[0], layer)
    check_num_samples(len(Xs[0]), debiased)
    same = Xs is Ys
    X = [centred(in_usual_unit(layer)) for layer in Xs]
    Y = X if same else [centred(in_usual_unit(layer)) for layer in Ys]
    a, b = (torch.stack([layer.square().sum(dim=1) for layer in layers]) for layers in (X, Y))
    n = torch.tensor(len(X[0]), dtype=torch.float64, device=X[0].device)
    if _gram_form_is_cheaper(X, Y, same):
        cross, self_x, self_y = _gram_products(X, Y)
    else:
        self_x, self_y = (torch.stack([(layer.T @ layer).square().sum() for layer in layers]) for layers in (X, Y))
        widths = [layer.shape[1] for layer in Y]
        joined = torch.cat(Y, dim=1)
        # One product a layer, summed in blocks.
        cross = torch.stack(
            [torch.stack([part.sum() for part in (layer.T @ joined).square().sum(dim=0).split(widths)]) for layer in X]
        )
    hsic_xy = hsic_from_sums(cross, a @ b.T, a.sum(dim=1)[:, None], b.sum(dim=1), n, debiased)
    hsic_xx = hsic_from_sums(self_x, a.square().sum(dim=1), a.sum(dim=1), a.sum(dim=1), n, debiased)
    hsic_yy = hsic_from_sums(self_y, b.square().sum(dim=1), b.sum(dim=1), b.sum(dim=1), n, debiased)
    return cka_from_hsic(hsic_xy, hsic_xx[:, None], hsic_yy[None, :])


def _gram_products(X: Sequence[Tensor], Y: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inner products of all Gram matrices of `X` with those of `Y` (k, l), and of each with itself (k,), (l,).

    Gram matrices are symmetric, so that tiles above the diagonal are not computed, and those below count twice.
    """
    n, k = len(X[0]), len(X)
    layers = X if X is Y else [*X, *Y]
    room = X[0].new_empty(len(layers) * min(_TILE, n) ** 2)
    cross, selves = X[0].new_zeros(k, len(Y)), X[0].new_zeros(len(layers))
    for rows, columns, times in _tiles(0, n):
        tiles = room[: len(layers) * len(rows) * len(columns)].view(len(layers), len(rows), len(columns))
        for layer, tile in zip(layers, tiles, strict=True):
            torch.mm(layer[rows.start : rows.stop], layer[columns.start : columns.stop].T, out=tile)
        flat = tiles.view(len(layers), -1)
        cross.addmm_(flat[:k], flat[-len(Y) :].T, alpha=times)
        selves.add_(torch.linalg.vector_norm(flat, dim=1).square(), alpha=times)
    return cross, selves[:k], selves[-len(Y) :]


def _tiles(start: int, stop: int) -> Iterator[tuple[range, range, int]]:
    """Yields rows and columns of tiles on and below the diagonal, small ones along it, and how often each counts."""
    if stop - start <= max(_TILE // 4, 1):
        yield range(start, stop), range(start, stop), 1
        return
    middle = (start + stop) // 2
    for top in range(middle, stop, _TILE):
        for left in range(start, middle, _TILE):
            yield range(top, min(top + _TILE, stop)), range(left, min(left + _TILE, middle)), 2
    yield from _tiles(start, middle)
    yield from _tiles(middle, stop)


def _gram_form_is_cheaper(X: Sequence[Tensor], Y: Sequence[Tensor], same: bool) -> bool:
    """Returns whether the samples' Gram matrices take fewer multiplications than the features' products."""
    n, widths_x = len(X[0]), [layer.shape[1] for layer in X]
    widths_y = [layer.shape[1] for layer in Y]
    by_samples = n * n * (sum(widths_x) + (0 if same else sum(widths_y)) + len(X) * len(Y)) / 2
    squares = sum(width * width for width in (widths_x if same else widths_x + widths_y))
    return by_samples < n * (squares + sum(widths_x) * sum(widths_y))
