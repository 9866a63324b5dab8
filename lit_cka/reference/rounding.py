"""What keeping the reference's features in fewer bits costs: `RoundingEstimate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.cka import cka_from_moments
from lit_cka.functional.moments import PairedMoments, add_samples, empty_moments
from lit_cka.parallel.collectives import all_reduce_moments
from lit_cka.reference.feature_store import FeatureStore

MAX_ROUNDING_COST = 1e-4
_NUM_TRIALS, _WIDTH = 4, 8


class RoundingEstimate:
    """Estimates how far CKA with rounded features is from CKA with exact ones, for one layer.

    A live model that has not moved yet would show too little: near 1, CKA changes with the square of the rounding.
    So it takes trial features in its place, random mixtures of the reference's with as much noise. They are few,
    so that less of the rounding averages out than in a real layer.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._mixing: Tensor | None = None
        self._moments: tuple[PairedMoments, PairedMoments] | None = None  # with exact and with rounded features

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        """Add a batch's features of the reference, (n, d) each."""
        if not len(exact):
            return
        if self._mixing is None or self._moments is None:
            d = exact.shape[1]
            self._mixing = torch.randn(d, _NUM_TRIALS * _WIDTH, generator=self._generator, dtype=torch.float64)
            empty = empty_moments(_NUM_TRIALS * _WIDTH, d, exact.device)
            self._moments = (empty, empty)
        mixed = (exact - exact[0]) @ self._mixing.to(exact.device)
        noise = torch.randn(mixed.shape, generator=self._generator, dtype=torch.float64).to(exact.device)
        trials = mixed + noise * mixed.std(dim=0, correction=0)
        self._moments = (add_samples(self._moments[0], trials, exact), add_samples(self._moments[1], trials, rounded))

    def cost(self, device: torch.device, group: Any = None) -> float:
        """The largest change of a trial's CKA, over all ranks; 0 where none is defined. Every rank has to call it."""
        empty = empty_moments(0, 0, device)
        exact, rounded = self._moments or (empty, empty)
        if dist.is_available() and dist.is_initialized():
            exact, rounded = all_reduce_moments(exact, group), all_reduce_moments(rounded, group)
        if not exact.xy.numel():
            return 0.0
        columns = torch.arange(_NUM_TRIALS * _WIDTH, device=device).split(_WIDTH)
        values = [[cka_from_moments(_trial(moments, c)) for moments in (exact, rounded)] for c in columns]
        before, after = torch.tensor(values).T
        lost = before.isnan() != after.isnan()  # infinite, for being rounded
        return float((before - after).abs().nan_to_num(0.0).masked_fill(lost, torch.inf).max())


def _trial(moments: PairedMoments, columns: Tensor) -> PairedMoments:
    """The moments of some of the columns of `x`: those that the plain estimator takes."""
    xx = moments.xx[columns][:, columns]
    return moments._replace(mean_x=moments.mean_x[columns], xx=xx, xy=moments.xy[columns], a=xx.trace())


def rounding_cost(stores: Iterable[FeatureStore], dtype: torch.dtype, device: torch.device, group: Any = None) -> float:
    """Return the most that keeping features in this type would change a score by; every rank has to call it.

    Args:
        stores: the features of each layer.
        dtype: the type.
        device: where to compute, and of the collectives.
        group: the processes that hold different samples; None for all.
    """
    cost = 0.0
    for store in stores:
        estimate = RoundingEstimate()
        for block in store.blocks:
            exact = block.to(device, torch.float64) + store.pivot.to(device)
            rounded = block.to(device, dtype).to(torch.float64) + store.pivot.to(device)
            estimate.add(exact, rounded)
        cost = max(cost, estimate.cost(device, group))
    return cost
