"""Statistics of one layer against its reference over one pass: `ExactStatistics` and `MinibatchStatistics`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.cka import cka_from_moments
from lit_cka.functional.moments import PairedMoments, add_samples, empty_moments, without_yy
from lit_cka.metrics import MinibatchCKA
from lit_cka.parallel.collectives import all_reduce_moments
from lit_cka.reference.cache import Batch

# The first so many of the reference's samples (n, d_y) in a batch, from the cache.
Recall = Callable[[Batch, int], Tensor]
# So that the cost of adding rows is small against that of their products; narrow features take little memory.
_MIN_ROWS = 1024


class ReferenceSums(NamedTuple):
    """What the reference alone adds to the moments: the same in every pass over the same batches."""

    batches: tuple[tuple[Batch, int], ...]  # each with the number of its samples
    yy: Tensor
    bb: Tensor
    by: Tensor


class Score(NamedTuple):
    """CKA, the number of samples behind it, and whether all of their features were finite."""

    cka: float
    n: int
    finite: bool


class ExactStatistics:
    """Moments of all samples of a pass.

    Batches are gathered until there are as many samples as features: the products of many rows cost less, and the
    rows take no more memory than the moments.

    Args:
        known: the reference's own sums from an earlier pass. They are not computed again, as long as the features
            that come from the reference are those of then.
    """

    def __init__(self, known: ReferenceSums | None = None) -> None:
        self._known = known
        self._batches: list[tuple[Batch, int]] = []
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._moments: PairedMoments | None = None
        self._widths: tuple[int, int] | None = None

    def add(self, batch: Batch, X: Tensor, Y: Tensor) -> None:
        """Add a batch's features, `X` (n, d_x) of the live model and `Y` (n, d_y) of the reference, float64.

        Raises:
            ValueError: if `X` and `Y` differ in n, or the widths from those of earlier batches.
        """
        widths = (X.shape[1], Y.shape[1])
        if len(X) != len(Y):
            raise ValueError(f"the live model gave features of {len(X)} samples, the reference of {len(Y)}.")
        if self._widths not in (None, widths):
            raise ValueError(f"its features and the reference's were {self._widths} wide before, and now are {widths}.")
        self._widths = widths
        self._batches.append((batch, len(X)))
        self._rows.append((X, Y))
        if sum(len(x) for x, _ in self._rows) >= max(_MIN_ROWS, *widths):
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        X, Y = (torch.cat(rows) for rows in zip(*self._rows, strict=True))
        self._rows = []
        if self._moments is None:
            empty = empty_moments(X.shape[1], Y.shape[1], X.device)
            self._moments = empty if self._known is None else without_yy(empty)
        self._moments = add_samples(self._moments, X, Y)

    def take_known(self, known: ReferenceSums) -> None:
        """Take the reference's own sums from statistics of the same batches, in place of those given before."""
        self._known = known

    def forget_known(self, recall: Recall) -> None:
        """Compute the reference's own sums after all: the data are not those of the earlier pass any more."""
        if self._known is not None:
            self._known = None
            if self._moments is not None:
                done = self._batches[: len(self._batches) - len(self._rows)]
                self._moments = _with_yy(self._moments, done, recall)

    def score(self, recall: Recall, device: torch.device, *, debiased: bool) -> Score:
        """Linear CKA of all samples of the pass, of all ranks. Every rank has to call it."""
        self._flush()
        if self._moments is not None and self._known is not None:
            if self._known.batches == tuple(self._batches):
                self._moments = self._moments._replace(yy=self._known.yy, bb=self._known.bb, by=self._known.by)
            else:
                self._moments = _with_yy(self._moments, self._batches, recall)
            self._known = None
        moments = empty_moments(0, 0, device) if self._moments is None else self._moments
        if dist.is_available() and dist.is_initialized():
            moments = all_reduce_moments(moments)
        finite = bool(moments.a.isfinite() and moments.b.isfinite())
        return Score(cka_from_moments(moments, debiased=debiased).item(), int(moments.n), finite)

    def reference_sums(self) -> ReferenceSums | None:
        """What another pass over the same data needs not compute again; to be called after `score`."""
        if self._moments is None:
            return None
        return ReferenceSums(tuple(self._batches), self._moments.yy, self._moments.bb, self._moments.by)


def _with_yy(moments: PairedMoments, batches: Sequence[tuple[Batch, int]], recall: Recall) -> PairedMoments:
    """The moments with the sums over `y` alone, computed from the cached features of these batches."""
    own = empty_moments(len(moments.mean_y), 1, moments.n.device)
    for batch, num_samples in batches:
        Y = recall(batch, num_samples)
        own = add_samples(own, Y, Y[:, :1])
    return moments._replace(yy=own.xx, bb=own.aa, by=own.ax)


class MinibatchStatistics:
    """The same for the minibatch estimator, which keeps no more than each batch's HSIC."""

    def __init__(self) -> None:
        self._metric = MinibatchCKA(sync_on_compute=False)

    def add(self, batch: Batch, X: Tensor, Y: Tensor) -> None:
        self._metric = self._metric.to(X.device)
        self._metric.update([X], [Y])

    def forget_known(self, recall: Recall) -> None:
        """Nothing is known from earlier passes."""

    def score(self, recall: Recall, device: torch.device, *, debiased: bool) -> Score:
        """CKA from all batches of the pass, of all ranks. Every rank has to call it."""
        metric = self._metric.to(device)
        with warnings.catch_warnings():  # a rank without batches takes part all the same
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            with metric.sync_context():
                # In this order: `compute` ends the synchronisation.
                n, hsic = int(metric.n), (metric.hsic_xx, metric.hsic_yy)
                value = metric.compute()
        finite = all(bool(value.isfinite().all()) for value in hsic)
        return Score(value.item() if value.numel() else float("nan"), n, finite)

    def reference_sums(self) -> None:
        return None
