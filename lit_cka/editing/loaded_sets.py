"""Which test sets a trainer has loaded, by name, and how a model's logits are read on each: `loaded_sets`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor


class LoadedSet(NamedTuple):
    """A test set that the trainer has a dataloader of."""

    name: str
    to_classes: Callable[[Tensor], Tensor] | None  # see `lit_cka.data.TestSet`
    groups: Tensor | None = None  # likewise


def loaded_sets(trainer: pl.Trainer) -> list[LoadedSet]:
    """Returns the test sets in the order of the trainer's dataloaders.

    Their names are those of a `TestSetsDataModule`, else the keys of the dataloaders, else "test_0", "test_1", ...
    """
    return named_sets(trainer.test_dataloaders, getattr(trainer, "datamodule", None))


def named_sets(loaders: Any, datamodule: Any) -> list[LoadedSet]:
    """Returns the test sets of a dataloader, or of several in a list or by name, in order; see `loaded_sets`."""
    from lit_cka.data.test_sets import TestSet

    listed = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    test_sets = [test_set for test_set in getattr(datamodule, "test_sets", []) if isinstance(test_set, TestSet)]
    # A trainer keeps the data module of an earlier run: its test sets count only if they are what is loaded.
    if [getattr(loader, "dataset", None) for loader in listed] == [test_set.dataset for test_set in test_sets]:
        return [LoadedSet(test_set.name, test_set.to_classes, test_set.groups) for test_set in test_sets]
    names = list(loaders) if isinstance(loaders, Mapping) else [f"test_{index}" for index in range(len(listed))]
    return [LoadedSet(name, None) for name in names]
