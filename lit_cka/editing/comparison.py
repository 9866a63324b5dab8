"""The variants of a model on one test set: metrics of each, and its CKA with the first; `Comparison`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.editing.evaluation import MetricSums
from lit_cka.reference.cache import Batch
from lit_cka.tracking.statistics import ExactStatistics, ReferenceSums

# Tells statistics that the reference's own sums come from elsewhere.
_LATER = ReferenceSums((), torch.empty(0), torch.empty(0), torch.empty(0))


class SetResults(NamedTuple):
    """Of one test set."""

    metrics: dict[str, dict[str, float]]  # by variant and metric
    cka: dict[str, dict[str, float]]  # by variant and layer, with the pretrained model
    num_cka_samples: int


class Comparison:
    """Collects, batch by batch, what the variants give on one test set.

    Args:
        variants: names; CKA is taken between each of `compared` and the first.
        compared: those of the variants, without the first, to take CKA of.
        layer_names: the layers that features come from.
        debiased: use the unbiased HSIC.
    """

    def __init__(
        self, variants: Sequence[str], compared: Sequence[str], layer_names: Sequence[str], *, debiased: bool
    ) -> None:
        self.layer_names = list(layer_names)
        self.debiased = debiased
        self._sums = {variant: MetricSums() for variant in variants}
        # The pretrained model's own sums are needed once: the first statistics of a layer add them up for all.
        self._statistics = {
            variant: {name: ExactStatistics(None if first else _LATER) for name in layer_names}
            for variant, first in zip(compared, [True] + [False] * len(compared), strict=False)
        }
        self._reference: dict[str, Tensor] = {}
        self._first = next(iter(variants))

    def add(
        self, variant: str, batch_idx: int, values: Mapping[str, Tensor], features: Mapping[str, Tensor],
        num_first: int | None, num_rows: int | None,
    ) -> None:  # fmt: skip
        """Add what a variant gave for a batch; the first variant has to come first.

        Args:
            variant: its name.
            batch_idx: index of the batch.
            values: of each sample, see `sample_values`.
            features: (rows, d) by layer; empty to take no CKA on this batch.
            num_first: so many samples of the batch count, None for all.
            num_rows: so many rows of the features count, None for all.
        """
        self._sums[variant].add(values, num_first)
        if num_rows == 0:
            return
        if variant == self._first:
            self._reference = {name: value[:num_rows] for name, value in features.items()}
        elif variant in self._statistics:
            for name, value in features.items():
                statistics = self._statistics[variant][name]
                statistics.add(Batch("test", 0, batch_idx), value[:num_rows], self._reference[name])

    def finish(self, device: torch.device) -> SetResults:
        """The results over all ranks; every rank has to call it."""
        names = sorted({name for sums in self._sums.values() for name in sums.names})
        if dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, names)
            names = sorted({name for some in gathered for name in some})
        metrics = {variant: sums.metrics(names, device) for variant, sums in self._sums.items()} if names else {}
        cka: dict[str, dict[str, float]] = {}
        num_samples = 0
        known: dict[str, ReferenceSums] = {}
        for variant, by_layer in self._statistics.items():
            cka[variant] = {}
            for name, statistics in by_layer.items():
                if name in known:
                    statistics.take_known(known[name])
                score = statistics.score(_no_recall, device, debiased=self.debiased)
                own = statistics.reference_sums()
                if name not in known and own is not None:
                    known[name] = own
                cka[variant][name] = score.cka
                num_samples = score.n
        if num_samples == 0:
            cka = {}
        return SetResults(metrics, cka, num_samples)


def _no_recall(batch: Batch, num_samples: int) -> Tensor:
    raise AssertionError("all variants see the same batches")
