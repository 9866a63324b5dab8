"""Pure tensor mathematics: CKA, HSIC and the statistics behind them. Imports torch alone."""

from lit_cka.functional.cka import cka_from_gram, cka_from_moments, hsic, linear_cka, pairwise_hsic
from lit_cka.functional.kernels import linear_gram, rbf_gram
from lit_cka.functional.moments import (
    PairedMoments,
    add_samples,
    empty_moments,
    merge_moments,
    paired_moments,
    recentre_moments,
)

__all__ = [
    "PairedMoments",
    "add_samples",
    "cka_from_gram",
    "cka_from_moments",
    "empty_moments",
    "hsic",
    "linear_cka",
    "linear_gram",
    "merge_moments",
    "paired_moments",
    "pairwise_hsic",
    "rbf_gram",
    "recentre_moments",
]
