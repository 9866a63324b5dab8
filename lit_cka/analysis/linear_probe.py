"""Logistic regression as a linear probe: what can be read from features, by nested cross-validation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of features of unit variance: from hardly any weight on the features to hardly any penalty.
_CS = tuple(10.0**exponent for exponent in range(-3, 4))


@dataclass(frozen=True)
class ProbeSettings:
    """How a linear probe is fitted: scikit-learn's logistic regression with an L2 penalty.

    What is None is chosen inside each training fold, by a cross-validation of its own there: the `C` and the scaling of
    the highest accuracy, of equals the smallest `C`, unscaled. So no sample that a probe is judged by has had a part in
    it.

    Args:
        num_folds: of the stratified cross-validation that the accuracy is from.
        num_inner_folds: of the one inside each training fold.
        C: inverse strength of the penalty, as scikit-learn has it; None to choose it from 10^-3 to 10^3, for features
            whose variance is 1 on average in the training fold.
        standardize: give every feature unit variance by the training fold; None to choose. It hurts where large
            features say more than small ones, and helps where units are arbitrary.
        max_iter: of the solver.
        num_jobs: processes that fit probes at a time; -1 for one a core.
        seed: of all folds.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> ProbeSettings(C=1.0, standardize=True).is_nested  # nothing is left to choose
        False
    """

    num_folds: int = 5
    num_inner_folds: int = 5
    C: float | None = None
    standardize: bool | None = None
    max_iter: int = 1000
    num_jobs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_folds", 2), ("num_inner_folds", 2), ("max_iter", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Expected `{name}` of {least} or more, but got {getattr(self, name)}.")
        if self.C is not None and not 0 < self.C < float("inf"):
            raise ValueError(f"Expected `C` to be positive, or None to have it chosen, but got {self.C}.")
        if self.num_jobs < 1 and self.num_jobs != -1:
            raise ValueError(f"Expected `num_jobs` of 1 or more, or -1 for one a core, but got {self.num_jobs}.")

    @property
    def is_nested(self) -> bool:
        """Whether something is chosen inside the training folds."""
        return self.C is None or self.standardize is None

    def check_classes(self, labels: NDArray[Any]) -> None:
        """Raise a ValueError if a class has too few samples for the folds, with what to do about it."""
        classes, counts = np.unique(labels, return_counts=True)
        rare, fewest = classes.tolist()[counts.argmin()], int(counts.min())
        if fewest < self.num_folds:
            raise ValueError(
                f"Expected at least {self.num_folds} samples of each class, one for each fold, but class {rare!r} has "
                f"{fewest}. Use more samples, or fewer folds."
            )
        left = fewest - -(-fewest // self.num_folds)  # in the training fold that has fewest
        if self.is_nested and left < self.num_inner_folds:
            raise ValueError(
                f"Expected at least {self.num_inner_folds} samples of each class in every training fold, one for each "
                f"inner fold, but of the {fewest} of class {rare!r} there may be {left}. Use more samples or fewer "
                "inner folds, or give `C` and `standardize`, so that nothing is to be chosen."
            )


@dataclass(frozen=True)
class ProbeResult:
    """What a probe reads.

    Attributes:
        is_right: (n,), whether each sample's class was read right by the probe that had not seen it.
        fold_accuracies: (folds,), in [0, 1].
        chosen: the `(C, standardize)` that each fold's probe has.
    """

    is_right: NDArray[np.bool_]
    fold_accuracies: NDArray[np.float64]
    chosen: list[tuple[float, bool]]

    @property
    def accuracy(self) -> float:
        """Mean over the folds."""
        return float(self.fold_accuracies.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean over the folds."""
        return float(self.fold_accuracies.std(ddof=1) / np.sqrt(len(self.fold_accuracies)))


def probe(X: NDArray[np.float64], labels: NDArray[Any], settings: ProbeSettings) -> ProbeResult:
    """Returns what logistic regression reads of the classes `labels` (n,) from features `X` (n, d).

    It costs `num_folds` fits where `C` and `standardize` are given. To choose both takes 72 in place of each: for
    either scaling, a path of 7 values of C in every inner fold, each fit starting from the one before, and one fit at
    the best.

    Raises:
        ValueError: if a class has too few samples.
    """
    from sklearn.model_selection import StratifiedKFold
    from sklearn.utils.parallel import Parallel, delayed

    settings.check_classes(labels)
    folds = list(StratifiedKFold(settings.num_folds, shuffle=True, random_state=settings.seed).split(X, labels))
    fit = delayed(_fitted)
    fitted = Parallel(n_jobs=settings.num_jobs)(fit(X[train], labels[train], settings) for train, _ in folds)
    is_right = np.zeros(len(labels), dtype=bool)
    for (_, test), (model, unit, _) in zip(folds, fitted, strict=True):
        is_right[test] = model.predict(X[test] / unit) == labels[test]
    accuracies = np.array([is_right[test].mean() for _, test in folds])
    return ProbeResult(is_right, accuracies, [choice for _, _, choice in fitted])


def _fitted(
    X: NDArray[np.float64], labels: NDArray[Any], settings: ProbeSettings
) -> tuple[Any, float, tuple[float, bool]]:
    """Returns a probe fitted to a training fold, the unit of its features, and the `(C, standardize)` that it has."""
    from sklearn.exceptions import ConvergenceWarning

    # One number for all features keeps what they are to each other, so that it is no standardisation; it makes the
    # values of C mean the same for any features. A C that was given is meant for features as they are.
    variances = X.var(axis=0)
    is_dead = not variances.any()
    unit = 1.0 if is_dead or settings.C is not None else float(np.sqrt(variances[variances > 0].mean()))
    scalings = [False, True] if settings.standardize is None else [settings.standardize]
    with warnings.catch_warnings():
        # A probe that has not converged to the last digit is as good a probe.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Of scikit-learn's, that attributes will have other shapes: `_chosen` reads both.
        warnings.simplefilter("ignore", FutureWarning)
        models = [_model(settings, is_scaled).fit(X / unit, labels) for is_scaled in scalings]
    if not settings.is_nested:
        return models[0], unit, (float(settings.C or 0), scalings[0])
    chosen = [_chosen(model[-1]) for model in models]
    best = int(np.argmax([accuracy for accuracy, _ in chosen]))
    return models[best], unit, (chosen[best][1], scalings[best])


def _model(settings: ProbeSettings, is_scaled: bool) -> Any:
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if settings.is_nested:
        inner = StratifiedKFold(settings.num_inner_folds, shuffle=True, random_state=settings.seed)
        Cs = list(_CS) if settings.C is None else [settings.C]
        # By accuracy: the C of the highest likelihood reads up to 8 points worse from 144 samples of 64 features.
        regression = LogisticRegressionCV(Cs=Cs, cv=inner, scoring="accuracy", max_iter=settings.max_iter)
    else:
        regression = LogisticRegression(C=settings.C, max_iter=settings.max_iter)
    return make_pipeline(StandardScaler(), regression) if is_scaled else make_pipeline(regression)


def _chosen(regression: Any) -> tuple[float, float]:
    """Returns the mean accuracy over the inner folds of the best C, and that C, of a LogisticRegressionCV."""
    scores = regression.scores_  # (inner folds, ..., Cs), in releases before 1.10 for each class the same
    if isinstance(scores, dict):
        scores = next(iter(scores.values()))
    return float(np.mean(scores, axis=0).max()), float(np.ravel(regression.C_)[0])
