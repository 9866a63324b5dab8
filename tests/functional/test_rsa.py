"""Dissimilarity matrices against SciPy, and what they say of samples without a direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from lit_cka.functional.rsa import Distance, rdm
from tests.functional.test_cka import rotation
from tests.oracles import float64, paired_features

DISTANCES: list[Distance] = ["cosine", "correlation", "euclidean"]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("n", "d"), [(12, 5), (7, 30), (2, 3)])
@pytest.mark.parametrize(
    ("offset", "dtype"), [(0.0, torch.float64), (3.0, torch.bfloat16), (3.0, torch.float32), (1e4, torch.float32)]
)
def test_rdm_equals_scipy(n: int, d: int, offset: float, dtype: torch.dtype, distance: Distance) -> None:
    X, _ = paired_features(n, d, d, offset=offset, dtype=dtype)
    value = rdm(X, distance)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value, squareform(pdist(float64(X), distance)), atol=1e-9)
    torch.testing.assert_close(value, value.T, rtol=0, atol=0)
    assert (value.diagonal() == 0).all()


def test_the_default_is_the_correlation_distance() -> None:
    X, _ = paired_features(9, 6, 6)
    torch.testing.assert_close(rdm(X), rdm(X, "correlation"), rtol=0, atol=0)
    assert (rdm(X) - rdm(X, "cosine")).abs().max() > 0.01


def test_what_each_distance_ignores() -> None:
    X, _ = paired_features(9, 6, 6)
    sizes = torch.linspace(0.1, 10, 9, dtype=torch.float64)[:, None]
    for distance, changed, same in [
        ("cosine", sizes * X @ rotation(6), True),
        ("cosine", X + 1, False),
        ("correlation", sizes * X + sizes.flip(0), True),
        ("correlation", X @ rotation(6), False),
        ("euclidean", X @ rotation(6) + torch.arange(6), True),
        ("euclidean", sizes * X, False),
    ]:
        difference = (rdm(changed, distance) - rdm(X, distance)).abs().max()  # type: ignore[arg-type]
        assert (difference < 1e-12) == same, distance


def test_distances_far_from_zero_keep_their_digits() -> None:
    X = paired_features(8, 5, 5)[0] + 1e7
    np.testing.assert_allclose(rdm(X, "euclidean"), squareform(pdist(X.numpy())), atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_repeated_samples_are_at_distance_zero(offset: float) -> None:
    X = (paired_features(15, 41, 5)[0] + offset).repeat(2, 1)
    again = torch.arange(15), torch.arange(15, 30)
    assert (rdm(X, "euclidean")[again] == 0).all()
    for distance in DISTANCES:
        assert rdm(X, distance)[again].max().item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(
    ("distance", "sample"),
    [
        ("cosine", torch.zeros(5)),
        ("correlation", torch.zeros(5)),
        ("correlation", torch.full((5,), 0.1)),
        ("correlation", torch.tensor([1, 1 + 2**-52, 1, 1, 1], dtype=torch.float64)),  # equal, but for rounding
        ("euclidean", torch.tensor([0, 0, torch.nan, 0, 0])),
        ("cosine", torch.tensor([0, 0, torch.inf, 0, 0])),
        ("euclidean", torch.tensor([0, 0, torch.inf, 0, 0])),
    ],
)
def test_a_sample_without_a_direction_has_no_distances(distance: Distance, sample: Tensor) -> None:
    X, _ = paired_features(7, 5, 5)
    X[3] = sample
    value = rdm(X, distance)
    others = [0, 1, 2, 4, 5, 6]
    assert value[3].isnan().all()
    assert value[:, 3].isnan().all()
    torch.testing.assert_close(value[others][:, others], rdm(X[others], distance), rtol=0, atol=1e-12)


def test_a_zero_sample_has_euclidean_distances() -> None:
    assert rdm(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "euclidean")[0, 1].item() == pytest.approx(5)


def test_no_gradient_and_no_change_to_the_features() -> None:
    X = paired_features(6, 4, 4)[0].requires_grad_()
    before = X.detach().clone()
    assert not rdm(X, "euclidean").requires_grad
    torch.testing.assert_close(X.detach(), before, rtol=0, atol=0)


def test_wrong_input_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`distance` to be one of .* but got 'manhattan'"):
        rdm(torch.ones(3, 2), "manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"floating point, of shape .* but got torch.int64, \(3, 2\)"):
        rdm(torch.ones(3, 2).long())
    with pytest.raises(ValueError, match=r"but got torch.float32, \(3,\)"):
        rdm(torch.ones(3))
