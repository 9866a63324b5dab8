"""The variants of a model on one test set: metrics of each, and its CKA with the first; `VariantComparison`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.editing.evaluation import MetricSums
from lit_cka.parallel.ranks import run_on_all_ranks
from lit_cka.statistics.layer import ExactStatistics


class SetResults(NamedTuple):
    """The results of one test set."""

    metrics: dict[str, dict[str, float]]  # by variant and metric; empty if none was evaluated
    cka: dict[str, dict[str, float]]  # by variant and layer, with the pretrained model
    num_samples: int
    num_cka_samples: int

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not self.num_samples and not self.num_cka_samples


class VariantComparison:
    """Collects, batch by batch, what the variants give on one test set.

    Args:
        first: name of the variant that others are compared with by CKA.
        evaluated: names of those to take metrics of.
        compared: names of those to take CKA of, without the first.
        layer_names: the layers that features come from.
        debiased: use the unbiased HSIC.
    """

    def __init__(
        self,
        first: str,
        evaluated: Sequence[str],
        compared: Sequence[str],
        layer_names: Sequence[str],
        *,
        debiased: bool,
    ) -> None:
        self.layer_names = list(layer_names)
        self.debiased = debiased
        self._sums = {variant: MetricSums() for variant in evaluated}
        self._statistics = {variant: {name: ExactStatistics() for name in layer_names} for variant in compared}
        self._reference: dict[str, Tensor] = {}
        self._first = first

    def add(
        self, variant: str, values: Mapping[str, Tensor], features: Mapping[str, Tensor],
        num_first: int | None, num_rows: int | None,
    ) -> None:  # fmt: skip
        """Add what a variant gave for a batch; the first variant has to come first.

        Args:
            variant: its name.
            values: of each sample, see `sample_values`.
            features: (rows, d) by layer; empty to take no CKA on this batch.
            num_first: so many samples of the batch count, None for all.
            num_rows: so many rows of the features count, None for all.
        """
        if variant in self._sums:
            self._sums[variant].add(values, num_first)
        if num_rows == 0:
            return
        if variant == self._first:
            self._reference = {name: value[:num_rows] for name, value in features.items()}
        elif variant in self._statistics:
            for name, value in features.items():
                statistics = self._statistics[variant][name]
                statistics.add(value[:num_rows], self._reference[name])

    def finish(self, device: torch.device) -> SetResults:
        """Returns the results over all ranks; every rank has to call it."""
        names_here = {name for sums in self._sums.values() for name in sums.names}
        names = sorted(set().union(*run_on_all_ranks(lambda: names_here)))
        metrics = {variant: sums.metrics(names, device) for variant, sums in self._sums.items()} if names else {}
        cka: dict[str, dict[str, float]] = {}
        num_cka_samples = 0
        for variant, by_layer in self._statistics.items():
            cka[variant] = {}
            for name, statistics in by_layer.items():
                score = statistics.score(device, debiased=self.debiased)
                cka[variant][name] = score.cka
                num_cka_samples = score.n
        num_samples = round(next(iter(metrics.values()))["n"]) if metrics else 0
        return SetResults(metrics, cka if num_cka_samples else {}, num_samples, num_cka_samples)
