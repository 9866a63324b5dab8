"""`probe` beside the logistic regressions that one would publish, and without a look at the samples it is judged by."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lit_cka.analysis.linear_probe import ProbeSettings, probe


def sentence_embeddings(n: int = 800, d: int = 384) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors off the origin, the labels in the directions in which they spread most: to give each feature unit
    variance makes noise as loud as these.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n)
    F = rng.standard_normal((n, 30))
    F[:, :5] += 0.45 * (2 * y[:, None] - 1)
    X = F @ (rng.standard_normal((30, d)) * rng.gamma(0.5, size=d)) + 0.3 * rng.standard_normal((n, d)) + 0.5
    return X / np.linalg.norm(X, axis=1, keepdims=True), y


def fewer_digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X[:600], y[:600]


def published(X: np.ndarray, y: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Accuracies of plain, scaled and cross-validated logistic regression over the probe's folds."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    plain = LogisticRegression(max_iter=2000)
    chosen: Any = LogisticRegressionCV(Cs=10, max_iter=2000)
    models = {"plain": plain, "scaled": make_pipeline(StandardScaler(), plain)}
    if X.std(0).max() < 100:  # else it takes minutes, for less than the plain one
        models["cross-validated"] = chosen
    models["scaled, cross-validated"] = make_pipeline(StandardScaler(), chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, and of options that later releases rename
        return {name: float(cross_val_score(model, X, y, cv=folds).mean()) for name, model in models.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "num_seeds"),
    [
        (lambda: load_digits(return_X_y=True), 1),
        (lambda: load_wine(return_X_y=True), 3),
        (lambda: load_breast_cancer(return_X_y=True), 3),
        (sentence_embeddings, 3),
    ],
    ids=["digits", "wine", "breast_cancer", "sentence_embeddings"],
)
def test_as_good_as_what_one_would_publish(load: Callable[[], tuple[np.ndarray, np.ndarray]], num_seeds: int) -> None:
    """The mean over several draws of the folds, where that takes no minutes: of few samples, one draw is noise."""
    X, y = load()
    others = [published(X, y, seed) for seed in range(num_seeds)]
    means = {name: float(np.mean([each[name] for each in others])) for name in others[0]}
    found = float(np.mean([probe(X - X.mean(0), y, ProbeSettings(seed=seed)).accuracy for seed in range(num_seeds)]))
    print({name: round(value, 4) for name, value in means.items()}, "probe:", round(found, 4))
    assert found >= max(means.values()) - 0.01


@pytest.mark.slow
def test_the_scaling_is_off_where_it_hurts_and_on_where_it_helps() -> None:
    X, y = sentence_embeddings()
    found = {scaled: probe(X, y, ProbeSettings(2, C=1.0, standardize=scaled)).accuracy for scaled in (True, False)}
    assert found[False] > found[True] + 0.02
    chosen = probe(X, y, ProbeSettings(2))
    assert chosen.accuracy > found[True] + 0.02
    assert chosen.accuracy >= found[False] - 0.01
    X, y = load_wine(return_X_y=True)
    found = {scaled: probe(X, y, ProbeSettings(3, C=0.1, standardize=scaled)).accuracy for scaled in (True, False)}
    assert found[True] > found[False] + 0.02
    chosen = probe(X, y, ProbeSettings(3))
    assert chosen.accuracy >= found[True] - 0.015
    assert all(scaled for _, scaled in chosen.chosen)


def test_a_given_value_is_scikit_learns() -> None:
    """With nothing to choose, `cross_val_score` of the same regression."""
    X, y = load_wine(return_X_y=True)
    X = 3 * (X[:, :6] - X[:, :6].mean(0))
    folds = StratifiedKFold(4, shuffle=True, random_state=2)
    for scaled in (True, False):
        model = LogisticRegression(C=0.3, max_iter=1000)
        expected = cross_val_score(make_pipeline(StandardScaler(), model) if scaled else model, X, y, cv=folds)
        found = probe(X, y, ProbeSettings(4, C=0.3, standardize=scaled, seed=2))
        np.testing.assert_allclose(found.fold_accuracies, expected)
        assert found.chosen == [(0.3, scaled)] * 4
        assert found.is_right.mean() == pytest.approx(np.average(expected, weights=[45, 45, 44, 44]))
        assert found.error == pytest.approx(np.std(expected, ddof=1) / 2)
        assert found.accuracy == pytest.approx(expected.mean())


@pytest.mark.parametrize("settings", [ProbeSettings(3, num_inner_folds=2), ProbeSettings(3, C=1.0, standardize=True)])
def test_what_a_fold_is_judged_by_has_no_part_in_its_probe(settings: ProbeSettings) -> None:
    """Other features and labels of one fold: its own accuracy changes, and what its probe has been given does not."""
    rng = np.random.default_rng(1)
    y = np.arange(80) % 2
    X = rng.standard_normal((80, 5)) + 0.8 * y[:, None]
    _, test = next(iter(StratifiedKFold(3, shuffle=True, random_state=0).split(X, y)))
    other = X.copy()
    other[test] = 1e3 * rng.standard_normal((len(test), 5))
    before, after = (probe(each, y, settings) for each in (X, other))
    assert before.chosen[0] == after.chosen[0]
    other[test] = X[test]
    other[test[0]] *= 1e3
    again = probe(other, y, settings)
    np.testing.assert_array_equal(again.is_right[test[1:]], before.is_right[test[1:]])


def test_labels_without_a_trace_in_the_features_are_read_at_chance() -> None:
    """A search that saw the samples it is judged by would do better."""
    rng = np.random.default_rng(0)
    accuracies = [
        probe(rng.standard_normal((60, 40)), np.arange(60) % 2, ProbeSettings(2, num_inner_folds=2, seed=seed)).accuracy
        for seed in range(4)
    ]
    assert 0.35 < np.mean(accuracies) < 0.6


def test_neither_the_unit_of_the_features_counts_nor_dead_ones() -> None:
    X, y = load_wine(return_X_y=True)
    X = X[:, :6] - X[:, :6].mean(0)
    first, other = (probe(scale * X, y, ProbeSettings(2, standardize=False)) for scale in (1.0, 2.0**-12))
    assert first.chosen == other.chosen
    np.testing.assert_array_equal(first.is_right, other.is_right)
    dead = probe(np.c_[X, np.zeros((len(X), 194))], y, ProbeSettings(2, standardize=False))
    assert first.chosen == dead.chosen
    np.testing.assert_array_equal(first.is_right, dead.is_right)


@pytest.mark.slow  # new processes import scikit-learn
def test_jobs_change_nothing() -> None:
    X, y = fewer_digits()
    one, two = (
        probe(X[:120], y[:120] % 2, ProbeSettings(2, num_inner_folds=2, standardize=False, num_jobs=jobs))
        for jobs in (1, 2)
    )
    assert one.chosen == two.chosen
    np.testing.assert_array_equal(one.is_right, two.is_right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_folds": 1}, "`num_folds` of 2 or more, but got 1"),
        ({"num_inner_folds": 1}, "`num_inner_folds` of 2 or more, but got 1"),
        ({"max_iter": 0}, "`max_iter` of 1 or more, but got 0"),
        ({"C": 0.0}, "`C` to be positive, or None to have it chosen, but got 0"),
        ({"C": float("nan")}, "`C` to be positive, or None to have it chosen, but got nan"),
        ({"num_jobs": 0}, "`num_jobs` of 1 or more, or -1 for one a core, but got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeSettings(**options)


def test_classes_with_too_few_samples() -> None:
    y = np.array(["cat"] * 40 + ["dog"] * 3)
    X = np.random.default_rng(0).standard_normal((43, 2))
    with pytest.raises(ValueError, match="at least 5 samples of each class, one for each fold, but class 'dog' has 3"):
        probe(X, y, ProbeSettings())
    with pytest.raises(ValueError, match=r"of the 3 of class 'dog' there may be 2.* give `C` and `standardize`"):
        probe(X, y, ProbeSettings(3))
    assert probe(X, y, ProbeSettings(3, C=1.0, standardize=False)).accuracy > 0.8
    assert probe(X, y, ProbeSettings(3, num_inner_folds=2)).accuracy > 0.8
