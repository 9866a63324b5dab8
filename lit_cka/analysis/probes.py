"""Linear probes next to CKA: did a layer change, and did the change help? `probe_layers`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from lit_cka.analysis.features import Features, matched
from lit_cka.functional.centring import without_rounding
from lit_cka.functional.matrix import cka_matrix
from lit_cka.functional.units import in_usual_unit
from lit_cka.progress import progress_bar
from lit_cka.tracking.history import THRESHOLDS, verdict

_NOTHING_GAINED = 0.02  # accuracy


@dataclass(frozen=True)
class ProbeRow:
    """One layer: CKA with its counterpart, and what logistic regression reads from it before and after."""

    layer: str
    cka: float
    accuracy_before: float
    accuracy_after: float
    error_before: float  # standard error over the folds
    error_after: float
    verdict: str  # "untouched", "refined", "rewritten"

    @property
    def difference(self) -> float:
        """The accuracy gained."""
        return self.accuracy_after - self.accuracy_before


def probe_layers(
    before: Features,
    after: Features,
    labels: Sequence[Any] | None = None,
    *,
    num_folds: int = 5,
    C: float = 1.0,
    max_iter: int = 2000,
    debiased: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> list[ProbeRow]:
    """Returns per layer the linear CKA of two models, and the accuracy of a linear probe on the features of each.

    The probe is scikit-learn's logistic regression on standardised features, by stratified cross-validation over the
    same folds for both models, so that the accuracy is of samples it has not seen.

    Args:
        before: features of the pretrained model.
        after: features of the fine-tuned model: the same samples, the same layers.
        labels: of the samples; None for those that `before` has.
        num_folds: of the cross-validation.
        C: inverse strength of the probe's regularisation.
        max_iter: of its solver.
        debiased: use the unbiased HSIC in CKA.
        seed: of the folds.
        progress: show a progress bar.

    Raises:
        ValueError: if an option is out of range, samples or layers differ, there are no labels, one class alone, or a
            class with fewer samples than folds.
    """
    check_probe(num_folds, C)
    after = matched(before, after)
    if list(before.layers) != list(after.layers):
        raise ValueError(
            f"Expected two models with the same layers, but {before.model} has {list(before.layers)[:4]} and "
            f"{after.model} has {list(after.layers)[:4]}."
        )
    classes = _checked_labels(before.labels if labels is None else labels, before.num_samples, num_folds)
    rows = []
    with progress_bar("Probing", 2 * len(before.layers), enabled=progress) as advance:
        for name in before.layers:
            found = []
            for features in (before, after):
                X = without_rounding(in_usual_unit(features.layers[name])).numpy()
                found.append(_accuracies(X, classes, num_folds, C, max_iter, seed))
                advance(1)
            cka = cka_matrix([before.layers[name]], [after.layers[name]], debiased=debiased).item()
            means = [float(scores.mean()) for scores in found]
            errors = [float(scores.std(ddof=1) / np.sqrt(len(scores))) for scores in found]
            rows.append(ProbeRow(name, cka, means[0], means[1], errors[0], errors[1], verdict(cka)))
    return rows


def check_probe(num_folds: int, C: float) -> None:
    """Raise a ValueError if the options of a probe are out of range."""
    if num_folds < 2:
        raise ValueError(f"Expected `num_folds` of 2 or more, but got {num_folds}.")
    if not C > 0:
        raise ValueError(f"Expected `C` to be positive, but got {C}.")


def _checked_labels(labels: Sequence[Any] | None, num_samples: int, num_folds: int) -> np.ndarray[Any, Any]:
    if labels is None:
        raise ValueError("Expected labels for the probe, but the features have none. Name the column that has them.")
    if len(labels) != num_samples:
        raise ValueError(f"Expected a label for each of {num_samples} samples, but got {len(labels)}.")
    missing = next((index for index, label in enumerate(labels) if label is None or label != label), None)
    if missing is not None:
        raise ValueError(f"Expected a label for each of {num_samples} samples, but sample {missing} has none.")
    found, codes, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    classes = found.tolist()
    if len(classes) < 2:
        raise ValueError(f"Expected labels of at least two classes, but all are {classes[0]!r}.")
    if counts.min() < num_folds:
        rare = classes[counts.argmin()]
        raise ValueError(
            f"Expected at least {num_folds} samples of each class, one for each fold, but class {rare!r} has "
            f"{counts.min()}. Use more samples, or fewer folds."
        )
    return codes


def _accuracies(
    X: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], num_folds: int, C: float, max_iter: int, seed: int
) -> np.ndarray[Any, Any]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter))
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A probe that has not converged to the last digit is as good a probe.
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores: np.ndarray[Any, Any] = cross_val_score(probe, X, labels, cv=folds)
    return scores


def _could_be_frozen(row: ProbeRow) -> bool:
    """Returns whether a layer is similar to before, and no easier to read the labels from; NaN is not similar."""
    _, refined = THRESHOLDS
    return row.cka >= refined and row.difference <= max(_NOTHING_GAINED, 2 * row.error_after)


def advice(rows: Sequence[ProbeRow]) -> str:
    """Returns what the table says about which layers fine-tuning could have left alone, and which it was for."""
    # From the first layer on: to freeze a layer above a trained one saves nothing.
    frozen = [row.layer for row in takewhile(_could_be_frozen, rows)]
    useful = [row.layer for row in rows if row.verdict == "rewritten" and row.difference > 2 * row.error_after]
    idle = [row.layer for row in rows if row.verdict == "rewritten" and row.layer not in useful]
    best = max(rows, key=lambda row: row.accuracy_after)
    parts = [
        f"{_listed(frozen)} could have been frozen: similar to before, and no easier to read the labels from."
        if frozen
        else "No layer from the first on could have been frozen: the first already changed, or gained."
    ]
    if useful:
        parts.append(f"{_listed(useful)} changed and gained: there fine-tuning did its work.")
    if idle:
        parts.append(f"{_listed(idle)} changed without a gain for these labels beyond the noise of the folds.")
    parts.append(f"The labels are read best from {best.layer} (accuracy {best.accuracy_after:.3f}).")
    return " ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
