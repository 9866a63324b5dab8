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
from lit_cka.analysis.linear_probe import ProbeSettings, probe
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


def accuracies(X: np.ndarray, labels: list[Any], settings: ProbeSettings) -> np.ndarray:
    """With a given C, scaled by the training samples alone, if at all."""
    y, scores = np.asarray(labels), []
    for train, test in StratifiedKFold(settings.num_folds, shuffle=True, random_state=settings.seed).split(X, y):
        mean, deviation = X[train].mean(0), X[train].std(0) if settings.standardize else 1.0
        probe = LogisticRegression(C=settings.C, max_iter=1000).fit((X[train] - mean) / deviation, y[train])
        scores.append((probe.predict((X[test] - mean) / deviation) == y[test]).mean())
    return np.array(scores)


@pytest.mark.slow
def test_labels_are_not_read_from_rounding() -> None:
    """A dead feature whose last bits happen to know the classes, beside others that don't."""
    rng = np.random.default_rng(0)
    noise, classes = rng.standard_normal((len(LABELS), 6)), np.unique(LABELS, return_inverse=True)[1]
    layers = {"a": torch.from_numpy(noise), "b": torch.from_numpy(np.c_[noise, 6e-33 * np.eye(3)[classes]])}
    both = Features(layers, [str(index) for index in range(len(LABELS))], "model", labels=LABELS)
    for settings in (ProbeSettings(2, num_inner_folds=2), ProbeSettings(2, C=1.0, standardize=True)):
        rows = probe_layers(both, both, settings=settings, progress=False)
        assert rows[1].accuracy_before == rows[0].accuracy_before < 0.7


@pytest.mark.parametrize(
    "settings", [ProbeSettings(C=1.0, standardize=True), ProbeSettings(3, C=0.01, standardize=True, seed=4)]
)
def test_against_folds_by_hand(settings: ProbeSettings) -> None:
    rows = probe_layers(BEFORE, AFTER, settings=settings, progress=False)
    assert [row.layer for row in rows] == list(BEFORE.layers)
    for row in rows:
        X, Y = BEFORE.layers[row.layer], AFTER.layers[row.layer]
        for Z, mean, error in ((X, row.accuracy_before, row.error_before), (Y, row.accuracy_after, row.error_after)):
            scores = accuracies(Z.numpy(), LABELS, settings)
            assert mean == pytest.approx(scores.mean())
            assert error == pytest.approx(scores.std(ddof=1) / settings.num_folds**0.5)
        assert row.cka == pytest.approx(oracles.linear_cka(X, Y, debiased=True), abs=1e-10)
        assert row.verdict == verdict(row.cka, (0.99, 0.9))
        assert row.difference == row.accuracy_after - row.accuracy_before
        assert row.chosen_before == row.chosen_after == [(settings.C, True)] * settings.num_folds
    assert rows[2].difference > 0.2
    assert rows[2].accuracy_after > 0.9
    assert rows[2].gained


def test_the_error_of_a_difference_is_that_of_pairs() -> None:
    """Of samples, against the variance of a sum written out: `b` read right by the second alone, `c` by the first."""
    settings = ProbeSettings(3, C=0.1, standardize=True)
    row = probe_layers(BEFORE, AFTER, settings=settings, progress=False)[1]
    right = [probe(each.layers["blocks.1"].numpy(), np.array(LABELS), settings).is_right for each in (BEFORE, AFTER)]
    n, b, c = len(LABELS), int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    assert b > 0
    assert c > 0
    assert row.difference == pytest.approx((b - c) / n)
    assert row.error_difference == pytest.approx(((b + c - (b - c) ** 2 / n) / (n * (n - 1))) ** 0.5)


@pytest.mark.slow
def test_both_models_have_the_same_folds() -> None:
    two = dict(list(BEFORE.layers.items())[1:])
    first, copy = (replace(BEFORE, layers=two, model=model) for model in ("before", "copy"))
    for seed in range(2):
        for row in probe_layers(first, copy, settings=ProbeSettings(2, seed=seed, standardize=True), progress=False):
            assert (row.difference, row.error_before) == (0.0, row.error_after)
            assert (row.error_difference, row.gained) == (0.0, False)
            assert row.chosen_before == row.chosen_after
            assert row.cka == pytest.approx(1)


def test_labels_and_the_estimator_can_be_chosen() -> None:
    bare = replace(BEFORE, labels=None)
    numbers = [LABELS.index(each) for each in LABELS]
    options: dict[str, Any] = {"settings": ProbeSettings(3, C=1.0, standardize=True), "progress": False}
    assert probe_layers(bare, AFTER, numbers, **options) == probe_layers(BEFORE, AFTER, **options)
    plain = probe_layers(BEFORE, AFTER, debiased=False, **options)[0].cka
    X, Y = BEFORE.layers["blocks.0"], AFTER.layers["blocks.0"]
    assert plain == pytest.approx(oracles.linear_cka(X, Y, debiased=False), abs=1e-10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat"] * 42, "at least two classes, but all are 'cat'"),
        ([3] * 42, "at least two classes, but all are 3"),
        ([0] * 40 + [1] * 2, "at least 5 samples of each class, one for each fold, but class 1 has 2. Use more"),
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
    alive = replace(BEFORE, layers={"blocks.1": BEFORE.layers["blocks.1"]})
    dead = replace(AFTER, layers={"blocks.1": torch.full((42, 3), 0.1, dtype=torch.float64)})
    (row,) = probe_layers(alive, dead, settings=ProbeSettings(2), progress=False)
    assert np.isnan(row.cka)
    assert row.verdict == "undefined"
    assert 0.2 < row.accuracy_after < 0.4  # one class for all


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(value: float) -> None:
    X = AFTER.layers["blocks.1"].clone()
    X[[3, 5], 2] = value
    broken = replace(AFTER, layers={**AFTER.layers, "blocks.1": X})
    with pytest.raises(
        ValueError, match=r"'blocks\.1' of after has NaN or infinite ones in 2 of 42 samples.*is '3'\. "
    ):
        probe_layers(BEFORE, broken, progress=False)


def row(layer: str, cka: float, before: float, after: float, error: float = 0.01) -> ProbeRow:
    return ProbeRow(layer, cka, before, after, 0.01, 0.01, error, verdict(cka, (0.99, 0.9)), [], [])


NOTHING = "No layer from the first on could have been frozen: the first already changed, or gained."
FROZEN = "could have been frozen: similar to before, and no easier to read the labels from."
GAINED = "changed and gained: there fine-tuning did its work."
IDLE = "changed without a gain for these labels beyond its error."


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
        (  # a gain within its error
            [row("a", 0.95, 0.5, 0.6, 0.06), row("b", 0.999, 0.5, 0.5), row("c", 0.999, 0.5, 0.5)],
            f"a to c {FROZEN} The labels are read best from a (accuracy 0.600).",
        ),
        (  # a gain beyond its error, but too small to train a layer for; and one that is not
            [row("a", 0.95, 0.5, 0.515, 0.001), row("b", 0.95, 0.5, 0.53, 0.001)],
            f"a {FROZEN} The labels are read best from b (accuracy 0.530), and as well, within its error, from a.",
        ),
        (
            [row("a", float("nan"), 0.5, 0.5), row("b", 0.999, 0.5, 0.5)],
            f"{NOTHING} The labels are read best from a (accuracy 0.500), and as well, within its error, from b.",
        ),
    ],
)
def test_advice(rows: list[ProbeRow], text: str) -> None:
    assert advice(rows) == text


@pytest.mark.slow
def test_the_advice_does_not_change_with_the_regularisation() -> None:
    """The accuracies do: the advice rests on CKA and on gains beyond their error."""
    rng = np.random.default_rng(3)
    n, d = 300, 20
    labels = np.arange(n) % 2
    scales = np.arange(1, d + 1) ** -0.5
    first, other = (rng.standard_normal((n, d)) * scales for _ in range(2))
    shift = 2.0 * (2 * labels[:, None] - 1) * np.eye(d)[:1]
    before = [first, first, other + 0.1 * shift]
    after = [first + 0.05 * rng.standard_normal((n, d)) * scales, rng.standard_normal((n, d)) * scales, other + shift]
    sides = [
        Features(
            {f"blocks.{index}": torch.from_numpy(X) for index, X in enumerate(layers)},
            [str(index) for index in range(n)], name, labels=labels.tolist(),
        )
        for name, layers in (("before", before), ("after", after))
    ]  # fmt: skip
    said, accuracies = set(), []
    for settings in (
        *(ProbeSettings(C=C, standardize=scaled) for C in (0.01, 1.0, 100.0) for scaled in (True, False)),
        ProbeSettings(num_inner_folds=2, standardize=True),
    ):
        rows = probe_layers(*sides, settings=settings, progress=False)
        said.add(advice(rows).partition(" The labels")[0])
        accuracies.append(rows[2].accuracy_after)
    assert said == {f"blocks.0 {FROZEN} blocks.2 {GAINED} blocks.1 {IDLE}"}
    assert max(accuracies) - min(accuracies) > 0.01
