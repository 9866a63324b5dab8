"""Sufficient statistics of paired features, in float64: from a batch, recentred, merged.

Everything CKA needs of `n` paired samples `(x_i, y_i)` is a handful of sums over the centred features. They are kept
about the exact mean of the samples they describe, never as raw sums of products: transformer features have means
thousands of times their spread, and raw sums would then cancel to noise.

Shapes below: `d_x`, `d_y` are the feature widths; `a_i = ||x_i - mean_x||^2` and `b_i = ||y_i - mean_y||^2`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import mean_over_samples
from lit_cka.functional.precision import Products, add_product, as_float64, chosen_products, rounded


class PairedMoments(NamedTuple):
    """Sums over `n` paired samples, with `x` and `y` measured from `mean_x` and `mean_y`. All float64.

    The fields from `aa` on serve the debiased estimator alone and cost O(d). Where `y` are the features of a frozen
    reference, the sums over `y` alone (`yy`, `bb`, `by`) are the same for every pass over the data, and may be left
    out: `yy` and `by` are then of size 0. See `with_yy` of `paired_moments`.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> moments = paired_moments(X, Y)
        >>> int(moments.n), tuple(moments.xy.shape)
        (20, (3, 3))
    """

    n: Tensor  # ()         number of samples
    mean_x: Tensor  # (d_x,)
    mean_y: Tensor  # (d_y,)
    xx: Tensor  # (d_x, d_x) sum x x'
    yy: Tensor  # (d_y, d_y) sum y y'
    xy: Tensor  # (d_x, d_y) sum x y'
    a: Tensor  # ()          sum a, the trace of xx
    b: Tensor  # ()          sum b, the trace of yy
    aa: Tensor  # ()         sum a^2
    bb: Tensor  # ()         sum b^2
    ab: Tensor  # ()         sum a b
    ax: Tensor  # (d_x,)     sum a x
    ay: Tensor  # (d_y,)     sum a y
    bx: Tensor  # (d_x,)     sum b x
    by: Tensor  # (d_y,)     sum b y


def empty_moments(num_features_x: int, num_features_y: int, device: torch.device | str | None = None) -> PairedMoments:
    """Returns the moments of no samples at all: merging them changes nothing.

    Example:
        >>> int(empty_moments(3, 4).n)
        0
    """
    d_x, d_y = num_features_x, num_features_y
    shapes = [(), (d_x,), (d_y,), (d_x, d_x), (d_y, d_y), (d_x, d_y), *[()] * 5, (d_x,), (d_y,), (d_x,), (d_y,)]
    return PairedMoments(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


def check_features(X: Tensor, Y: Tensor, *, min_num_samples: int = 0) -> None:
    """Raise a ValueError unless `X` (n, d_x) and `Y` (n, d_y) are floating-point features of the same `n`, which is at
    least so large.
    """
    for name, features in (("X", X), ("Y", Y)):
        if features.ndim != 2:
            raise ValueError(f"Expected `{name}` to be of shape (samples, features), but got {tuple(features.shape)}.")
        if not features.is_floating_point():
            raise ValueError(
                f"Expected `{name}` to be floating point, but got {features.dtype}. Are these token or class indices?"
            )
    if len(X) != len(Y):
        raise ValueError(
            f"Expected `X` and `Y` to hold the same samples in the same order, but got {len(X)} and {len(Y)} samples."
        )
    if len(X) < min_num_samples:
        raise ValueError(f"Expected at least {min_num_samples} samples, but got {len(X)}.")


@takes_arrays
def paired_moments(X: Tensor, Y: Tensor, *, with_yy: bool = True) -> PairedMoments:
    """Returns the moments of one batch of paired features.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y) of the same samples in the same order.
        with_yy: compute `yy`, `bb`, `by` too, which depend on `Y` alone: a third of the cost.

    Raises:
        ValueError: if a shape or dtype is not as above.

    Example:
        >>> moments = paired_moments(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0]]))
        >>> moments.xy
        tensor([[4.]], dtype=torch.float64)
    """
    check_features(X, Y)
    x, y = X.detach().to(torch.float64), Y.detach().to(torch.float64)
    if len(x) == 0:
        empty = empty_moments(x.shape[1], y.shape[1], x.device)
        return empty if with_yy else without_yy(empty)
    mean_x, mean_y = mean_over_samples(x), mean_over_samples(y)
    x, y = x - mean_x, y - mean_y
    a, b = x.square().sum(dim=1), y.square().sum(dim=1)
    n = torch.tensor(len(x), dtype=torch.float64, device=x.device)
    none = y.new_empty(0)
    yy, bb, by = (y.T @ y, b @ b, b @ y) if with_yy else (none, none.sum(), none)
    return PairedMoments(
        n, mean_x, mean_y, x.T @ x, yy, x.T @ y, a.sum(), b.sum(), a @ a, bb, a @ b, a @ x, a @ y, b @ x, by
    )  # fmt: skip


def without_yy(moments: PairedMoments) -> PairedMoments:
    """Returns the same moments without the sums over `y` alone."""
    none = moments.yy.new_empty(0)
    return moments._replace(yy=none, bb=none.sum(), by=none)


def scaled_moments(moments: PairedMoments, s: Tensor | float, t: Tensor | float) -> PairedMoments:
    """Returns the moments of the same samples with all `x` multiplied by `s` and all `y` by `t`."""
    n, mean_x, mean_y, xx, yy, xy, a, b, aa, bb, ab, ax, ay, bx, by = moments
    return PairedMoments(
        n, mean_x * s, mean_y * t, xx * s**2, yy * t**2, xy * s * t, a * s**2, b * t**2, aa * s**4, bb * t**4,
        ab * s**2 * t**2, ax * s**3, ay * s**2 * t, bx * s * t**2, by * t**3,
    )  # fmt: skip


def recentre_moments(moments: PairedMoments, mean_x: Tensor, mean_y: Tensor) -> PairedMoments:
    """Returns the same samples' sums, measured from `mean_x` (d_x,) and `mean_y` (d_y,) instead of their means.

    With `d = old mean - new mean`, every sample becomes `x + d` and its squared norm `a + 2 x.d + d.d`; the sums are
    expanded with `sum x = 0`, which holds for moments about the mean of their samples. The result is for adding to
    others measured from the same point; recentring it again would be wrong.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> moments = recentre_moments(paired_moments(X, Y), torch.zeros(3).double(), torch.zeros(3).double())
        >>> torch.allclose(moments.xy, X.T @ Y)  # about 0
        True
    """
    d, e = moments.mean_x - mean_x, moments.mean_y - mean_y
    n = moments.n
    return PairedMoments(
        n,
        mean_x,
        mean_y,
        torch.addr(moments.xx, n * d, d),
        torch.addr(moments.yy, n * e, e) if moments.yy.numel() else moments.yy,
        torch.addr(moments.xy, n * d, e),
        *recentred_vectors(moments, d, e),
    )


def recentred_vectors(moments: PairedMoments, d: Tensor, e: Tensor) -> list[Tensor]:
    """Returns the fields from `a` on, after every `x` has moved by `d` and every `y` by `e`."""
    n, _, _, xx, yy, xy, a, b, aa, bb, ab, ax, ay, bx, by = moments
    dd, ee, d_xx, d_xy, xy_e = d @ d, e @ e, d @ xx, d @ xy, xy @ e
    if len(by):
        yy_e = yy @ e
        bb = bb + 4 * (by @ e) + 2 * ee * b + 4 * (e @ yy_e) + n * ee * ee
        by = by + b * e + 2 * yy_e + n * ee * e
    return [
        a + n * dd,
        b + n * ee,
        aa + 4 * (ax @ d) + 2 * dd * a + 4 * (d_xx @ d) + n * dd * dd,
        bb,
        ab + 2 * (ay @ e) + 2 * (bx @ d) + ee * a + dd * b + 4 * (d_xy @ e) + n * dd * ee,
        ax + a * d + 2 * d_xx + n * dd * d,
        ay + a * e + 2 * d_xy + n * dd * e,
        bx + b * d + 2 * xy_e + n * ee * d,
        by,
    ]


def merge_moments(first: PairedMoments, second: PairedMoments) -> PairedMoments:
    """Returns the moments of the union of two disjoint sets of samples. They are exact for any split.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> moments = merge_moments(paired_moments(X[:7], Y[:7]), paired_moments(X[7:], Y[7:]))
        >>> torch.allclose(moments.xy, paired_moments(X, Y).xy)
        True
    """
    n = first.n + second.n
    share = second.n / n.clamp(min=1)
    mean_x = first.mean_x + share * (second.mean_x - first.mean_x)
    mean_y = first.mean_y + share * (second.mean_y - first.mean_y)
    parts = (recentre_moments(first, mean_x, mean_y), recentre_moments(second, mean_x, mean_y))
    return PairedMoments(n, mean_x, mean_y, *(p + q for p, q in zip(parts[0][3:], parts[1][3:], strict=True)))


@takes_arrays
def add_samples(
    moments: PairedMoments, X: Tensor, Y: Tensor, *, products: Products | None = None, overwrite: bool = False
) -> PairedMoments:
    """Returns `merge_moments(moments, paired_moments(X, Y))` at little more than the cost of their products.

    The samples are measured from the mean of the union at once. Sums over `y` alone are kept up if `moments` has them.

    Args:
        moments: of the samples so far, on the device of `X` and `Y`, or on the CPU if that has no float64.
        X: as for `paired_moments`.
        Y: as for `paired_moments`.
        products: of features, in "float64", or in "float32" with sums in float64, which changes CKA by less than 1e-6;
            None takes float32 where the device is slow at float64 (`has_fast_float64`). All else is in float64.
        overwrite: whether `X` and `Y` are the caller's to lose, and may be changed, which saves their copies.

    Raises:
        ValueError: as `paired_moments`, and on other `products`.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> moments = add_samples(paired_moments(X[:7], Y[:7]), X[7:], Y[7:])
        >>> torch.allclose(moments.xy, paired_moments(X, Y).xy)
        True
    """
    check_features(X, Y)
    products = chosen_products(products, X.device)
    if len(X) == 0:
        return moments
    x, y = (as_float64(features) if overwrite else as_float64(features).clone() for features in (X, Y))
    n = moments.n + len(x)
    mean_x = _centre_on_union(x, moments.n, moments.mean_x)
    mean_y = _centre_on_union(y, moments.n, moments.mean_y)
    a, b = (torch.einsum("nd,nd->n", features, features) for features in (x, y))
    with_yy = moments.yy.numel() > 0
    sums = [a.sum(), b.sum(), a @ a, b @ b if with_yy else 0, a @ b, a @ x, a @ y, b @ x, b @ y if with_yy else 0]
    # Of no samples there is nothing to recentre; another device would have to be waited for to know.
    is_first = moments.n.device.type == "cpu" and not moments.n
    earlier = [field.clone() for field in moments[3:]] if is_first else recentre_moments(moments, mean_x, mean_y)[3:]
    xx, yy, xy, *vectors = earlier
    vectors = [old + new for old, new in zip(vectors, sums, strict=True)]

    (left, scale_x), (right, scale_y) = rounded(x, products, X.device), rounded(y, products, X.device)
    add_product(xx, left, left, scale_x * scale_x)
    add_product(xy, left, right, scale_x * scale_y)
    if with_yy:
        add_product(yy, right, right, scale_y * scale_y)
    return PairedMoments(n, mean_x, mean_y, xx, yy, xy, *vectors)


def _centre_on_union(X: Tensor, n: Tensor, mean: Tensor) -> Tensor:
    """Measure `X` from the mean of its samples and `n` others with that `mean`, in place; return the new mean.

    As in `mean_over_samples`, the samples are measured from the first one first.
    """
    first = X[0].clone()
    X -= first
    of_union = mean + len(X) / (n + len(X)) * (first + X.mean(dim=0) - mean)
    X -= of_union - first
    return of_union
