"""A trainer's test of all variants of a model, batch by batch: `VariantTest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lit_cka.editing.comparison import SetResults, VariantComparison
from lit_cka.editing.evaluation import sample_values
from lit_cka.editing.evaluation_plan import EvaluationPlan
from lit_cka.editing.loaded_sets import loaded_sets
from lit_cka.editing.placement import Placement
from lit_cka.editing.results import EvaluationResults
from lit_cka.features.extractor import FeatureExtractor
from lit_cka.features.lightning_private import limit_batches
from lit_cka.features.pooling import Pooling
from lit_cka.reference.arguments import batch_copy
from lit_cka.tracking.dataloaders import num_first_samples


class VariantTest:
    """Puts every batch through all variants of a model, in turns, and collects what is measured.

    Args:
        trainer: that tests.
        model: which takes the variants' weights.
        variants: their weights by name, the pretrained model's first.
        plan: what to measure.
        layer_names: of the features for CKA.
        pooling: of these.
        debiased: use the unbiased HSIC.
        copy: whether the variants' weights are in files.

    Raises:
        ValueError: if CKA is to be taken on a test set that isn't there.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        model: nn.Module,
        variants: Mapping[str, Mapping[str, Tensor]],
        plan: EvaluationPlan,
        layer_names: Sequence[str],
        pooling: Pooling,
        *,
        debiased: bool,
        copy: bool,
    ) -> None:
        self._trainer, self._model, self._plan = trainer, model, plan
        self._device = trainer.strategy.root_device
        self._sets = loaded_sets(trainer)
        plan.check_sets([each.name for each in self._sets])
        limit_batches(trainer, [plan.max_batches(each.name) for each in self._sets])
        evaluated = plan.evaluated(list(variants))
        first = next(iter(variants))
        self._metrics_of = set(evaluated) if plan.evaluate else set()
        self._cka_of = {name for name in evaluated if name != first and not name.startswith("wise_ft")}
        taking_part = {name: value for name, value in variants.items() if name in evaluated}
        if plan.takes_cka:
            taking_part = {first: variants[first], **taking_part}
        self._first = first
        self._placement = Placement(model, taking_part, copy=copy)
        self._extractor = FeatureExtractor(model, list(layer_names), pooling)
        self._comparisons: list[VariantComparison | None] = [
            VariantComparison(
                first,
                [name for name in evaluated if name in self._metrics_of],
                [name for name in evaluated if name in self._cka_of] if plan.takes_cka_on(each.name) else [],
                layer_names,
                debiased=debiased,
            )
            for each in self._sets
        ]
        self._done: list[SetResults] = []
        self._is_within_batch = False

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Put a batch through all variants."""
        self._finish_before(dataloader_idx)
        comparison = self._comparisons[dataloader_idx]
        assert comparison is not None
        self._is_within_batch = True
        first_of = partial(num_first_samples, self._trainer, "test", dataloader_idx, batch_idx)
        num_first, num_rows = first_of(), first_of(max_batches=self._plan.max_cka_batches)
        if num_rows is not None and isinstance(batch, Mapping) and "sample" in batch:
            num_rows = int((batch["sample"] < num_rows).sum())
        if not self._plan.takes_cka_on(self._sets[dataloader_idx].name):
            num_rows = 0
        to_classes = self._sets[dataloader_idx].to_classes
        # Hooks for each batch anew: Lightning tells a module nothing about errors and interrupts in between.
        with self._extractor, self._placement.all_in_turn() as variants:
            for variant in variants:
                with_cka = num_rows != 0 and (variant == self._first or variant in self._cka_of)
                if not with_cka and variant not in self._metrics_of:
                    continue
                self._extractor.enabled = with_cka
                values = sample_values(self._model, batch_copy(batch), to_classes)
                features = self._extractor.collect() if with_cka else {}
                comparison.add(variant, values, features, num_first, num_rows)
        self._is_within_batch = False

    def results_so_far(self) -> EvaluationResults | None:
        """Returns what was evaluated before an interrupt, None if nothing; see `MonoSoupEditor.results_so_far`."""
        done = [*self._done]
        if len(done) < len(self._comparisons) and not self._is_within_batch and self._trainer.world_size == 1:
            comparison = self._comparisons[len(done)]
            assert comparison is not None
            done.append(comparison.finish(self._device))
        by_name = {test_set.name: each for test_set, each in zip(self._sets, done, strict=False) if not each.is_empty}
        return EvaluationResults.of(by_name) if by_name else None

    def results(self) -> EvaluationResults:
        """Returns the results of all test sets, at the end of the test; every rank has to call it.

        Raises:
            ValueError: if a test set had no samples.
        """
        self._finish_before(len(self._comparisons))
        by_name = {
            test_set.name: each
            for test_set, each in zip(self._sets, self._done, strict=True)
            if self._plan.evaluate or self._plan.takes_cka_on(test_set.name)
        }
        empty = [name for name, results in by_name.items() if results.is_empty]
        if empty:
            raise ValueError(f"Expected all test sets to have samples, but {', '.join(map(repr, empty))} had none.")
        return EvaluationResults.of(by_name)

    def _finish_before(self, dataloader_idx: int) -> None:
        """Compute the results of the test sets before this one, whose statistics then need no memory any more."""
        while len(self._done) < dataloader_idx:
            number = len(self._done)
            comparison = self._comparisons[number]
            assert comparison is not None
            self._done.append(comparison.finish(self._device))
            self._comparisons[number] = None
