"""Procrustes distance and alignment against SciPy, their invariances, and degenerate points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import procrustes
from torch import Tensor

from lit_cka.functional.procrustes import orthogonal_alignment, procrustes_distance
from tests.functional.test_cka import rotation
from tests.oracles import float64, paired_features

SHAPES = pytest.mark.parametrize(
    ("n", "d_x", "d_y"), [(40, 6, 3), (40, 3, 6), (12, 30, 20), (12, 20, 5), (12, 5, 20), (12, 12, 12), (2, 3, 4)]
)


def padded(X: Tensor, Y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Centred, with columns of zeros so that the widths are equal."""
    x, y = (float64(features) - float64(features).mean(0) for features in (X, Y))
    width = max(x.shape[1], y.shape[1])
    return tuple(np.pad(z, ((0, 0), (0, width - z.shape[1]))) for z in (x, y))  # type: ignore[return-value]


def oracle(X: Tensor, Y: Tensor, normalize: bool) -> float:
    """What is left after SciPy's rotation, written out."""
    x, y = padded(X, Y)
    if normalize:
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    R, _ = orthogonal_procrustes(x, y)
    return np.sum((x @ R - y) ** 2)


@SHAPES
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "as is"])
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (3.0, torch.bfloat16), (1e4, torch.float32)])
def test_distance_equals_what_scipy_leaves(
    n: int, d_x: int, d_y: int, offset: float, dtype: torch.dtype, related: bool, normalize: bool
) -> None:
    X, Y = paired_features(n, d_x, d_y, related=related, offset=offset, dtype=dtype)
    value = procrustes_distance(X, Y, normalize=normalize)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(oracle(X, Y, normalize), rel=1e-9, abs=1e-9)


def test_scipys_disparity_follows_from_it() -> None:
    """`scipy.spatial.procrustes` also scales: 1 - ||X'Y||_*^2, where ours is 2 - 2 ||X'Y||_*."""
    X, Y = paired_features(15, 4, 4)
    disparity = procrustes(float64(X), float64(Y))[2]
    distance = procrustes_distance(X, Y).item()
    assert disparity == pytest.approx(1 - (1 - distance / 2) ** 2, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)], ids=["tall", "wide"])
def test_invariances(n: int, d: int) -> None:
    X, Y = paired_features(n, d, d + 2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    for normalize in (True, False):
        value = procrustes_distance(X, Y, normalize=normalize)
        for x, y in [
            (X @ rotation(d), -Y @ rotation(d + 2)),
            (X + 17, Y - torch.arange(d + 2)),
            (X[order], Y[order]),
            (Y, X),
            (torch.nn.functional.pad(X, (0, 3)), Y),
        ]:
            torch.testing.assert_close(procrustes_distance(x, y, normalize=normalize), value, rtol=1e-10, atol=1e-12)
        assert (procrustes_distance(X[order], Y, normalize=normalize) - value).abs() > 1e-3
    scaled = 1e-4 * X, -300 * Y
    torch.testing.assert_close(procrustes_distance(*scaled), procrustes_distance(X, Y), rtol=0, atol=1e-12)
    assert (procrustes_distance(*scaled, normalize=False) - procrustes_distance(X, Y, normalize=False)).abs() > 1


def test_the_ends_of_the_range() -> None:
    X, _ = paired_features(12, 5, 5)
    assert procrustes_distance(X, 3 * X @ rotation(5) - 4).item() == pytest.approx(0, abs=1e-12)
    far = torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 0]]), torch.tensor([[0.0, 0], [0, 0], [0, 1], [0, -1]])
    assert procrustes_distance(*far).item() == pytest.approx(2, abs=1e-12)
    assert procrustes_distance(*far, normalize=False).item() == pytest.approx(4, abs=1e-12)


def test_its_root_is_a_metric() -> None:
    X, Y = paired_features(12, 5, 4)
    Z, _ = paired_features(12, 7, 5, seed=3)
    xy, yz, xz = (procrustes_distance(*pair).sqrt() for pair in ((X, Y), (Y, Z), (X, Z)))
    assert xz <= xy + yz
    assert xy <= xz + yz
    assert yz <= xy + xz


@pytest.mark.parametrize("wide", [False, True])
def test_constant_and_non_finite_features(wide: bool) -> None:
    X, Y = paired_features(6, 20 if wide else 3, 20 if wide else 3)
    constant = torch.full_like(X, 0.1)
    assert procrustes_distance(X, constant).isnan()
    expected = (X - X.mean(0)).square().sum().item()
    assert procrustes_distance(X, constant, normalize=False).item() == pytest.approx(expected, rel=1e-12)
    for bad in (torch.nan, torch.inf):
        broken = X.clone()
        broken[2, 1] = bad
        assert procrustes_distance(broken, Y).isnan()
        assert procrustes_distance(Y, broken, normalize=False).isnan()
        assert all(part.isnan().all() for part in orthogonal_alignment(broken, Y))
    found = orthogonal_alignment(X, constant)
    assert found.relative_residual.item() == found.relative_squared_residual.item() == 1.0
    assert orthogonal_alignment(constant, constant).relative_residual.isnan()
    rounded = 1e3 + 1e-13 * Y  # the same value, but for rounding
    assert (rounded != rounded[0]).any()
    assert procrustes_distance(X, rounded).isnan()


@pytest.mark.parametrize(("n", "d"), [(30, 3), (5, 9)])
@pytest.mark.parametrize("centre", [True, False])
def test_alignment_equals_scipy(n: int, d: int, centre: bool) -> None:
    X, Y = paired_features(n, d, d)
    x, y = padded(X, Y) if centre else (float64(X), float64(Y))
    R, _ = orthogonal_procrustes(x, y)
    found = orthogonal_alignment(X, Y, centre=centre)
    np.testing.assert_allclose(x @ found.rotation.numpy(), x @ R, atol=1e-9)
    np.testing.assert_allclose(found.rotation @ found.rotation.T, np.eye(d), atol=1e-12)
    squared, joint = np.sum((x @ R - y) ** 2), np.sum(x**2) + np.sum(y**2)
    assert found.squared_residual.item() == pytest.approx(squared, rel=1e-9)
    assert found.residual.item() == pytest.approx(np.linalg.norm(x @ R - y), rel=1e-9)
    assert found.relative_squared_residual.item() == pytest.approx(squared / joint, rel=1e-9)
    assert found.relative_residual.item() == pytest.approx((squared / joint) ** 0.5, rel=1e-9)
    if centre:
        distance = procrustes_distance(X, Y, normalize=False).item()
        assert found.squared_residual.item() == pytest.approx(distance, rel=1e-9)


def test_scipys_disparity_follows_from_the_residual() -> None:
    """SciPy scales both to unit norm and one of them once more, so its disparity is `1 - (||X' Y||_*)^2`."""
    X, Y = paired_features(20, 4, 4)
    x, y = (Z - Z.mean(0) for Z in (X, Y))
    found = orthogonal_alignment(x / x.norm(), y / y.norm())
    overlap = 1 - found.relative_squared_residual.item()
    assert procrustes(X.numpy(), Y.numpy())[2] == pytest.approx(1 - overlap**2, rel=1e-9)


def test_alignment_finds_a_reflection_and_does_not_scale() -> None:
    X, _ = paired_features(10, 3, 3)
    Q = rotation(3) @ torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    found = orthogonal_alignment(X, X @ Q + 4)
    torch.testing.assert_close(found.rotation, Q, rtol=0, atol=1e-10)
    assert found.relative_residual.item() == pytest.approx(0, abs=1e-12)
    assert orthogonal_alignment(X, X @ Q + 4, centre=False).relative_residual.item() > 0.1
    for one, other in ((X, 2 * X), (2 * X, X)):  # (2 - 1)^2 / (2^2 + 1)
        assert orthogonal_alignment(one, other).relative_squared_residual.item() == pytest.approx(0.2, abs=1e-12)


def test_wrong_input_is_an_error() -> None:
    X = torch.ones(4, 3)
    with pytest.raises(ValueError, match="at least 2 samples, but got 1"):
        procrustes_distance(X[:1], X[:1])
    with pytest.raises(ValueError, match="the same samples in the same order, but got 4 and 3"):
        procrustes_distance(X, X[:3])
    with pytest.raises(ValueError, match=r"of the same width, but got \(4, 3\) and \(4, 2\)"):
        orthogonal_alignment(X, X[:, :2])
    with pytest.raises(ValueError, match="`X` to be floating point"):
        orthogonal_alignment(X.int(), X)
