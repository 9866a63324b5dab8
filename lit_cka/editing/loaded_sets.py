"""Which test sets a trainer has loaded, by name, and how a model's logits are read on each: `loaded_sets`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import lightning.pytorch as pl
from torch import Tensor


class LoadedSet(NamedTuple):
    """A test set that the trainer has a dataloader of."""

    name: str
    to_classes: Callable[[Tensor], Tensor] | None  # see `lit_cka.data.TestSet`


def loaded_sets(trainer: pl.Trainer) -> list[LoadedSet]:
    """Returns the test sets in the order of the trainer's dataloaders.

    Their names are those of a `TestSetsDataModule`, else the keys of the dataloaders, else "test_0", "test_1", ...
    """
    from lit_cka.data.test_sets import TestSet

    loaders = trainer.test_dataloaders
    listed = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    datamodule = getattr(trainer, "datamodule", None)
    test_sets = [test_set for test_set in getattr(datamodule, "test_sets", []) if isinstance(test_set, TestSet)]
    # A trainer keeps the data module of an earlier run: its test sets count only if they are what is loaded.
    if [getattr(loader, "dataset", None) for loader in listed] == [test_set.dataset for test_set in test_sets]:
        return [LoadedSet(test_set.name, test_set.to_classes) for test_set in test_sets]
    names = list(loaders) if isinstance(loaders, Mapping) else [f"test_{index}" for index in range(len(listed))]
    return [LoadedSet(name, None) for name in names]
