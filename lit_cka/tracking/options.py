"""The options of `CKACallback`, checked."""

from __future__ import annotations

from collections.abc import Sequence


def check_options(
    estimator: str,
    stages: Sequence[str],
    dataloaders: Sequence[int] | None,
    every_n_validations: int,
    max_batches: int | None,
    thresholds: tuple[float, float],
    cache_memory: float,
    cache_dtype: str,
) -> None:
    """Raise a ValueError for an option of `CKACallback` that can't be."""
    if estimator not in ("exact", "minibatch"):
        raise ValueError(f'Expected `estimator` to be "exact" or "minibatch", but got {estimator!r}.')
    if isinstance(stages, str) or not stages or not set(stages) <= {"validate", "test"}:
        raise ValueError(f'Expected `stages` to be a sequence of "validate" and "test", but got {stages!r}.')
    if dataloaders is not None and (not dataloaders or any(index < 0 for index in dataloaders)):
        raise ValueError(
            f"Expected `dataloaders` to be a sequence of indices from 0 on or None, but got {dataloaders}."
        )
    for name, value in (("every_n_validations", every_n_validations), ("max_batches", max_batches)):
        if value is not None and value < 1:
            raise ValueError(f"Expected `{name}` to be at least 1, but got {value}.")
    if not 1 >= thresholds[0] >= thresholds[1]:
        raise ValueError(
            f"Expected `thresholds` to be (untouched, refined), the first the larger, but got {thresholds}."
        )
    if cache_memory < 0 or cache_dtype not in ("float64", "bfloat16"):
        raise ValueError(
            'Expected `cache_memory` to be GiB from 0 on and `cache_dtype` to be "float64" or "bfloat16", but got '
            f"{cache_memory} and {cache_dtype!r}."
        )


def check_probe(
    has_probe: bool, every_n_steps: int | None, dataloaders: Sequence[int] | None, max_batches: int | None
) -> None:
    """Raise a ValueError for options that do not go with a probe, or without one."""
    if not has_probe and every_n_steps is not None:
        raise ValueError("Expected `probe`, batches to measure on, together with `probe_every_n_steps`.")
    if every_n_steps is not None and every_n_steps < 1:
        raise ValueError(f"Expected `probe_every_n_steps` to be at least 1, but got {every_n_steps}.")
    if has_probe and (dataloaders is not None or max_batches is not None):
        raise ValueError("Expected no `dataloaders` or `max_batches` with `probe`: its own batches are all used.")
