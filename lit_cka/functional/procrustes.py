"""Orthogonal Procrustes: how far apart two sets of features are after the best rotation or reflection.

Ding et al. 2021, "Grounding Representation Similarity with Statistical Testing" (arXiv 2108.01661): the distance.
Williams et al. 2021, "Generalized Shape Metrics on Neural Representations" (arXiv 2110.14739): its root is a metric.
Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem": the rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import centred
from lit_cka.functional.moments import check_features


class Alignment(NamedTuple):
    """The best orthogonal map of one set of points `X` onto another `Y`, and what it leaves. All float64."""

    rotation: Tensor  # (d, d) R, orthogonal; reflections are allowed
    squared_residual: Tensor  # () ||X R - Y||_F^2
    residual: Tensor  # () ||X R - Y||_F
    relative_squared_residual: Tensor  # () ||X R - Y||_F^2 / (||X||_F^2 + ||Y||_F^2), in [0, 1]
    relative_residual: Tensor  # () its root: ||X R - Y||_F by the norm of both, joined


@takes_arrays
def procrustes_distance(X: Tensor, Y: Tensor, *, normalize: bool = True) -> Tensor:
    """Returns the orthogonal Procrustes distance of two sets of features (Ding et al. 2021, section 2).

        d = ||Xc||_F^2 + ||Yc||_F^2 - 2 ||Xc' Yc||_*  =  min_R ||Xc R - Yc||_F^2          Xc, Yc centred by column

    with R orthogonal, and the narrower features padded with zeros where the widths differ. With `normalize` both are
    scaled to unit Frobenius norm first, so that d = 2 - 2 ||Xc' Yc||_* is in [0, 2]: 0 equal up to rotation and
    isotropic scaling, 2 uncorrelated. As in that paper `d` is the squared distance; its root is a metric (Williams et
    al. 2021, with their alpha = 1).

    Features wider than `n` are first rotated into `n` dimensions, so the cost is O(n d^2) or O(n^2 d), the smaller.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y), same samples in the same order.
        normalize: scale each to unit Frobenius norm.

    Returns:
        Float64 scalar, at least 0; NaN for NaN or infinite features and, with `normalize`, for constant ones.

    Raises:
        ValueError: on integer features, wrong shapes, unequal `n`, or fewer than 2 samples.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
        >>> print(f"{procrustes_distance(X, 5 * X.flip(1) + 7).abs():.6f}")
        0.000000
    """
    check_features(X, Y, min_num_samples=2)
    x, y = (unit_shape(Z) if normalize else _narrowed(centred(Z)) for Z in (X, Y))
    if not (x.isfinite().all() and y.isfinite().all()):
        return x.new_tensor(torch.nan)
    overlap = torch.linalg.svdvals(x.T @ y).sum()
    distance: Tensor = x.square().sum() + y.square().sum() - 2 * overlap
    return distance.clamp(min=0)


@takes_arrays
def orthogonal_alignment(X: Tensor, Y: Tensor, *, centre: bool = True) -> Alignment:
    """Returns the orthogonal R that takes `X` (n, d) nearest to `Y` (n, d), and what remains.

        R = U V' with U S V' = X' Y          squared residual = ||X R - Y||_F^2 = ||X||_F^2 + ||Y||_F^2 - 2 sum_i S_ii

    Nothing is scaled: for points that differ in size alone the residual is not 0. Relative to the joint norm, the root
    of `||X||_F^2 + ||Y||_F^2`, it is the same for both directions, 0 for points that a rotation takes onto each other,
    and 1 for `X' Y = 0`. NaN everywhere for non-finite points; the relative residuals are NaN where both are all 0.

    Args:
        X: points (n, d), any floating dtype; computed in float64.
        Y: points (n, d), in the same order.
        centre: measure each set from its mean first, so that a shift is no difference.

    Raises:
        ValueError: as `procrustes_distance`, and on different widths.
    """
    check_features(X, Y)
    if X.shape != Y.shape or len(X) < 2:
        raise ValueError(
            "Expected `X` and `Y` to be at least 2 points each, of the same width, "
            f"but got {tuple(X.shape)} and {tuple(Y.shape)}."
        )
    x, y = (centred(Z) if centre else Z.detach().to(torch.float64) for Z in (X, Y))
    cross = x.T @ y
    if not cross.isfinite().all():
        nan = cross.new_tensor(torch.nan)
        return Alignment(torch.full_like(cross, torch.nan), nan, nan, nan, nan)
    U, _, Vh = torch.linalg.svd(cross)
    rotation = U @ Vh
    squared = (x @ rotation - y).square().sum()
    relative = squared / (x.square().sum() + y.square().sum())
    return Alignment(rotation, squared, squared.sqrt(), relative, relative.sqrt())


def unit_shape(X: Tensor) -> Tensor:
    """Returns the features `X` (n, d) centred, of unit norm, and rotated into no more dimensions than there are
    samples: `procrustes_distance` is `2 - 2 ||X' Y||_*` of two of these. NaN where it is.
    """
    x = _narrowed(centred(X))
    unit: Tensor = x / x.norm()
    return unit


def _narrowed(Xc: Tensor) -> Tensor:
    """Returns the same features up to a rotation of them, no wider than there are samples."""
    if Xc.shape[1] <= len(Xc) or not Xc.isfinite().all():
        return Xc
    _, triangle = torch.linalg.qr(Xc.T, mode="r")
    rotated: Tensor = triangle.T
    return rotated
