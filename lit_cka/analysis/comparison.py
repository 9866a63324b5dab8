"""Compare two models layer by layer: `compare`, and `compare_features` for features that are there already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lit_cka.analysis.calibration import Calibration, calibrate
from lit_cka.analysis.extraction import extract
from lit_cka.analysis.features import Features, matched
from lit_cka.analysis.measures import similarity
from lit_cka.analysis.null_choice import null_that_fits
from lit_cka.analysis.settings import Settings
from lit_cka.analysis.uncertainty import cka_intervals, repeated_samples
from lit_cka.features.given_masks import Mask
from lit_cka.features.layers import Layers
from lit_cka.features.pooling import Pooling
from lit_cka.functional.jackknife import MIN_SAMPLES
from lit_cka.functional.rankme import rankme
from lit_cka.tracking.history import verdict

_IN_TABLES = ("low", "high", "p", "p_best", "excess")


@dataclass(frozen=True)
class Comparison:
    """A matrix of layers by layers, with the intervals, calibrated scores and ranks that were asked for.

    Attributes:
        values: (layers of a, layers of b); NaN where undefined.
        low: lower ends of the intervals for the population's CKA, about the debiased estimates; None for other measures
            and for fewer than 8 samples.
        high: upper ends.
        calibration: p-values, and how far the values are above chance.
        ranks_a: how many directions each layer of model a uses (RankMe).
        ranks_b: the same of model b.
        num_repeated: how many samples have the features of another one in every layer, where there are intervals or
            p-values, which are for independent samples; a warning says so if they are more than 5 %.
        layers_a: layer names of model a.
        layers_b: layer names of model b.

    Example:
        >>> values = np.array([[0.995, 0.7], [0.6, 0.8]])
        >>> names = ["blocks.0", "blocks.1"]
        >>> comparison = Comparison(values, names, names, "before", "after", "digits", 100, Settings())
        >>> [(row["layer"], row["verdict"]) for row in comparison.diagonal()]
        [('blocks.0', 'untouched'), ('blocks.1', 'rewritten')]
    """

    values: NDArray[np.float64]
    layers_a: list[str]
    layers_b: list[str]
    model_a: str
    model_b: str
    data: str
    num_samples: int
    settings: Settings
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    calibration: Calibration | None = None
    ranks_a: list[float] | None = None
    ranks_b: list[float] | None = None
    num_repeated: int = 0

    @property
    def has_counterparts(self) -> bool:
        """Whether both models have the same layers, so that the diagonal says something."""
        return self.layers_a == self.layers_b

    @property
    def is_with_itself(self) -> bool:
        """Whether a model is compared with itself on the same data, so that half of the matrix says all."""
        same = self.model_a == self.model_b and self.has_counterparts
        if not same or not np.allclose(self.values, self.values.T, equal_nan=True):
            return False
        defined = self.values.diagonal()[~np.isnan(self.values.diagonal())]
        return np.allclose(defined, self.settings.equal)

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Returns the matrices that there are, by short names."""
        scores = self.calibration
        held = {"values": self.values, "low": self.low, "high": self.high}
        if scores is not None:
            held |= {"p": scores.p_values, "p_best": scores.adjusted_p_values, "excess": scores.excess}
            held["threshold"] = scores.thresholds
        return {name: array for name, array in held.items() if array is not None}

    def diagonal(self) -> list[dict[str, Any]]:
        """Returns a row for each layer and its counterpart: layer, value, verdict, and what else there is of each."""
        if not self.has_counterparts:
            raise ValueError(f"Expected models with the same layers, but {self.model_a} and {self.model_b} differ.")
        rows: list[dict[str, Any]] = []
        for index, name in enumerate(self.layers_a):
            row: dict[str, Any] = {"layer": name, "value": float(self.values[index, index])}
            for key, held in self.arrays().items():
                if key in _IN_TABLES:
                    row[key] = float(held[index, index])
            if self.ranks_a is not None and self.ranks_b is not None:
                row |= {"rank_a": self.ranks_a[index], "rank_b": self.ranks_b[index]}
            if self.settings.measure.endswith("cka"):
                row["verdict"] = verdict(row["value"])
            rows.append(row)
        return rows


def compare(
    model_a: nn.Module,
    model_b: nn.Module | None,
    loader: Iterable[Any],
    loader_b: Iterable[Any] | None = None,
    *,
    layers: Layers | None = None,
    layers_b: Layers | None = None,
    pooling: Pooling = "mean",
    mask: Mask | None = None,
    names: tuple[str, str] = ("a", "b"),
    data: str = "data",
    settings: Settings | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    distributed: bool = False,
) -> Comparison:
    """Returns the similarity of every layer of one model with every layer of another, whatever they are.

    Each model is run once over its loader, and the features of all samples are kept in memory (n times the widths of
    all layers, float64).

    Args:
        model_a: the first network.
        model_b: the second; None to compare the first with itself.
        loader: batches for the first, see `extract`.
        loader_b: batches for the second, of the same samples in the same order; None for `loader`.
        layers: of the first model.
        layers_b: of the second; None for what `layers` says.
        pooling: as in `FeatureExtractor`.
        mask: which tokens count, as in `FeatureExtractor`.
        names: of the models, for tables and figures.
        data: name of the dataset.
        settings: what to compute; None for debiased linear CKA.
        device: where to run the models.
        progress: show progress bars.
        distributed: share the batches out over the ranks, which all have to call it; see `extract`.

    Raises:
        ValueError: if samples differ in number, id or order, or there are too few.

    Example:
        >>> X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> compare(net, None, [X], layers=["0", "2"], progress=False).values.shape
        (2, 2)
    """
    options: dict[str, Any] = {"pooling": pooling, "mask": mask, "device": device, "data": data, "progress": progress}
    options["distributed"] = distributed
    a = extract(model_a, loader, layers=layers, name=names[0], **options)
    if model_b is None:
        return compare_features(a, a, settings)
    b = extract(
        model_b,
        loader if loader_b is None else loader_b,
        layers=layers if layers_b is None else layers_b,
        name=names[1],
        **options,
    )
    return compare_features(a, matched(a, b, same_loader=loader_b is None), settings)


def compare_features(a: Features, b: Features, settings: Settings | None = None) -> Comparison:
    """Returns what `compare` does, from features; the same object twice compares a model with itself.

    Raises:
        ValueError: if samples differ in number, id or order, or there are too few.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)).double()
        >>> ids = [str(number) for number in range(30)]
        >>> before, after = (Features({"blocks.0": Z}, ids, model=name) for Z, name in ((X, "a"), (X + Y, "b")))
        >>> row = compare_features(before, after).diagonal()[0]
        >>> row["layer"], row["low"] < row["value"] < row["high"]
        ('blocks.0', True)
    """
    settings = settings or Settings()
    same = a is b
    b = a if same else matched(a, b)
    Xs = list(a.layers.values())
    Ys = Xs if same else list(b.layers.values())
    values = similarity(Xs, Ys, settings)
    low = high = ranks_a = ranks_b = None
    if settings.with_intervals and a.num_samples >= MIN_SAMPLES:
        debiased = values if settings.debiased else similarity(Xs, Ys, replace(settings, debiased=True))
        low, high = (end.numpy() for end in cka_intervals(Xs, Ys, debiased, settings))
    num_repeated = 0
    if low is not None or settings.calibrated:
        too_sure = "intervals are too narrow, and p-values too small"
        num_repeated = repeated_samples(Xs if same else [*Xs, *Ys], a.data, too_sure)
    settings = null_that_fits(a, b, settings)
    calibration = calibrate(Xs, Ys, values, settings) if settings.calibrated else None
    if settings.effective_ranks:
        ranks_a = [rankme(X) for X in Xs]
        ranks_b = ranks_a if same else [rankme(Y) for Y in Ys]
    return Comparison(
        values.numpy(), list(a.layers), list(b.layers), a.model, b.model,
        " and ".join(dict.fromkeys([a.data, b.data])), a.num_samples, settings, low, high, calibration, ranks_a,
        ranks_b, num_repeated,
    )  # fmt: skip
