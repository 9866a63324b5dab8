"""Which dataloaders are tracked, and what is refused before the first batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lit_cka.tracking.dataloaders import tracked_dataloaders
from tests.tracking.helpers import Classifier, dataset, trainer


class Asking(pl.Callback):
    """Asks when the evaluation has its dataloaders."""

    def __init__(self, indices: list[int] | None, num_samples: int) -> None:
        self.arguments = indices, num_samples
        self.found: tuple[list[int], int] | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = tracked_dataloaders(trainer, "validate", *self.arguments)


class Free(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


def of(n: int) -> DataLoader[Any]:
    return DataLoader(dataset(n), batch_size=4)


def ask(folder: Path, loaders: Any, indices: list[int] | None = None, num_samples: int = 2) -> Any:
    asking = Asking(indices, num_samples)
    trainer(folder, asking).validate(Free(), loaders, verbose=False)
    return asking.found


@pytest.mark.parametrize(
    ("loaders", "indices", "expected"),
    [
        (lambda: of(9), None, ([0], 1)),
        (lambda: [of(9), of(5), of(7)], None, ([0, 1, 2], 3)),
        (lambda: [of(9), of(5), of(7)], [2, 0], ([0, 2], 3)),
        (lambda: {"a": of(9), "b": of(5)}, [1], ([1], 2)),
        (lambda: [of(9), [of(5), of(7)]], None, ([0, 1, 2], 3)),
        (lambda: CombinedLoader([of(9), of(5)], "max_size"), None, ([0], 1)),
    ],
)
def test_which_are_tracked(tmp_path: Path, loaders: Any, indices: list[int] | None, expected: Any) -> None:
    assert ask(tmp_path, loaders(), indices) == expected


def test_an_index_beyond_the_last_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`dataloaders` to be indices below 2, but got \[2\]"):
        ask(tmp_path, [of(9), of(5)], [1, 2])


def test_a_dataset_too_small_is_refused_unless_it_is_not_tracked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 4 samples, but the dataset of validate dataloader 1 has 3"):
        ask(tmp_path, [of(9), of(3)], num_samples=4)
    assert ask(tmp_path, [of(9), of(3)], [0], num_samples=4) == ([0], 2)


def test_a_dataset_without_a_length_may_be_large_enough(tmp_path: Path) -> None:
    class Stream(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.ones(3, 6))

    assert ask(tmp_path, DataLoader(Stream(), batch_size=3), num_samples=4) == ([0], 1)
