"""Where one sample decides how far chance reaches, scores are calibrated by permutations: against all there are."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearson3

from lit_cka.analysis import Features, Settings, compare_features
from lit_cka.analysis.calibration import calibrate
from lit_cka.analysis.measures import centred_grams, similarity
from lit_cka.analysis.null_choice import MAX_DOMINANCE
from lit_cka.functional.permutation_moments import dominance, permutation_moments
from lit_cka.functional.permutations import draw_orders, permuted_products
from tests import oracles

SAID = (
    "One sample of digits is so far from all others in 'x' of before, and one in 'y' of after.* from 999 permutations"
)


def pair(n: int, factor: float, seed: int, width: int = 6) -> tuple[Features, Features]:
    """Of features that have nothing to do with each other but that their first samples may be far off."""
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((2, n, width))
    X[0] *= factor
    Y[0] *= factor
    ids = [str(number) for number in range(n)]
    return tuple(
        Features({layer: torch.from_numpy(each)}, ids, model=model, data="digits")
        for layer, model, each in (("x", "before", X), ("y", "after", Y))
    )  # type: ignore[return-value]


def by_orders(a: Features, b: Features, debiased: bool) -> float:
    """How many of all n! orders of 7 samples, or of 10,000 of more, have as large a CKA as the observed one."""
    X, Y = a.layers["x"].numpy(), b.layers["y"].numpy()
    n = len(X)
    rng = np.random.default_rng(9)
    drawn = itertools.permutations(range(n)) if n <= 7 else [range(n), *(rng.permutation(n) for _ in range(10_000))]
    orders = np.array(list(drawn))
    K, L = (oracles.linear_gram(each) for each in (X, Y))
    observed = oracles.cka(K, L, debiased)
    if debiased:
        K, L = (_u_centred(each) for each in (K, L))
    else:
        H = np.eye(n) - 1 / n
        K, L = H @ K @ H, H @ L @ H
    values = (K * L[orders[:, :, None], orders[:, None]]).sum((1, 2)) / np.linalg.norm(K) / np.linalg.norm(L)
    assert values[0] == pytest.approx(observed, abs=1e-12)
    return float(np.mean(values >= observed - 1e-10))


def _u_centred(K: np.ndarray) -> np.ndarray:
    """Szekely & Rizzo 2014."""
    K, n = K.copy(), len(K)
    np.fill_diagonal(K, 0.0)
    rows = K.sum(0) / (n - 2)
    centred = K - rows[:, None] - rows[None] + K.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0.0)
    return centred


@pytest.mark.parametrize(("n", "debiased", "seed"), [(7, False, 3), (30, True, 1)])
def test_a_dominating_sample_has_the_p_value_of_all_orders(n: int, debiased: bool, seed: int) -> None:
    """That both have the same far sample has one chance in n, which no smooth distribution of three moments knows."""
    a, b = pair(n, 30.0, seed=seed)
    expected = by_orders(a, b, debiased)
    with pytest.warns(UserWarning, match=SAID):
        found = compare_features(a, b, Settings(null="moments", debiased=debiased))
    assert found.settings == Settings(num_permutations=999, debiased=debiased)
    assert found.calibration is not None
    assert found.calibration.p_values.item() == pytest.approx(expected, abs=3 * (expected / 999) ** 0.5)
    # What the moments say is off by more than that.
    Xs, Ys = list(a.layers.values()), list(b.layers.values())
    settings = Settings(null="moments", debiased=debiased)
    moments = calibrate(Xs, Ys, similarity(Xs, Ys, settings), settings).p_values.item()
    assert abs(moments - expected) > 5 * (expected / 999) ** 0.5


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("width", [3, 6, 300])
def test_without_one_the_moments_are_kept(width: int, debiased: bool) -> None:
    a, b = pair(12, 1.0, seed=0, width=width)
    settings = Settings(null="moments", debiased=debiased)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare_features(a, b, settings)
        assert compare_features(a, a, settings).settings == settings
    assert found.settings == settings


def test_one_side_alone_is_no_matter_and_a_dead_layer_neither() -> None:
    _, b = pair(60, 1.0, seed=0)
    far, _ = pair(60, 30.0, seed=0)
    dead = Features({"y": torch.zeros(60, 3)}, b.ids, model="after", data="digits")
    for other in (b, dead):
        assert compare_features(far, other, Settings(null="moments")).settings.null == "moments"
    layers = Features({**far.layers, "dead": torch.zeros(60, 3)}, far.ids, model="far")
    assert compare_features(layers, layers, Settings(null="moments")).settings.null == "moments"  # with itself: 1


def test_how_many_permutations_can_be_asked_for() -> None:
    a, b = pair(40, 30.0, seed=0)
    with pytest.warns(UserWarning, match="from 19 permutations"):
        found = compare_features(a, b, Settings(null="moments", num_permutations=19))
    assert found.calibration is not None
    assert (found.calibration.p_values * 20).item() == pytest.approx(round((found.calibration.p_values * 20).item()))


def test_dominance_is_the_share_of_the_largest_row() -> None:
    rng = np.random.default_rng(0)
    K, L = (oracles.linear_gram(rng.standard_normal((9, 4))) for _ in range(2))
    H = np.eye(9) - 1 / 9
    shares = []
    for each in (K, L):
        centred = H @ each @ H
        centred -= np.trace(centred) / 8 * H
        shares.append((centred**2).sum(1).max() / (centred**2).sum())
    A, B = (torch.from_numpy(H @ each @ H)[None] for each in (K, L))
    assert dominance(A, B).item() == pytest.approx(4.5 * shares[0] * shares[1], rel=1e-10)
    assert dominance(A * 7, B) == pytest.approx(dominance(A, B))
    assert dominance(torch.zeros(1, 9, 9).double(), B).isnan().all()


def drawn_pairs() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    made = {}
    for n in (12, 40, 120):
        for factor in (1, 2, 3, 5, 10):
            X = rng.standard_normal((2, n, 10))
            X[:, 0] *= factor
            made[f"{n} samples, {factor} times as far"] = X
        made[f"{n} samples, tails of t(3)"] = rng.standard_t(3, (2, n, 10))
    return made


@pytest.mark.slow
def test_below_the_limit_the_moments_are_good() -> None:
    """Of those below it, 4 to 6.5 % of permutations are above the 5 % quantile; of those above, many are not."""
    kept, sent = [], []
    for X, Y in drawn_pairs().values():
        for debiased in (True, False):
            settings = Settings(debiased=debiased)
            A, B = (centred_grams([torch.from_numpy(each)], settings) for each in (X, Y))
            moments = permutation_moments(A, B)
            null = pearson3(*(each.item() for each in (moments.skewness, moments.mean, moments.variance.sqrt())))
            orders = draw_orders(len(X), 5000, seed=0)
            values = permuted_products(A, B, orders).flatten() * A.norm() * B.norm()
            above = float((values.numpy() >= null.isf(0.05)).mean())
            (kept if dominance(A, B).item() <= MAX_DOMINANCE else sent).append(above)
    assert len(kept) > 12
    assert len(sent) > 8
    assert min(kept) > 0.036
    assert max(kept) < 0.065
    assert sum(not 0.04 < share < 0.065 for share in sent) > len(sent) / 2
