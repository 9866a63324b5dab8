"""Which measure `compare` computes, with which options: `Settings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lit_cka.analysis.rsa import Correlation
from lit_cka.functional.cka import min_num_samples
from lit_cka.functional.rsa import Distance

Measure: TypeAlias = Literal[
    "cka",
    "minibatch_cka",
    "rbf_cka",
    "sampled_features_cka",
    "rsa",
    "procrustes",
    "svcca",
    "pwcca",
    "mutual_knn",
    "cknna",
]
Null: TypeAlias = Literal["permutations", "moments"]
WITH_INTERVALS = ("cka", "rbf_cka")
WITH_MOMENTS = ("cka", "rbf_cka", "sampled_features_cka")
_CHOICES = {
    "measure": get_args(Measure),
    "distance": get_args(Distance),
    "comparison": get_args(Correlation),
    "null": get_args(Null),
}


@dataclass(frozen=True)
class Settings:
    """What to compute.

    Args:
        measure: "cka" (linear), "minibatch_cka", "rbf_cka", "sampled_features_cka", "rsa", "procrustes" (a distance),
            "svcca", "pwcca", "mutual_knn" or "cknna"; over all samples at once, but for "minibatch_cka", the mean of
            each batch's unbiased HSIC. "sampled_features_cka" is debiased linear CKA, corrected for features that are
            a sample too, "procrustes" a squared distance in [0, 2], 0 for equal, "pwcca" weighted by the first model's
            features, "mutual_knn" and "cknna" of nearest neighbours alone.
        debiased: use the unbiased HSIC, for "cka" and "rbf_cka".
        batch_size: of "minibatch_cka", at least 4; a rest of fewer than 4 samples is left out.
        distance: of "rsa"; "cosine", "correlation" or "euclidean".
        comparison: of "rsa"; "spearman", "pearson" or "kendall".
        bandwidth: of "rbf_cka", as a multiple of the median distance.
        num_neighbours: of "mutual_knn" and "cknna", fewer than the samples.
        variance: of "svcca": the share of each layer's variance whose directions are compared.
        intervals: confidence intervals, for "cka" and "rbf_cka"; of the population's CKA, about the debiased estimate
            whatever `debiased` is, from 8 samples on.
        num_permutations: permutations of the samples for p-values and calibrated scores, 0 for none.
        null: where these come from; "permutations", or "moments": the first three of all permutations, in closed form,
            which draw none; for "cka", "rbf_cka" and "sampled_features_cka". Where one sample decides how far chance
            reaches, `compare` warns, and permutes.
        level: of the intervals, and the quantile of the null that calibrated scores are measured from.
        effective_ranks: count the directions that each layer uses (RankMe).
        seed: of permutations, and of the samples that intervals are from where there are more than 512.

    Raises:
        ValueError: if an option is unknown or out of range, or asked for where there is no such thing.

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
    num_neighbours: int = 10
    variance: float = 0.99
    intervals: bool = True
    num_permutations: int = 0
    null: Null = "permutations"
    level: float = 0.95
    effective_ranks: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Expected `{name}` to be one of {', '.join(choices)}, but got {getattr(self, name)!r}."
                )
        for name, least in (
            ("batch_size", min_num_samples(debiased=True)),
            ("num_neighbours", 1),
            ("num_permutations", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"Expected `{name}` to be at least {least}, but got {getattr(self, name)}.")
        if self.bandwidth <= 0:
            raise ValueError(f"Expected `bandwidth` to be positive, but got {self.bandwidth}.")
        if not 0 < self.variance <= 1:
            raise ValueError(f"Expected `variance` to be in (0, 1], but got {self.variance}.")
        if not 0 < self.level < 1:
            raise ValueError(f"Expected `level` to be in (0, 1), but got {self.level}.")
        self._check_measure()

    def _check_measure(self) -> None:
        """Raise a ValueError where the measure has no such thing."""
        if self.null == "moments" and self.measure not in WITH_MOMENTS:
            raise ValueError(
                f"Expected `measure` to be one of {', '.join(WITH_MOMENTS)} for the moments of the null, but got "
                f"{self.measure!r}: set `null` to 'permutations'."
            )

    @property
    def with_intervals(self) -> bool:
        """Whether intervals are asked for, of a measure that has them."""
        return self.intervals and self.measure in WITH_INTERVALS

    @property
    def calibrated(self) -> bool:
        """Whether p-values and calibrated scores are asked for."""
        return self.num_permutations > 0 or self.null == "moments"

    @property
    def equal(self) -> float:
        """The value of equal features, the best there is."""
        return 0.0 if self.measure == "procrustes" else 1.0
