"""`probe_layers` against folds and logistic regression written out, and what `advice` makes of a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from lit_cka.analysis.features import Features
from lit_cka.analysis.probes import ProbeRow, advice, probe_layers
from lit_cka.tracking.history import verdict
from tests import oracles

LABELS = ["cat", "dog", "emu"] * 14


def features(signal: list[float], seed: int, model: str) -> Features:
    """Off-centre, badly scaled layers, from which the labels can be read the better the larger the signal."""
    rng = np.random.default_rng(seed)
    classes = np.unique(LABELS, return_inverse=True)[1]
    base = np.random.default_rng(9).standard_normal((len(LABELS), 6))
    layers = {}
    for index, size in enumerate(signal):
        X = base + 0.3 * rng.standard_normal(base.shape) + size * np.eye(6)[classes]
        layers[f"blocks.{index}"] = torch.from_numpy(X * np.logspace(-2, 3, 6) + 7)
    return Features(layers, [str(index) for index in range(len(LABELS))], model, labels=LABELS)


BEFORE, AFTER = features([0.2, 0.5, 0.5], 0, "before"), features([0.2, 0.5, 4.0], 1, "after")


def accuracies(X: np.ndarray, labels: list[Any], num_folds: int, C: float, seed: int) -> np.ndarray:
    """Standardised by the training samples alone."""
    y, scores = np.asarray(labels), []
    for train, test in StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(X, y):
        mean, deviation = X[train].mean(0), X[train].std(0)
        probe = LogisticRegression(C=C, max_iter=2000).fit((X[train] - mean) / deviation, y[train])
        scores.append((probe.predict((X[test] - mean) / deviation) == y[test]).mean())
    return np.array(scores)


def test_labels_are_not_read_from_rounding() -> None:
    """A dead feature whose last bits happen to know the classes, beside others that don't."""
    rng = np.random.default_rng(0)
    noise, classes = rng.standard_normal((len(LABELS), 6)), np.unique(LABELS, return_inverse=True)[1]
    layers = {"a": torch.from_numpy(noise), "b": torch.from_numpy(np.c_[noise, 6e-33 * np.eye(3)[classes]])}
    both = Features(layers, [str(index) for index in range(len(LABELS))], "model", labels=LABELS)
    rows = probe_layers(both, both, progress=False)
    assert rows[1].accuracy_before == rows[0].accuracy_before < 0.7


@pytest.mark.parametrize(("num_folds", "C", "seed"), [(5, 1.0, 0), (3, 0.01, 4)])
def test_against_folds_by_hand(num_folds: int, C: float, seed: int) -> None:
    rows = probe_layers(BEFORE, AFTER, num_folds=num_folds, C=C, seed=seed, progress=False)
    assert [row.layer for row in rows] == list(BEFORE.layers)
    for row in rows:
        X, Y = BEFORE.layers[row.layer], AFTER.layers[row.layer]
        for Z, mean, error in ((X, row.accuracy_before, row.error_before), (Y, row.accuracy_after, row.error_after)):
            scores = accuracies(Z.numpy(), LABELS, num_folds, C, seed)
            assert mean == pytest.approx(scores.mean())
            assert error == pytest.approx(scores.std(ddof=1) / num_folds**0.5)
        assert row.cka == pytest.approx(oracles.linear_cka(X, Y, debiased=True), abs=1e-10)
        assert row.verdict == verdict(row.cka, (0.99, 0.9))
        assert row.difference == row.accuracy_after - row.accuracy_before
    assert rows[2].difference > 0.2
    assert rows[2].accuracy_after > 0.9


def test_both_models_have_the_same_folds() -> None:
    for seed in range(3):
        for row in probe_layers(BEFORE, replace(BEFORE, model="copy"), num_folds=3, seed=seed, progress=False):
            assert (row.difference, row.error_before) == (0.0, row.error_after)
            assert row.cka == pytest.approx(1)


def test_labels_and_the_estimator_can_be_chosen() -> None:
    bare = replace(BEFORE, labels=None)
    numbers = [LABELS.index(each) for each in LABELS]
    options: dict[str, Any] = {"num_folds": 3, "progress": False}
    assert probe_layers(bare, AFTER, numbers, **options) == probe_layers(BEFORE, AFTER, **options)
    plain = probe_layers(BEFORE, AFTER, debiased=False, **options)[0].cka
    X, Y = BEFORE.layers["blocks.0"], AFTER.layers["blocks.0"]
    assert plain == pytest.approx(oracles.linear_cka(X, Y, debiased=False), abs=1e-10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat"] * 42, "at least two classes, but all are 'cat'"),
        ([3] * 42, "at least two classes, but all are 3"),
        ([0] * 40 + [1] * 2, "at least 5 samples of each class, one for each fold, but class 1 has 2"),
        (LABELS[:-1], "a label for each of 42 samples, but got 41"),
        ([*LABELS[:-1], None], "but sample 41 has none"),
        ([float("nan"), *range(41)], "but sample 0 has none"),
        ([None] * 42, "but sample 0 has none"),
        ([0.5 + index for index in range(42)], "class 0.5 has 1"),  # numbers to fit, not classes
    ],
)
def test_labels_that_can_not_be_probed(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_layers(BEFORE, AFTER, labels, progress=False)


def test_features_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="the features have none"):
        probe_layers(replace(BEFORE, labels=None), AFTER, progress=False)
    with pytest.raises(ValueError, match="sample 0 has the label 'cat' for before and 'emu' for after"):
        probe_layers(BEFORE, replace(AFTER, ids=AFTER.ids[::-1]), progress=False)
    other = replace(AFTER, layers=dict(list(AFTER.layers.items())[:2]))
    with pytest.raises(ValueError, match="same layers, but before has"):
        probe_layers(BEFORE, other, progress=False)


def test_a_constant_layer_says_nothing() -> None:
    dead = replace(AFTER, layers={**AFTER.layers, "blocks.1": torch.full((42, 3), 0.1, dtype=torch.float64)})
    row = probe_layers(BEFORE, dead, num_folds=3, progress=False)[1]
    assert np.isnan(row.cka)
    assert row.verdict == "undefined"
    assert 0.2 < row.accuracy_after < 0.4  # one class for all


def row(layer: str, cka: float, before: float, after: float, error: float = 0.01) -> ProbeRow:
    return ProbeRow(layer, cka, before, after, error, error, verdict(cka, (0.99, 0.9)))


NOTHING = "No layer from the first on could have been frozen: the first already changed, or gained."
FROZEN = "could have been frozen: similar to before, and no easier to read the labels from."
GAINED = "changed and gained: there fine-tuning did its work."
IDLE = "changed without a gain for these labels beyond the noise of the folds."


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [row("a", 0.995, 0.6, 0.6), row("b", 0.95, 0.6, 0.61), row("c", 0.5, 0.6, 0.9), row("d", 0.99, 0.6, 0.6)],
            f"a and b {FROZEN} c {GAINED} The labels are read best from c (accuracy 0.900).",
        ),
        (
            [row("a", 0.3, 0.5, 0.51), row("b", 0.2, 0.5, 0.8)],
            f"{NOTHING} b {GAINED} a {IDLE} The labels are read best from b (accuracy 0.800).",
        ),
        (  # the first changed little, but it gained
            [row("a", 0.95, 0.5, 0.6), row("b", 0.2, 0.7, 0.5)],
            f"{NOTHING} b {IDLE} The labels are read best from a (accuracy 0.600).",
        ),
        (  # a gain within the noise of the folds
            [row("a", 0.95, 0.5, 0.6, 0.06), row("b", 0.999, 0.5, 0.5), row("c", 0.999, 0.5, 0.5)],
            f"a, b and c {FROZEN} The labels are read best from a (accuracy 0.600).",
        ),
        (
            [row("a", float("nan"), 0.5, 0.5), row("b", 0.999, 0.5, 0.5)],
            f"{NOTHING} The labels are read best from a (accuracy 0.500).",
        ),
    ],
)
def test_advice(rows: list[ProbeRow], text: str) -> None:
    assert advice(rows) == text
