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


class PairedMoments(NamedTuple):
    """Sums over `n` paired samples, with `x` and `y` measured from `mean_x` and `mean_y`. All float64.

    The traces need no field of their own: `sum a = trace(xx)` and `sum b = trace(yy)`. The fields from `aa` on serve
    the debiased estimator alone and cost O(d).
    """

    n: Tensor  # ()         number of samples
    mean_x: Tensor  # (d_x,)
    mean_y: Tensor  # (d_y,)
    xx: Tensor  # (d_x, d_x) sum x x'
    yy: Tensor  # (d_y, d_y) sum y y'
    xy: Tensor  # (d_x, d_y) sum x y'
    aa: Tensor  # ()         sum a^2
    bb: Tensor  # ()         sum b^2
    ab: Tensor  # ()         sum a b
    ax: Tensor  # (d_x,)     sum a x
    ay: Tensor  # (d_y,)     sum a y
    bx: Tensor  # (d_x,)     sum b x
    by: Tensor  # (d_y,)     sum b y


def empty_moments(num_features_x: int, num_features_y: int, device: torch.device | str | None = None) -> PairedMoments:
    """The moments of no samples at all: merging them changes nothing."""
    d_x, d_y = num_features_x, num_features_y
    shapes = [(), (d_x,), (d_y,), (d_x, d_x), (d_y, d_y), (d_x, d_y), (), (), (), (d_x,), (d_y,), (d_x,), (d_y,)]
    return PairedMoments(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


def check_features(X: Tensor, Y: Tensor) -> None:
    """Raise unless `X` (n, d_x) and `Y` (n, d_y) are floating-point features of the same number of samples."""
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


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centred features and their mean. Measured from the first row, so that constants centre to exact 0."""
    pivot = features[0]
    offsets = features - pivot
    mean = offsets.mean(dim=0)
    return offsets - mean, pivot + mean


def paired_moments(X: Tensor, Y: Tensor) -> PairedMoments:
    """Moments of one batch of paired features.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y) of the same samples in the same order.

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
        return empty_moments(x.shape[1], y.shape[1], x.device)
    x, mean_x = _centred(x)
    y, mean_y = _centred(y)
    a, b = x.square().sum(dim=1), y.square().sum(dim=1)
    n = torch.tensor(len(x), dtype=torch.float64, device=x.device)
    return PairedMoments(
        n, mean_x, mean_y, x.T @ x, y.T @ y, x.T @ y, a @ a, b @ b, a @ b, a @ x, a @ y, b @ x, b @ y
    )  # fmt: skip


def recentre_moments(moments: PairedMoments, mean_x: Tensor, mean_y: Tensor) -> PairedMoments:
    """The same samples' sums, measured from `mean_x` (d_x,) and `mean_y` (d_y,) instead of their own means.

    With `d = old mean - new mean`, every sample becomes `x + d` and its squared norm `a + 2 x.d + d.d`; the sums are
    expanded with `sum x = 0`, which holds for moments about their own mean. The result is for adding to others
    measured from the same point; recentring it again would be wrong.
    """
    n, _, _, xx, yy, xy, aa, bb, ab, ax, ay, bx, by = moments
    d, e = moments.mean_x - mean_x, moments.mean_y - mean_y
    dd, ee = d @ d, e @ e
    sum_a, sum_b = xx.trace(), yy.trace()
    return PairedMoments(
        n,
        mean_x,
        mean_y,
        xx + n * torch.outer(d, d),
        yy + n * torch.outer(e, e),
        xy + n * torch.outer(d, e),
        aa + 4 * (ax @ d) + 2 * dd * sum_a + 4 * (d @ xx @ d) + n * dd * dd,
        bb + 4 * (by @ e) + 2 * ee * sum_b + 4 * (e @ yy @ e) + n * ee * ee,
        ab + 2 * (ay @ e) + 2 * (bx @ d) + ee * sum_a + dd * sum_b + 4 * (d @ xy @ e) + n * dd * ee,
        ax + sum_a * d + 2 * (xx @ d) + n * dd * d,
        ay + sum_a * e + 2 * (d @ xy) + n * dd * e,
        bx + sum_b * d + 2 * (xy @ e) + n * ee * d,
        by + sum_b * e + 2 * (yy @ e) + n * ee * e,
    )


def merge_moments(first: PairedMoments, second: PairedMoments) -> PairedMoments:
    """Moments of the union of two disjoint sets of samples. Exact, so the split does not matter."""
    n = first.n + second.n
    share = second.n / n.clamp(min=1)
    mean_x = first.mean_x + share * (second.mean_x - first.mean_x)
    mean_y = first.mean_y + share * (second.mean_y - first.mean_y)
    parts = (recentre_moments(first, mean_x, mean_y), recentre_moments(second, mean_x, mean_y))
    return PairedMoments(n, mean_x, mean_y, *(p + q for p, q in zip(parts[0][3:], parts[1][3:], strict=True)))
