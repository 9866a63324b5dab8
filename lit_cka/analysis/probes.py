"""Linear probes next to CKA: did a layer change, and did the change help? `probe_layers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from lit_cka.analysis.features import Features, matched
from lit_cka.analysis.layer_ranges import layer_ranges
from lit_cka.analysis.linear_probe import ProbeResult, ProbeSettings, probe
from lit_cka.functional.centring import without_rounding
from lit_cka.functional.matrix import cka_matrix
from lit_cka.functional.units import in_usual_unit
from lit_cka.progress import progress_bar
from lit_cka.tracking.history import THRESHOLDS, verdict

_NOTHING_GAINED = 0.02  # accuracy, too little to train a layer for


@dataclass(frozen=True)
class ProbeRow:
    """One layer: CKA with its counterpart, and what logistic regression reads from it before and after.

    Attributes:
        error_before: standard error of `accuracy_before` over the folds.
        error_after: the same of `accuracy_after`.
        error_difference: standard error of `difference` over the samples, which both models' probes have read alike or
            not: of values of -1, 0 and 1 (McNemar 1947), so that what is hard for both does not count.
        verdict: "untouched", "refined", "rewritten" or "undefined", by the CKA alone.
        chosen_before: `(C, standardize)` of each fold's probe.
        chosen_after: the same, on the features after.
    """

    layer: str
    cka: float
    accuracy_before: float
    accuracy_after: float
    error_before: float
    error_after: float
    error_difference: float
    verdict: str
    chosen_before: list[tuple[float, bool]]
    chosen_after: list[tuple[float, bool]]

    @property
    def difference(self) -> float:
        """The accuracy gained."""
        return self.accuracy_after - self.accuracy_before

    @property
    def gained(self) -> bool:
        """Whether the labels are read better after than before, by more than two standard errors."""
        return self.difference > 2 * self.error_difference


def probe_layers(
    before: Features,
    after: Features,
    labels: Sequence[Any] | None = None,
    *,
    settings: ProbeSettings | None = None,
    debiased: bool = True,
    progress: bool = True,
) -> list[ProbeRow]:
    """Returns per layer the linear CKA of two models, and the accuracy of a linear probe on the features of each.

    The probe is scikit-learn's logistic regression, by stratified cross-validation over the same folds for both models,
    so that the accuracy is of samples it has not seen; see `ProbeSettings`.

    Args:
        before: features of the pretrained model.
        after: features of the fine-tuned model: the same samples, the same layers.
        labels: of the samples; None for those that `before` has.
        settings: of the probe; None for those of `ProbeSettings()`, which choose the regularisation and the scaling.
        debiased: use the unbiased HSIC in CKA. The plain one is near 1 for few samples of wide features, whatever they
            are (Murphy et al. 2024, arXiv 2405.01012).
        progress: show a progress bar.

    Raises:
        ValueError: if samples or layers differ, features are not finite, there are no labels, one class alone, or a
            class with fewer samples than the folds take.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)).double()
        >>> ids, labels = [str(number) for number in range(30)], [0, 1, 2] * 10
        >>> before, after = (
        ...     Features({"blocks.0": Z}, ids, model=name, labels=labels) for Z, name in ((X, "a"), (X + Y, "b"))
        ... )
        >>> settings = ProbeSettings(num_folds=2, C=1.0, standardize=False)
        >>> (row,) = probe_layers(before, after, settings=settings, progress=False)
        >>> row.layer, 0 <= row.accuracy_after <= 1
        ('blocks.0', True)
    """
    settings = settings or ProbeSettings()
    after = matched(before, after)
    if list(before.layers) != list(after.layers):
        raise ValueError(
            f"Expected two models with the same layers, but {before.model} has {list(before.layers)[:4]} and "
            f"{after.model} has {list(after.layers)[:4]}."
        )
    classes = _checked_labels(before.labels if labels is None else labels, before.num_samples)
    settings.check_classes(classes)
    for features in (before, after):
        _check_finite(features)
    codes = np.unique(classes, return_inverse=True)[1]
    rows = []
    with progress_bar("Probing", 2 * len(before.layers), enabled=progress) as advance:
        for name in before.layers:
            results = []
            for features in (before, after):
                X = without_rounding(in_usual_unit(features.layers[name])).numpy()
                results.append(probe(X, codes, settings))
                advance(1)
            cka = cka_matrix([before.layers[name]], [after.layers[name]], debiased=debiased).item()
            rows.append(_row(name, cka, *results))
    return rows


def _row(layer: str, cka: float, before: ProbeResult, after: ProbeResult) -> ProbeRow:
    changes = after.is_right.astype(float) - before.is_right
    error = float(changes.std(ddof=1) / np.sqrt(len(changes)))
    return ProbeRow(
        layer, cka, before.accuracy, after.accuracy, before.error, after.error, error, verdict(cka), before.chosen,
        after.chosen,
    )  # fmt: skip


def _check_finite(features: Features) -> None:
    for name, X in features.layers.items():
        is_broken = ~X.isfinite().all(dim=1)
        if is_broken.any():
            first = features.ids[int(is_broken.int().argmax())]
            raise ValueError(
                f"Expected finite features to probe, but layer {name!r} of {features.model} has NaN or infinite ones "
                f"in {int(is_broken.sum())} of {len(X)} samples, the first of which is {first!r}. Leave these samples "
                "or the layer out, or run the model in float32."
            )


def _checked_labels(labels: Sequence[Any] | None, num_samples: int) -> np.ndarray[Any, Any]:
    if labels is None:
        raise ValueError("Expected labels for the probe, but the features have none. Name the column that has them.")
    if len(labels) != num_samples:
        raise ValueError(f"Expected a label for each of {num_samples} samples, but got {len(labels)}.")
    missing = next((index for index, label in enumerate(labels) if label is None or label != label), None)
    if missing is not None:
        raise ValueError(f"Expected a label for each of {num_samples} samples, but sample {missing} has none.")
    classes = np.asarray(labels)
    if len(np.unique(classes)) < 2:
        raise ValueError(f"Expected labels of at least two classes, but all are {classes.tolist()[0]!r}.")
    return classes


def _could_be_frozen(row: ProbeRow) -> bool:
    """Returns whether a layer is similar to before, and no easier to read the labels from; NaN is not similar."""
    _, refined = THRESHOLDS
    return row.cka >= refined and (not row.gained or row.difference <= _NOTHING_GAINED)


def advice(rows: Sequence[ProbeRow]) -> str:
    """Returns what the table says about which layers fine-tuning could have left alone, and which it was for.

    It rests on the CKA and on gains beyond twice their standard error, not on the accuracies themselves, which change
    with the probe's regularisation.

    Example:
        >>> rest = {"error_before": 0.01, "error_after": 0.01, "error_difference": 0.01}
        >>> rest |= {"chosen_before": [], "chosen_after": []}
        >>> rows = [
        ...     ProbeRow("blocks.0", 0.99, 0.6, 0.6, verdict="untouched", **rest),
        ...     ProbeRow("blocks.1", 0.40, 0.6, 0.9, verdict="rewritten", **rest),
        ... ]
        >>> advice(rows).partition(":")[0]
        'blocks.0 could have been frozen'
    """
    names = [row.layer for row in rows]

    def listed(layers: Sequence[str]) -> str:
        return layer_ranges(layers, names)

    # From the first layer on: to freeze a layer above a trained one saves nothing.
    frozen = [row.layer for row in takewhile(_could_be_frozen, rows)]
    useful = [row.layer for row in rows if row.verdict == "rewritten" and row.gained]
    idle = [row.layer for row in rows if row.verdict == "rewritten" and not row.gained]
    best = max(rows, key=lambda row: row.accuracy_after)
    least = best.accuracy_after - 2 * best.error_after
    as_good = [row.layer for row in rows if row is not best and row.accuracy_after >= least]
    parts = [
        f"{listed(frozen)} could have been frozen: similar to before, and no easier to read the labels from."
        if frozen
        else "No layer from the first on could have been frozen: the first already changed, or gained."
    ]
    if useful:
        parts.append(f"{listed(useful)} changed and gained: there fine-tuning did its work.")
    if idle:
        parts.append(f"{listed(idle)} changed without a gain for these labels beyond its error.")
    others = f", and as well, within its error, from {listed(as_good)}" if as_good else ""
    parts.append(f"The labels are read best from {listed([best.layer])} (accuracy {best.accuracy_after:.3f}){others}.")
    return " ".join(parts)
