"""The options of `CKACallback`, checked and frozen: `TrackingOptions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_cka.features.given_masks import Mask
from lit_cka.features.layers import Layers
from lit_cka.features.pooling import Pooling, parse_pooling
from lit_cka.functional.cka import min_num_samples
from lit_cka.reference.recording import CacheDtype
from lit_cka.reference.reference import BEST, ReferenceLike, moves
from lit_cka.tracking.history import Stage
from lit_cka.tracking.tracker import Estimator


@dataclass(frozen=True)
class TrackingOptions:
    """What `CKACallback` was asked for; see its arguments, which have the same names.

    Raises:
        ValueError: for an option that can't be, or that does not go with another.
    """

    layers: Layers | None
    reference: ReferenceLike
    pooling: Pooling
    mask: Mask | None
    estimator: Estimator
    debiased: bool
    intervals: bool
    effective_ranks: bool
    stages: Sequence[Stage]
    dataloaders: Sequence[int] | None
    every_n_validations: int
    max_batches: int | None
    cache_memory: float
    cache_dtype: CacheDtype
    has_probe: bool
    probe_every_n_steps: int | None
    prefix: str
    log_figures: bool
    thresholds: tuple[float, float]

    def __post_init__(self) -> None:
        _check_one_of("estimator", self.estimator, ("exact", "minibatch"))
        if isinstance(self.stages, str) or not self.stages or not set(self.stages) <= {"validate", "test"}:
            raise ValueError(f'Expected `stages` to be a sequence of "validate" and "test", but got {self.stages!r}.')
        if self.dataloaders is not None and (not self.dataloaders or any(index < 0 for index in self.dataloaders)):
            raise ValueError(
                f"Expected `dataloaders` to be a sequence of indices from 0 on or None, but got {self.dataloaders}."
            )
        for name in ("every_n_validations", "max_batches", "probe_every_n_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {value}.")
        if not 1 >= self.thresholds[0] >= self.thresholds[1]:
            raise ValueError(
                f"Expected `thresholds` to be (untouched, refined), the first the larger, but got {self.thresholds}."
            )
        if self.cache_memory < 0:
            raise ValueError(f"Expected `cache_memory` to be GiB from 0 on, but got {self.cache_memory}.")
        _check_one_of("cache_dtype", self.cache_dtype, ("auto", "float64", "bfloat16"))
        if self.effective_ranks and not (self.intervals and self.estimator == "exact"):
            raise ValueError(
                'Expected `intervals` and the "exact" estimator with `effective_ranks`: they are of the same samples.'
            )
        parse_pooling(self.pooling)
        self._check_probe()
        self._check_moving()
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "dataloaders", None if self.dataloaders is None else tuple(self.dataloaders))

    def _check_probe(self) -> None:
        if not self.has_probe and self.probe_every_n_steps is not None:
            raise ValueError("Expected `probe`, batches to measure on, together with `probe_every_n_steps`.")
        if self.has_probe and (self.dataloaders is not None or self.max_batches is not None):
            raise ValueError("Expected no `dataloaders` or `max_batches` with `probe`: its own batches are all used.")

    def _check_moving(self) -> None:
        """Of a test there is no earlier one in a training, and steps between evaluations have no best."""
        if not moves(self.reference):
            return
        if "validate" not in self.stages:
            raise ValueError(
                f'Expected `stages` to have "validate" with reference={self.reference!r}, an earlier evaluation of the '
                f"training, but got {self.stages!r}."
            )
        if self.reference == BEST and self.probe_every_n_steps is not None:
            raise ValueError(
                'Expected reference="best" without `probe_every_n_steps`: which model is the best one is known at the '
                "end of a validation."
            )
        object.__setattr__(self, "stages", ("validate",))

    @property
    def how_pooled(self) -> str:
        """From a layer's output to a row, in words that differ where that does."""
        named = (
            f"{each.__module__}.{getattr(each, '__qualname__', type(each).__qualname__)}"
            if callable(each)
            else str(each)
            for each in (self.pooling, self.mask)
        )
        return ", mask ".join(named)

    @property
    def min_num_samples(self) -> int:
        """How many samples a score takes."""
        return min_num_samples(self.uses_unbiased_hsic)

    @property
    def uses_unbiased_hsic(self) -> bool:
        """Whether the scores come from the unbiased HSIC, which takes more samples and needs no hint at bias."""
        return self.debiased or self.estimator == "minibatch"


def _check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        named = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"Expected `{name}` to be {named}, but got {value!r}.")
