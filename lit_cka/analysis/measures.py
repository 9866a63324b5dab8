"""What can be computed of two models' features: `Settings` say which measure, `similarity` gives the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lit_cka.analysis.rsa import Correlation, pairwise_rsa
from lit_cka.functional.cka import cka_from_gram, min_num_samples
from lit_cka.functional.kernels import linear_gram, rbf_gram
from lit_cka.functional.matrix import cka_matrix
from lit_cka.functional.procrustes import procrustes_distance
from lit_cka.functional.rsa import Distance, rdm
from lit_cka.functional.units import in_usual_unit

Measure: TypeAlias = Literal["cka", "minibatch_cka", "rbf_cka", "rsa", "procrustes"]
_CHOICES = {"measure": get_args(Measure), "distance": get_args(Distance), "comparison": get_args(Correlation)}


@dataclass(frozen=True)
class Settings:
    """What to compute.

    Args:
        measure: "cka" (linear, over all samples at once), "minibatch_cka" (mean of each batch's unbiased HSIC),
            "rbf_cka", "rsa", or "procrustes" (a squared distance in [0, 2]: 0 for equal).
        debiased: use the unbiased HSIC, for "cka" and "rbf_cka".
        batch_size: of "minibatch_cka", at least 4; a rest of fewer than 4 samples is left out.
        distance: of "rsa": "cosine", "correlation" or "euclidean".
        comparison: of "rsa": "spearman", "pearson" or "kendall".
        bandwidth: of "rbf_cka", as a multiple of the median distance.
        num_resamples: bootstrap resamples for the intervals, 0 for none; for "cka" and "rbf_cka".
        num_permutations: for p-values, 0 for none; for "cka" and "rbf_cka".
        level: of the intervals.
        seed: of resamples and permutations.

    Raises:
        ValueError: if an option is unknown or out of range, or intervals are asked for where there are none.

    Example:
        >>> Settings("rsa", distance="cosine").comparison
        'spearman'
    """

    measure: Measure = "cka"
    debiased: bool = True
    batch_size: int = 64
    distance: Distance = "correlation"
    comparison: Correlation = "spearman"
    bandwidth: float = 1.0
    num_resamples: int = 0
    num_permutations: int = 0
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Expected `{name}` to be one of {', '.join(choices)}, but got {getattr(self, name)!r}."
                )
        for name, least in (
            ("batch_size", min_num_samples(debiased=True)),
            ("num_resamples", 0),
            ("num_permutations", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"Expected `{name}` to be at least {least}, but got {getattr(self, name)}.")
        if self.bandwidth <= 0:
            raise ValueError(f"Expected `bandwidth` to be positive, but got {self.bandwidth}.")
        if (self.num_resamples or self.num_permutations) and self.measure not in ("cka", "rbf_cka"):
            raise ValueError(f"Intervals and p-values are for 'cka' and 'rbf_cka', but `measure` is {self.measure!r}.")
        if not 0 < self.level < 1:
            raise ValueError(f"Expected `level` to be in (0, 1), but got {self.level}.")


def similarity(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    """Returns the measure of every layer of `Xs` with every layer of `Ys`: (k, l), float64; `Ys` may be `Xs` itself."""
    return _MEASURES[settings.measure](Xs, Ys, settings)


def gram_matrices(layers: Sequence[Tensor], settings: Settings) -> Tensor:
    """Returns the samples' Gram matrices (layers, n, n) by the measure's kernel, float64, of features in their unit."""
    layers = [in_usual_unit(X) for X in layers]
    if settings.measure == "rbf_cka":
        return torch.stack([rbf_gram(X, bandwidth=settings.bandwidth) for X in layers])
    return torch.stack([linear_gram(X) for X in layers])


def _cka(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    return cka_matrix(Xs, Ys, debiased=settings.debiased)


def _minibatch_cka(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    from lit_cka.metrics import MinibatchCKA

    metric, needed = MinibatchCKA(), min_num_samples(debiased=True)
    if len(Xs[0]) < needed:
        raise ValueError(f"Expected at least {needed} samples for a batch, but got {len(Xs[0])}.")
    for start in range(0, len(Xs[0]), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        if len(Xs[0][part]) >= needed:
            metric.update([X[part] for X in Xs], [Y[part] for Y in Ys])
    return metric.compute()


def _rbf_cka(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    Ks = gram_matrices(Xs, settings)
    Ls = Ks if Xs is Ys else gram_matrices(Ys, settings)
    return _every_pair(partial(cka_from_gram, debiased=settings.debiased), Ks, Ls)


def _rsa(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    Rs = torch.stack([rdm(X, settings.distance) for X in Xs])
    Ss = Rs if Xs is Ys else torch.stack([rdm(Y, settings.distance) for Y in Ys])
    return pairwise_rsa(Rs, Ss, settings.comparison)


def _procrustes(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    return _every_pair(procrustes_distance, Xs, Ys)


def _every_pair(measure: Callable[[Tensor, Tensor], Tensor], Xs: Iterable[Tensor], Ys: Iterable[Tensor]) -> Tensor:
    """Returns a scalar measure of every one of `Xs` with every one of `Ys`, as a matrix."""
    return torch.stack([torch.stack([measure(X, Y) for Y in Ys]) for X in Xs])


_MEASURES = {
    "cka": _cka,
    "minibatch_cka": _minibatch_cka,
    "rbf_cka": _rbf_cka,
    "rsa": _rsa,
    "procrustes": _procrustes,
}
