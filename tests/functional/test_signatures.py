"""Signatures against CKA written out, the map against scikit-learn's kernel PCA, and label correlations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import KernelPCA
from torch import Tensor

from lit_cka.functional import linear_cka
from lit_cka.functional.signatures import component_label_correlation, kernel_pca, signature, signature_gram
from tests import oracles
from tests.functional.test_cka import rotation
from tests.oracles import paired_features


def layers(n: int, widths: list[int], offset: float = 3.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        paired_features(n, d, d, offset=offset, dtype=dtype, seed=seed % 2)[seed // 2] for seed, d in enumerate(widths)
    ]


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("n", "d"), [(12, 4), (5, 30), (4, 3)])
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (1e4, torch.float32)])
def test_inner_products_of_signatures_are_cka(
    n: int, d: int, offset: float, dtype: torch.dtype, debiased: bool
) -> None:
    X, Y = paired_features(n, d, d + 2, offset=offset, dtype=dtype)
    v, w = signature(X, debiased=debiased), signature(Y, debiased=debiased)
    assert v.dtype == torch.float64
    assert v.shape == (n * (n + 1) // 2,)
    assert v.norm().item() == pytest.approx(1, abs=1e-14)
    assert (v @ w).item() == pytest.approx(oracles.linear_cka(X, Y, debiased=debiased), abs=1e-9)
    assert (v @ w).item() == pytest.approx(linear_cka(X, Y, debiased=debiased).item(), abs=1e-12)


def test_a_signature_ignores_rotation_scale_and_place() -> None:
    X, _ = paired_features(9, 4, 4)
    torch.testing.assert_close(signature(-1e-3 * X @ rotation(4) + 7), signature(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "widths"), [(60, [3, 5, 4]), (10, [30, 50, 40]), (20, [3, 100])])
@pytest.mark.parametrize("debiased", [False, True])
def test_signature_gram_holds_the_cka_of_every_pair(n: int, widths: list[int], debiased: bool) -> None:
    features = layers(n, widths)
    expected = [[oracles.linear_cka(X, Y, debiased=debiased) for Y in features] for X in features]
    K = signature_gram(features, debiased=debiased)
    np.testing.assert_allclose(K, expected, atol=1e-10)
    stacked = torch.stack([signature(X, debiased=debiased) for X in features])
    torch.testing.assert_close(K, stacked @ stacked.T, rtol=0, atol=1e-12)


def test_a_constant_layer_has_no_signature() -> None:
    X, Y = paired_features(9, 4, 5)
    for bad in (torch.full_like(X, 0.1), torch.full_like(X, torch.nan)):
        assert signature(bad).isnan().all()
        K = signature_gram([X, bad, Y])
        assert K[1].isnan().all()
        assert K[:, 1].isnan().all()
        assert K[0, 2].item() == pytest.approx(linear_cka(X, Y).item(), abs=1e-12)


@pytest.mark.parametrize("num_components", [1, 3, 6])
def test_kernel_pca_equals_scikit_learn(num_components: int) -> None:
    K = signature_gram(layers(12, [4, 9, 3, 5])) + 0.3  # a constant is centred away
    K = torch.block_diag(K, K[:3, :3] * 1.5)
    coordinates, explained = kernel_pca(K, num_components)
    reference = KernelPCA(num_components, kernel="precomputed", eigen_solver="dense").fit_transform(K.numpy())
    np.testing.assert_allclose(coordinates.abs(), np.abs(reference), atol=1e-9)
    H = np.eye(7) - 1 / 7
    values = np.sort(np.linalg.eigvalsh(H @ K.numpy() @ H))[::-1]
    np.testing.assert_allclose(explained, values[:num_components] / values.sum(), atol=1e-12)


def test_without_a_centre_coordinates_are_the_principal_directions_about_the_origin() -> None:
    """Of points off the origin, against a singular value decomposition; the first is about where their mean lies."""
    points = np.random.default_rng(0).standard_normal((9, 4)) + 3
    K = torch.from_numpy(points @ points.T)
    coordinates, explained = kernel_pca(K, 4, centre=False)
    U, s, _ = np.linalg.svd(points, full_matrices=False)
    np.testing.assert_allclose(coordinates.abs(), np.abs(U * s), atol=1e-9)
    np.testing.assert_allclose(explained, s**2 / np.sum(s**2), atol=1e-12)
    np.testing.assert_allclose(coordinates @ coordinates.T, K, atol=1e-9)
    assert coordinates[:, 0].min() > 3
    assert explained[0] > 0.8 > kernel_pca(K, 4)[1][0]


def test_kernel_pca_keeps_distances_and_inner_products() -> None:
    points = paired_features(8, 3, 3)[0]
    coordinates, explained = kernel_pca(points @ points.T, 3)
    torch.testing.assert_close(torch.cdist(coordinates, coordinates), torch.cdist(points, points), rtol=0, atol=1e-9)
    torch.testing.assert_close(coordinates.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert explained.sum().item() == pytest.approx(1)
    assert (explained.diff() < 0).all()


def test_signs_are_the_same_on_every_run() -> None:
    points = paired_features(8, 3, 3)[0]
    coordinates, _ = kernel_pca(points @ points.T)
    largest = coordinates.gather(0, coordinates.abs().argmax(0)[None])
    assert (largest > 0).all()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        kernel_pca((points @ points.T)[order][:, order])[0], coordinates[order], atol=1e-9, rtol=0
    )
    two = torch.tensor([[0.0, 0], [0, 1]])  # both entries are of the same size: the first is positive
    torch.testing.assert_close(kernel_pca(two, 1)[0], torch.tensor([[0.5], [-0.5]], dtype=torch.float64))


def test_columns_beyond_what_the_points_span_are_zero() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    coordinates, explained = kernel_pca(line @ line.T, 5)
    assert coordinates.shape == (3, 5)
    assert (coordinates[:, 1:] == 0).all()
    torch.testing.assert_close(explained, torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))
    coordinates, explained = kernel_pca(torch.ones(4, 4), 2)
    assert (coordinates == 0).all()
    assert explained.isnan().all()


def test_points_without_a_kernel_are_left_out() -> None:
    points = paired_features(6, 3, 3)[0]
    K = points @ points.T
    expected = kernel_pca(K)
    K = torch.nn.functional.pad(K, (0, 1, 0, 1), value=torch.nan)
    coordinates, explained = kernel_pca(K)
    assert coordinates[6].isnan().all()
    torch.testing.assert_close(coordinates[:6], expected[0])
    torch.testing.assert_close(explained, expected[1])
    nothing = kernel_pca(K[6:, 6:])
    assert nothing[0].isnan().all()
    assert nothing[1].isnan().all()


def test_two_labels_give_the_pearson_correlation() -> None:
    coordinates, _ = paired_features(20, 3, 3)
    labels = ["en" if i % 3 else "hi" for i in range(20)]
    codes = np.array([label == "hi" for label in labels], dtype=float)
    expected = [abs(np.corrcoef(column, codes)[0, 1]) for column in coordinates.numpy().T]
    np.testing.assert_allclose(component_label_correlation(coordinates, labels), expected, atol=1e-12)


def test_several_labels_give_the_correlation_ratio() -> None:
    coordinates, _ = paired_features(20, 2, 3)
    labels = [i % 4 for i in range(20)]
    x = coordinates.numpy()
    fitted = np.stack([x[[label == other for other in labels]].mean(0) for label in labels])
    expected = np.sqrt(fitted.var(0) / x.var(0))
    np.testing.assert_allclose(component_label_correlation(coordinates, labels), expected, atol=1e-12)


def test_labels_that_explain_all_or_nothing() -> None:
    x = torch.tensor([[1.0, 1.0, 0.1], [1.0, -1.0, 0.1], [-1.0, 1.0, 0.1], [-1.0, -1.0, 0.1], [torch.nan, 0, 0]])
    all_, none, constant = component_label_correlation(x, ["a", "a", "b", "b", "c"])
    assert all_.item() == pytest.approx(1)
    assert none.item() == pytest.approx(0)
    assert constant.isnan()


def test_wrong_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        signature_gram([])
    with pytest.raises(ValueError, match="at least 4 samples, but got 3"):
        signature(torch.ones(3, 2), debiased=True)
    with pytest.raises(ValueError, match="at least 2 samples, but got 1"):
        signature(torch.ones(1, 3))
    with pytest.raises(ValueError, match="the same samples in the same order, but got 4 and 5"):
        signature_gram([torch.ones(4, 2), torch.ones(5, 2)])
    with pytest.raises(ValueError, match=r"square matrix, but got \(2, 3\)"):
        kernel_pca(torch.ones(2, 3))
    with pytest.raises(ValueError, match="`num_components` to be at least 1, but got 0"):
        kernel_pca(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match=r"one label a point, but got \(3, 2\) and 2 labels"):
        component_label_correlation(torch.ones(3, 2), ["a", "b"])
    with pytest.raises(ValueError, match=r"at least two different labels, but got \['a'\]"):
        component_label_correlation(torch.ones(2, 2), ["a", "a"])
